# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""The KAN arms: feed-forward blocks with learned functions.

Two kinds. Functions of edges (`kan`, `kan_mixed`): every pair of an input and an output has its own, a
`KANLinear`; K coefficients each. Functions of channels (the others): a group of channels shares one, a
`LearnedFunction`, between ordinary matrices. Shapes and the scale at the start: ffn.py. A KAN layer out of a
block starts at the output scale of the GELU MLP with equally many parameters.

References: Liu et al. 2024, arXiv:2404.19756 (KAN), Yang & Wang 2024, arXiv:2409.10594 (functions of groups).
"""

from typing import ClassVar

from torch import Tensor

from .basis import BASES, FUNCTION_BASES, Basis, check_choice
from .ffn import FeedForward, arm, arm_names
from .kan import KANLinear
from .learned_function import LearnedFunction


def grid_settings(config) -> dict:
    """The config's grid as arguments of a layer."""
    names = ("grid_size", "order", "grid_min", "grid_max")
    return {name: getattr(config, f"kan_{name}") for name in names}


def check_functions(config) -> None:
    """What all learned functions ask of a config."""
    check_choice("kan_basis", config.kan_basis, FUNCTION_BASES)
    check_choice("kan_base", config.kan_base, ("silu", "none"))
    check_choice("kan_conditioning", config.kan_conditioning, ("none", "whitened"))
    check_choice("kan_glu_form", config.kan_glu_form, ("interpolated", "residual"))
    check_choice("kan_initial", config.kan_initial, ("default", "silu", "gelu", "gelu_wave"))
    if config.kan_initial == "gelu_wave" and config.kan_basis == "rational":
        raise ValueError("kan_initial: a rational function cannot start at 'gelu_wave'; choose gelu or silu")
    try:
        Basis(**grid_settings(config))
    except ValueError as error:  # of the layer, whose arguments have the same names
        raise ValueError(f"kan_{error}") from None


class ChannelKAN(FeedForward):
    """Base of the arms whose groups of channels share learned functions, between ordinary matrices.

    `hidden_norm` keeps their inputs on the grid.
    """

    functions: ClassVar[dict[str, str]] = {"phi": "intermediate_size"}
    """Names of the block's functions, and the config's field with the number of channels that each serves."""

    def apply_normed(self, function: LearnedFunction, a: Tensor, u: Tensor | None = None) -> Tensor:
        """function(norm(a)), or that times norm(u); norms are those of `hidden_norm`."""
        if self.kernel is not None:
            return self.kernel(function, a, u, self.norm_eps)
        if u is None:
            return function(self.normalize(a))
        return function.gated(self.normalize(a), self.normalize(u))

    @classmethod
    def check(cls, config):
        check_functions(config)
        for field in cls.functions.values():
            if getattr(config, field) % config.kan_num_groups:
                raise ValueError(
                    f"kan_num_groups: {config.kan_num_groups} does not divide {field} "
                    f"{getattr(config, field)}; groups have equally many channels"
                )

    @classmethod
    def width_step(cls, config):
        return config.kan_num_groups

    def elementwise_flops(self):
        learned = (getattr(self, name) for name in self.functions)
        return sum(phi.channels * phi.flops for phi in learned) + self.intermediate_size * self.gated

    @staticmethod
    def start(config, own: str) -> str:
        """What the function in the activation's place is at first, in an arm whose own is `own`."""
        return own if config.kan_initial == "default" else config.kan_initial

    @staticmethod
    def make_function(config, channels: int, initial: str, base: str | None = None) -> LearnedFunction:
        settings = {"base": base, "initial": initial, **grid_settings(config)}
        return LearnedFunction(channels, config.kan_num_groups, config.kan_basis, **settings)


@arm("kan_act", "kan")
class ActivationKAN(ChannelKAN):
    """down(phi(up u)), phi learned from GELU: the GELU MLP with a learned activation."""

    def __init__(self, config):
        super().__init__(config)
        self.phi = self.make_function(config, config.intermediate_size, self.start(config, "gelu"))

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(self.apply_normed(self.phi, self.up_proj(u)))


@arm("kan_grouped", "kan")
class GroupedKAN(ChannelKAN):
    """down(phi_hidden(up phi_in(u))), learned from the identity and from GELU.

    The placement of GR-KAN (Yang & Wang 2024).
    """

    functions = {"phi_in": "hidden_size", "phi_hidden": "intermediate_size"}

    def __init__(self, config):
        super().__init__(config)
        self.phi_in = self.make_function(config, config.hidden_size, "identity")
        self.phi_hidden = self.make_function(config, config.intermediate_size, self.start(config, "gelu"))

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(self.apply_normed(self.phi_hidden, self.up_proj(self.phi_in(u))))

    def saved_bytes(self, half):
        return super().saved_bytes(half) + 4 * self.hidden_size


@arm("kan_glu", "kan")
class KANGLU(ChannelKAN):
    """down(phi(gate u) * up u): SwiGLU with a learned activation of the gate.

    phi starts as SiLU: `interpolated`, a spline fitted to it, or `residual`, SiLU plus a spline that is
    zero, when the block starts as exactly SwiGLU.
    """

    gated = True
    channel_saves = (3, 0)

    def __init__(self, config):
        super().__init__(config)
        residual = config.kan_glu_form == "residual"
        initial, base = ("zero", "silu") if residual else (self.start(config, "silu"), None)
        self.phi = self.make_function(config, config.intermediate_size, initial, base)

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(self.apply_normed(self.phi, self.gate_proj(u), self.up_proj(u)))


@arm("kan_product", "kan")
class ProductKAN(ChannelKAN):
    """down(phi(gate u) * psi(up u)), learned from SiLU and from the identity: it starts as SwiGLU."""

    functions = {"phi": "intermediate_size", "psi": "intermediate_size"}
    gated = True
    channel_saves = (4, 0)

    def __init__(self, config):
        super().__init__(config)
        self.phi = self.make_function(config, config.intermediate_size, self.start(config, "silu"))
        self.psi = self.make_function(config, config.intermediate_size, "identity")

    def forward(self, u: Tensor) -> Tensor:
        gate, up = self.gate_proj(u), self.up_proj(u)
        if self.kernel is not None:
            return self.down_proj(self.kernel(self, gate, up))
        return self.down_proj(self.phi.gated(self.normalize(gate), self.psi(self.normalize(up))))


class EdgeKAN(FeedForward):
    """down(norm(up u)) with `down_proj` a KAN layer; with `layers` = 2 `up_proj` is one too.

    The norm in the middle is an RMSNorm without parameters: it puts the hidden values on the grid, as the
    block's own input is. So `hidden_norm` changes nothing here.
    """

    keeps_casts = False  # the cast weights are made again in the backward pass, as the basis values are
    channel_saves = (0, 4)  # the layer's input; the norm's is counted with the norm
    layers = 1

    def __init__(self, config):
        super().__init__(config)
        self.hidden_norm = True
        if self.layers == 2:
            self.up_proj = self.make_layer(config, config.hidden_size, config.intermediate_size)
        self.down_proj = self.make_layer(config, config.intermediate_size, config.hidden_size)
        self.down_proj.gain = self.gelu_scale()
        self.down_proj.reset_parameters()

    @staticmethod
    def make_layer(config, inputs: int, outputs: int) -> KANLinear:
        # Coefficients from zero: the block starts as its base branch and learns the corrections.
        base, share = ("silu", 0.0) if config.kan_base != "none" else (None, 1.0)
        settings = {"conditioning": config.kan_conditioning, "spline_share": share, **grid_settings(config)}
        return KANLinear(inputs, outputs, config.kan_basis, base=base, **settings)

    def forward(self, u: Tensor) -> Tensor:
        hidden = self.up_proj(u)
        if self.kernel is not None:
            return self.down_proj(self.kernel(hidden, self.norm_eps))
        return self.down_proj(self.normalize(hidden))

    @classmethod
    def check(cls, config):
        if config.kan_basis == "rational":
            raise ValueError(
                f"kan_basis: 'rational' is a function of a channel, and {cls.ffn_type!r} has functions of "
                f"edges; choose one of {', '.join(BASES)}, or ffn_type kan_act, kan_grouped or kan_glu"
            )
        check_choice("kan_basis", config.kan_basis, BASES)
        check_functions(config)

    def elementwise_flops(self):
        layers = [layer for layer in (self.up_proj, self.down_proj) if isinstance(layer, KANLinear)]
        return sum(layer.in_features * layer.flops for layer in layers)


@arm("kan", "kan")
class FullKAN(EdgeKAN):
    """Two KAN layers: 2 D h (K + 1) parameters."""

    layers = 2


@arm("kan_mixed", "kan")
class MixedKAN(EdgeKAN):
    """A matrix, then a KAN layer: D h (K + 2) parameters."""


KAN_TYPES = arm_names("kan")
