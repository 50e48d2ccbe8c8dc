# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""Every feed-forward block: [B, T, D] to [B, T, D], from an input that an RMSNorm has scaled.

Shapes: B batch, T time, D hidden_size, h intermediate_size, K basis functions. No block has a bias.

Projections into the block start at standard deviation `initializer_range`, those out of it at
`initializer_range / sqrt(2 num_hidden_layers)`, so that the residual stream's variance does not grow with
depth (Radford et al. 2019). A KAN layer out of a block starts at the output scale of the GELU MLP with
equally many parameters.

References: Shazeer 2020, arXiv:2002.05202 (gated blocks), So et al. 2021, arXiv:2109.08668 (squared ReLU),
Zhuo et al. 2024, arXiv:2411.03884 (PolyNorm), Huang & Schlag 2024, arXiv:2411.13010 (xIELU), and those of
kan.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .kan import KANLinear
from .learned_function import LearnedFunction
from .refit import normal_points


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


class PolyNorm(nn.Module):
    """sum_{i=1..3} a_i x^i / rms(x^i) + a_0 over the last dimension; a_i = 1/3 and a_0 = 0 at the start.

    Zhuo et al. 2024, eq. 5, with the norms as root mean squares.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        init.constant_(self.weight, 1 / 3)
        init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        powers = (wide, wide.square(), wide**3)
        total = self.bias
        for weight, power in zip(self.weight, powers, strict=True):
            total = total + weight * F.rms_norm(power, power.shape[-1:], eps=self.eps)
        return total.to(x.dtype)


class XIELU(nn.Module):
    """a_p x^2 + b x for x > 0, a_n (exp(x) - 1 - x) + b x otherwise; b = 1/2, both a learned.

    Huang & Schlag 2024: a_p = softplus(alpha_p), a_n = b + softplus(alpha_n), both 0.8 at the start.
    """

    beta = 0.5

    def __init__(self):
        super().__init__()
        self.alpha_p = nn.Parameter(torch.empty(1))
        self.alpha_n = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        init.constant_(self.alpha_p, math.log(math.expm1(0.8)))
        init.constant_(self.alpha_n, math.log(math.expm1(0.8 - self.beta)))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        positive, negative = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        below = wide.clamp(max=0)
        curved = positive * wide.clamp(min=0).square() + negative * (torch.expm1(below) - below)
        return (curved + self.beta * wide).to(x.dtype)


class FeedForward(nn.Module):
    """What all blocks share: the initial scale of the projection out of the block."""

    def __init__(self, config):
        super().__init__()
        self.hidden_size, self.initializer_range = config.hidden_size, config.initializer_range
        self.output_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)

    @torch.no_grad()
    def reset_parameters(self):
        """Scale down the output projection; its other weights are the model's to initialise."""
        if isinstance(self.down_proj, nn.Linear):
            init.normal_(self.down_proj.weight, std=self.output_std)

    def gelu_scale(self) -> float:
        """Root mean square output of a new GELU MLP with equally many parameters, for a normed input."""
        points, weights = normal_points()
        hidden = F.gelu(points * (self.initializer_range * math.sqrt(self.hidden_size)))
        matched_width = sum(parameter.numel() for parameter in self.parameters()) / (2 * self.hidden_size)
        return self.output_std * math.sqrt(matched_width * float((hidden.square() * weights).sum()))


class MLP(FeedForward):
    """down(act(up u)): 2 D h parameters and those of the activation."""

    def __init__(self, config, activation):
        super().__init__(config)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = activation
        self.kernel = None

    def forward(self, u: Tensor) -> Tensor:
        hidden = self.up_proj(u)
        hidden = self.activation(hidden) if self.kernel is None else self.kernel(self, hidden, None)
        return self.down_proj(hidden)


class GatedMLP(FeedForward):
    """down(act(gate u) * up u): 3 D h parameters."""

    def __init__(self, config, activation):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = activation
        self.kernel = None

    def forward(self, u: Tensor) -> Tensor:
        gate, up = self.gate_proj(u), self.up_proj(u)
        hidden = self.activation(gate) * up if self.kernel is None else self.kernel(self, gate, up)
        return self.down_proj(hidden)


def _learned_function(config, channels: int, initial: str, base: str | None = None) -> LearnedFunction:
    return LearnedFunction(
        channels,
        groups=config.kan_num_groups,
        basis=config.kan_basis,
        grid_size=config.kan_grid_size,
        order=config.kan_order,
        grid_min=config.kan_grid_min,
        grid_max=config.kan_grid_max,
        base=base,
        initial=initial,
    )


def _kan_linear(config, inputs: int, outputs: int) -> KANLinear:
    has_base = config.kan_base != "none"
    return KANLinear(
        inputs,
        outputs,
        config.kan_basis,
        grid_size=config.kan_grid_size,
        order=config.kan_order,
        grid_min=config.kan_grid_min,
        grid_max=config.kan_grid_max,
        base="silu" if has_base else None,
        conditioning=config.kan_conditioning,
        # Coefficients from zero: the block starts as its base branch and learns the corrections.
        spline_share=0.0 if has_base else 1.0,
    )


class KANGLU(FeedForward):
    """down(phi(gate u) * up u), phi learned per group of channels: 3 D h parameters and the coefficients.

    phi starts as SiLU: `interpolated`, a spline fitted to it, or `residual`, SiLU plus a spline that is
    zero, when the block starts as exactly SwiGLU.
    """

    def __init__(self, config):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        residual = config.kan_glu_form == "residual"
        self.phi = _learned_function(
            config,
            config.intermediate_size,
            "zero" if residual else "silu",
            base="silu" if residual else None,
        )

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(self.phi.gated(self.gate_proj(u), self.up_proj(u)))


class GroupedKAN(FeedForward):
    """down(phi2(up phi1(u))), both phi learned per group; phi1 starts as the identity and phi2 as GELU.

    The placement of GR-KAN (Yang & Wang 2024): 2 D h parameters and the coefficients.
    """

    def __init__(self, config):
        super().__init__(config)
        self.phi_in = _learned_function(config, config.hidden_size, "identity")
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.phi_hidden = _learned_function(config, config.intermediate_size, "gelu")
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(self.phi_hidden(self.up_proj(self.phi_in(u))))


class EdgeKAN(FeedForward):
    """down(norm(up u)): `up_proj` a KAN layer (`kan`) or a matrix (`kan_mixed`), `down_proj` a KAN layer.

    The norm in the middle is an RMSNorm without parameters: it puts the hidden values on the grid, as the
    block's own input is. Parameters: 2 D h (K + 1), or D h (K + 2) for `kan_mixed`.
    """

    def __init__(self, config, mixed: bool):
        super().__init__(config)
        width, hidden = config.hidden_size, config.intermediate_size
        self.eps = config.rms_norm_eps
        self.up_proj: nn.Module
        if mixed:
            self.up_proj = nn.Linear(width, hidden, bias=False)
        else:
            self.up_proj = _kan_linear(config, width, hidden)
        self.down_proj = _kan_linear(config, hidden, width)
        self.down_proj.gain = self.gelu_scale()
        self.down_proj.reset_parameters()

    def forward(self, u: Tensor) -> Tensor:
        hidden = self.up_proj(u)
        return self.down_proj(F.rms_norm(hidden, hidden.shape[-1:], eps=self.eps))


def build_ffn(config) -> nn.Module:
    """The feed-forward block of `config.ffn_type`; `config` has the attributes of KanLMConfig.

    Raises:
        ValueError: an unknown ffn_type, or what `KANLinear` and `LearnedFunction` refuse.
    """
    builders = {
        "gelu": lambda: MLP(config, nn.GELU()),
        "relu2": lambda: MLP(config, relu2),
        "polynorm": lambda: MLP(config, PolyNorm()),
        "xielu": lambda: MLP(config, XIELU()),
        "swiglu": lambda: GatedMLP(config, F.silu),
        "geglu": lambda: GatedMLP(config, F.gelu),
        "kan": lambda: EdgeKAN(config, mixed=False),
        "kan_mixed": lambda: EdgeKAN(config, mixed=True),
        "kan_grouped": lambda: GroupedKAN(config),
        "kan_glu": lambda: KANGLU(config),
    }
    if config.ffn_type not in builders:
        raise ValueError(f"ffn_type: unknown type {config.ffn_type!r}; choose one of {', '.join(builders)}")
    return builders[config.ffn_type]()
