# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""Feed-forward blocks (arms): [B, T, D] to [B, T, D], from an input that an RMSNorm has scaled.

Shapes: B batch, T time, D hidden_size, h intermediate_size. No block has a bias.

An arm is one class, registered under its `ffn_type`. It states its family, and the FLOPs and the bytes of
its forward pass beside that pass; sizes, comparisons, cards and kernels read them from a block. This file has
what all arms share, the MLPs and the controls; ffn_kan.py has the KANs. A package of your own adds arms by an
entry point of the group "kanlm.arms" that names its module.

Projections into the block start at standard deviation `initializer_range`, those out of it at
`initializer_range / sqrt(2 num_hidden_layers)`, so that the residual stream's variance does not grow with
depth (Radford et al. 2019).

References: Shazeer 2020, arXiv:2002.05202 (gated blocks), So et al. 2021, arXiv:2109.08668 (squared ReLU),
Zhuo et al. 2024, arXiv:2411.03884 (PolyNorm), Huang & Schlag 2024, arXiv:2411.13010 (xIELU).
"""

import math
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .basis import at_least_fp32, check_choice
from .whitening import normal_points

Family = Literal["mlp", "kan", "control"]

ARMS: dict[str, type["FeedForward"]] = {}
"""Every registered arm by its `ffn_type`, in the order of registration."""

NORM_FLOPS = 4
"""Forward FLOPs of an RMSNorm without parameters for one value: square, add, scale, and its root's share."""


def arm(name: str, family: Family) -> Callable[[type["FeedForward"]], type["FeedForward"]]:
    """Register a class as the arm `ffn_type = name`.

    Raises:
        ValueError: the name belongs to another class.
    """

    def register(block: type[FeedForward]) -> type[FeedForward]:
        # The file of an arm may be imported twice: as installed, and as a copy in an exported folder.
        if name in ARMS and ARMS[name].__qualname__ != block.__qualname__:
            raise ValueError(f"ffn_type: {name!r} is already {ARMS[name].__module__}.{ARMS[name].__name__}")
        block.ffn_type, block.family = name, family
        ARMS[name] = block
        return block

    return register


def arm_names(*families: Family) -> tuple[str, ...]:
    """The ffn_types of these families, or of all."""
    return tuple(name for name, block in ARMS.items() if not families or block.family in families)


def find_arm(name: str) -> type["FeedForward"]:
    """The class of the arm `name`; packages that offer arms are only asked for a name not known here.

    Raises:
        ValueError: nobody has such an arm.
    """
    if name not in ARMS:
        for entry in entry_points(group="kanlm.arms"):
            entry.load()
    check_choice("ffn_type", name, ARMS)
    return ARMS[name]


def build_ffn(config) -> "FeedForward":
    """The feed-forward block of `config.ffn_type`. ValueError: see `find_arm`, and what its layers refuse."""
    return find_arm(config.ffn_type)(config)


class FeedForward(nn.Module):
    """What all blocks share, and what an arm states about itself.

    By default: down(f(up u)), with `gated` down(f(gate u) * up u); matrices are `nn.Linear`. A config has
    the attributes of KanLMConfig.
    """

    ffn_type: ClassVar[str]
    family: ClassVar[Family]
    gated: ClassVar[bool] = False
    channel_saves: ClassVar[tuple[int, int]] = (2, 0)
    """What a hidden channel of a token leaves for the backward pass: activations, and bytes in fp32."""
    keeps_casts: ClassVar[bool] = True
    """Autocast keeps a copy of every matrix until the backward pass."""
    tp_plan: ClassVar[dict[str, str]] = {}
    """How tensor parallelism splits a block whose channels do not depend on each other."""
    kernel: Callable[..., Tensor] | None = None
    """A norm and what follows it in one pass, with the arm's own arguments; only kernels.select sets it."""

    def __init__(self, config):
        super().__init__()
        self.hidden_size, self.initializer_range = config.hidden_size, config.initializer_range
        self.output_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        self.norm_eps, self.hidden_norm = config.rms_norm_eps, config.hidden_norm
        width, hidden = config.hidden_size, config.intermediate_size
        self.intermediate_size = hidden
        if self.gated:
            self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj: nn.Module = nn.Linear(width, hidden, bias=False)
        self.down_proj: nn.Module = nn.Linear(hidden, width, bias=False)

    @classmethod
    def check(cls, config) -> None:
        """Raise ValueError where the config's fields do not fit this arm."""

    @classmethod
    def width_step(cls, config) -> int:
        """Widths h are multiples of this."""
        return 1

    def elementwise_flops(self) -> int:
        """Forward FLOPs for one token outside the matrices and the hidden norms."""
        raise NotImplementedError

    def count_flops(self) -> int:
        """Forward FLOPs for one token outside the matrices."""
        norms = self.hidden_norm * (1 + self.gated) * self.intermediate_size
        return self.elementwise_flops() + norms * NORM_FLOPS

    def saved_bytes(self, half: int) -> int:
        """Bytes that one token leaves for the backward pass, its input aside; an activation has `half`."""
        activations, fp32 = self.channel_saves
        norms = self.hidden_norm * (1 + self.gated)
        return self.intermediate_size * (activations * half + fp32 + 4 * norms)

    def normalize(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., h], RMS-normed without parameters where the config has `hidden_norm`."""
        if not self.hidden_norm:
            return hidden
        return F.rms_norm(hidden, hidden.shape[-1:], eps=self.norm_eps)

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
    """down(act(up u)), or act(norm(up u)) with `hidden_norm`: 2 D h parameters and the activation's.

    `activation_flops` are those of the activation for one channel.
    """

    tp_plan = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    activation_flops: ClassVar[int]

    def __init__(self, config):
        super().__init__(config)
        self.activation = self.make_activation()

    @staticmethod
    def make_activation() -> Callable[[Tensor], Tensor]:
        raise NotImplementedError

    def forward(self, u: Tensor) -> Tensor:
        hidden = self.up_proj(u)
        if self.kernel is not None:
            return self.down_proj(self.kernel(self, hidden, None))
        return self.down_proj(self.activation(self.normalize(hidden)))

    def elementwise_flops(self):
        return self.intermediate_size * (self.activation_flops + self.gated)  # gated: a product more


class GatedMLP(MLP):
    """down(act(gate u) * up u): 3 D h parameters. With `hidden_norm` both branches are normed first."""

    gated = True
    channel_saves = (4, 0)

    def forward(self, u: Tensor) -> Tensor:
        gate, up = self.gate_proj(u), self.up_proj(u)
        if self.kernel is not None:
            return self.down_proj(self.kernel(self, gate, up))
        return self.down_proj(self.activation(self.normalize(gate)) * self.normalize(up))


@arm("gelu", "mlp")
class GELUMLP(MLP):
    activation_flops = 5
    make_activation = staticmethod(nn.GELU)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


@arm("relu2", "mlp")
class ReLU2MLP(MLP):
    activation_flops = 2
    make_activation = staticmethod(lambda: relu2)


@arm("swiglu", "mlp")
class SwiGLU(GatedMLP):
    activation_flops = 4
    make_activation = staticmethod(lambda: F.silu)


@arm("geglu", "mlp")
class GEGLU(GatedMLP):
    activation_flops = 5
    make_activation = staticmethod(lambda: F.gelu)


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
        wide = at_least_fp32(x)
        powers = (wide, wide.square(), wide**3)
        total = self.bias
        for weight, power in zip(self.weight, powers, strict=True):
            total = total + weight * F.rms_norm(power, power.shape[-1:], eps=self.eps)
        return total.to(x.dtype)


@arm("polynorm", "control")
class PolyNormMLP(MLP):
    """A control: a few learned numbers for a whole layer, and a norm over its channels."""

    tp_plan = {}
    activation_flops = 14
    channel_saves = (1, 24)  # three powers, each with its norm
    make_activation = staticmethod(PolyNorm)


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
        wide = at_least_fp32(x)
        positive, negative = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        below = wide.clamp(max=0)
        curved = positive * wide.clamp(min=0).square() + negative * (torch.expm1(below) - below)
        return (curved + self.beta * wide).to(x.dtype)


@arm("xielu", "control")
class XIELUMLP(MLP):
    """A control: one function with two learned numbers for a whole layer."""

    tp_plan = {}  # its numbers would need a plan of their own
    activation_flops = 9
    channel_saves = (1, 20)
    make_activation = staticmethod(XIELU)
