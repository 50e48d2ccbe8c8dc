"""Ideas that the study tries and the package does not ship: two arms, a start of the functions, smoothing.

Importing this file registers the arms and the start, as a package of your own would by an entry point.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kanlm.model.basis import INITIAL_FUNCTIONS
from kanlm.model.ffn import arm, relu2
from kanlm.model.ffn_kan import ChannelKAN

INITIAL_FUNCTIONS["gelu_relu2"] = lambda x: (F.gelu(x) + relu2(x)) / 2


@arm("study_bivariate", "kan")
class BivariateKAN(ChannelKAN):
    """down(F(gate u, up u)), F(a, b) = phi(a) psi(b) + phi_2(a) psi_2(b): a function of two inputs of rank 2.

    It starts as SwiGLU: phi_2 is zero.
    """

    functions = dict.fromkeys(("phi", "psi", "phi_2", "psi_2"), "intermediate_size")
    gated = True
    channel_saves = (8, 0)

    def __init__(self, config):
        super().__init__(config)
        self.phi = self.make_function(config, config.intermediate_size, "silu")
        self.psi = self.make_function(config, config.intermediate_size, "identity")
        self.phi_2 = self.make_function(config, config.intermediate_size, "zero")
        self.psi_2 = self.make_function(config, config.intermediate_size, "gelu")

    def forward(self, u: Tensor) -> Tensor:
        a, b = self.normalize(self.gate_proj(u)), self.normalize(self.up_proj(u))
        return self.down_proj(self.phi.gated(a, self.psi(b)) + self.phi_2.gated(a, self.psi_2(b)))


@arm("study_token_gated", "kan")
class TokenGatedKAN(ChannelKAN):
    """down(phi(z) + sigmoid(W u) psi(z)), z = up u, a gate for each group: its function depends on the token.

    It starts as the GELU MLP: psi is zero.
    """

    functions = dict.fromkeys(("phi", "psi"), "intermediate_size")
    channel_saves = (5, 0)

    def __init__(self, config):
        super().__init__(config)
        self.phi = self.make_function(config, config.intermediate_size, "gelu")
        self.psi = self.make_function(config, config.intermediate_size, "zero")
        self.token_gate = nn.Linear(config.hidden_size, config.kan_num_groups, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        z = self.normalize(self.up_proj(u))
        share = torch.sigmoid(self.token_gate(u)).repeat_interleave(z.shape[-1] // self.phi.groups, dim=-1)
        return self.down_proj(self.phi(z) + self.psi.gated(z, share))


@contextmanager
def changed_steps(trial: dict[str, Any]) -> Iterator[None]:
    """Within, optimisers take the steps that the trial's `shared` and `curvature` ask for."""
    with ExitStack() as stack:
        if trial.get("shared"):
            stack.callback(register_optimizer_step_pre_hook(one_function_for_all_layers).remove)
        if rate := trial.get("curvature"):
            stack.callback(
                register_optimizer_step_post_hook(lambda optimizer, *_: smoothed(optimizer, rate)).remove
            )
        yield


def one_function_for_all_layers(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Functions of all layers take one step, by their mean gradient: begun equal, they stay so."""
    for group in optimizer.param_groups:
        if group["name"] != "kan":
            continue
        parameters = group["params"]
        mean_gradient = torch.stack([parameter.grad for parameter in parameters]).mean(dim=0)
        for parameter in parameters:
            parameter.grad.copy_(mean_gradient)


@torch.no_grad()
def smoothed(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """A step of lr * rate down half the sum of the coefficients' squared second differences."""
    for group in optimizer.param_groups:
        if group["name"] != "kan":
            continue
        for c in group["params"]:
            bend = c.diff(n=2, dim=-1)
            gradient = F.pad(bend, (0, 2)) - 2 * F.pad(bend, (1, 1)) + F.pad(bend, (2, 0))
            c.sub_(gradient, alpha=group["lr"] * rate)
