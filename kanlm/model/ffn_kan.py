# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""The KAN arms: feed-forward blocks with learned functions.

Two kinds. Functions of edges (`kan`, `kan_mixed`): every pair of an input and an output has its own, a
`KANLinear`; K coefficients each. Functions of channels (the others): a group of channels shares one, a
`LearnedFunction`, between ordinary matrices. Shapes and the scale at the start: ffn.py. A KAN layer out of a
block starts at the output scale of the GELU MLP with equally many parameters.

References: Liu et al. 2024, arXiv:2404.19756 (KAN), Yang & Wang 2024, arXiv:2409.10594 (functions of groups).
"""

import torch.nn.functional as F
from torch import Tensor

from .basis import BASES, Basis, check_choice
from .ffn import NORM_FLOPS, FeedForward, arm, arm_names
from .kan import KANLinear
from .learned_function import LearnedFunction

EDGE_BASES = tuple(BASES)
FUNCTION_BASES = EDGE_BASES + ("rational",)
"""`rational` has no linear expansion per edge, so only learned functions of a channel or group take it."""

SILU_FLOPS = 4
BASIS_FLOPS = {"rbf": 5, "relu_switch": 5, "chebyshev": 2, "fourier": 3, "wavelet": 7}
"""Forward FLOPs of one basis function at one input; exp, tanh and the like count as 1. Splines are counted
by their polynomial pieces."""


def grid_settings(config) -> dict:
    """The config's grid as arguments of a layer."""
    names = ("grid_size", "order", "grid_min", "grid_max")
    return {name: getattr(config, f"kan_{name}") for name in names}


def num_basis_functions(config) -> int:
    """K of one learned function."""
    if config.kan_basis == "rational":
        return 10
    return config.kan_grid_size + (config.kan_order if config.kan_basis == "bspline" else 1)


def spline_order(config) -> int | None:
    """Degree of the polynomial pieces, or None of a basis that has none."""
    return {"bspline": config.kan_order, "linear": 1}.get(config.kan_basis)


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


def check_groups(config, field: str) -> None:
    width = getattr(config, field)
    if width % config.kan_num_groups:
        raise ValueError(
            f"kan_num_groups: {config.kan_num_groups} does not divide {field} {width}; groups have equally "
            "many channels"
        )


class ChannelKAN(FeedForward):
    """Base of the arms whose groups of channels share learned functions, between ordinary matrices.

    `functions` is how many LearnedFunctions a block has. `hidden_norm` keeps their inputs on the grid.
    """

    functions = 1

    def __init__(self, config):
        super().__init__(config)
        self.kernel = None  # a norm and its function in one; only kernels.select of the package kanlm sets it

    def apply_normed(
        self, function: LearnedFunction, a: Tensor, u: Tensor | None = None, *, norms_u: bool = True
    ) -> Tensor:
        """function(norm(a)), or that times norm(u), or times u; norms are those of `hidden_norm`."""
        if self.kernel is not None:
            return self.kernel(function, a, u, norms_u and u is not None, self.norm_eps)
        if u is None:
            return function(self.normalize(a))
        return function.gated(self.normalize(a), self.normalize(u) if norms_u else u)

    @classmethod
    def check(cls, config):
        check_functions(config)
        check_groups(config, "intermediate_size")

    @classmethod
    def width_step(cls, config):
        return config.kan_num_groups

    @classmethod
    def function_flops(cls, config) -> int:
        """Forward FLOPs of one learned function at one input."""
        if config.kan_basis == "rational":
            return 19
        order = spline_order(config)
        if order is not None:  # the interval, then one polynomial from a table
            return 3 + 2 * order
        return num_basis_functions(config) * (BASIS_FLOPS[config.kan_basis] + 2)

    @classmethod
    def channel_flops(cls, config):
        return cls.functions * cls.function_flops(config) + cls.gated

    @staticmethod
    def start(config, own: str) -> str:
        """What the function in the activation's place is at first, in an arm whose own is `own`."""
        return own if config.kan_initial == "default" else config.kan_initial

    @staticmethod
    def make_function(config, channels: int, initial: str, base: str | None = None) -> LearnedFunction:
        return LearnedFunction(
            channels,
            config.kan_num_groups,
            config.kan_basis,
            base=base,
            initial=initial,
            **grid_settings(config),
        )


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

    functions = 2

    def __init__(self, config):
        super().__init__(config)
        self.phi_in = self.make_function(config, config.hidden_size, "identity")
        self.phi_hidden = self.make_function(config, config.intermediate_size, self.start(config, "gelu"))

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(self.apply_normed(self.phi_hidden, self.up_proj(self.phi_in(u))))

    @classmethod
    def check(cls, config):
        super().check(config)
        check_groups(config, "hidden_size")

    @classmethod
    def channel_flops(cls, config):
        return cls.function_flops(config)

    @classmethod
    def count_flops(cls, config):
        return super().count_flops(config) + config.hidden_size * cls.function_flops(config)

    @classmethod
    def saved_bytes(cls, config, half):
        return super().saved_bytes(config, half) + 4 * config.hidden_size


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

    @classmethod
    def channel_flops(cls, config):
        residual = 1 + SILU_FLOPS if config.kan_glu_form == "residual" else 0
        return super().channel_flops(config) + residual


@arm("kan_product", "kan")
class ProductKAN(ChannelKAN):
    """down(phi(gate u) * psi(up u)), learned from SiLU and from the identity: it starts as SwiGLU."""

    functions = 2
    gated = True
    channel_saves = (4, 0)

    def __init__(self, config):
        super().__init__(config)
        self.phi = self.make_function(config, config.intermediate_size, self.start(config, "silu"))
        self.psi = self.make_function(config, config.intermediate_size, "identity")

    def forward(self, u: Tensor) -> Tensor:
        up = self.apply_normed(self.psi, self.up_proj(u))
        return self.down_proj(self.apply_normed(self.phi, self.gate_proj(u), up, norms_u=False))


class EdgeKAN(FeedForward):
    """down(norm(up u)) with `down_proj` a KAN layer; with `layers` = 2 `up_proj` is one too.

    The norm in the middle is an RMSNorm without parameters: it puts the hidden values on the grid, as the
    block's own input is. So `hidden_norm` changes nothing here.
    """

    keeps_casts = False  # the cast weights are made again in the backward pass, as the basis values are
    channel_saves = (0, 8)  # the norm's input and the layer's
    layers = 1

    def __init__(self, config):
        super().__init__(config)
        self.kernel = None  # of the norm
        if self.layers == 2:
            self.up_proj = self.make_layer(config, config.hidden_size, config.intermediate_size)
        self.down_proj = self.make_layer(config, config.intermediate_size, config.hidden_size)
        self.down_proj.gain = self.gelu_scale()
        self.down_proj.reset_parameters()

    @staticmethod
    def make_layer(config, inputs: int, outputs: int) -> KANLinear:
        has_base = config.kan_base != "none"
        return KANLinear(
            inputs,
            outputs,
            config.kan_basis,
            base="silu" if has_base else None,
            conditioning=config.kan_conditioning,
            # Coefficients from zero: the block starts as its base branch and learns the corrections.
            spline_share=0.0 if has_base else 1.0,
            **grid_settings(config),
        )

    def forward(self, u: Tensor) -> Tensor:
        hidden = self.up_proj(u)
        if self.kernel is not None:
            return self.down_proj(self.kernel(hidden, self.norm_eps))
        return self.down_proj(F.rms_norm(hidden, hidden.shape[-1:], eps=self.norm_eps))

    @classmethod
    def check(cls, config):
        if config.kan_basis == "rational":
            raise ValueError(
                f"kan_basis: 'rational' is a function of a channel, and {cls.ffn_type!r} has functions of "
                f"edges; choose one of {', '.join(EDGE_BASES)}, or ffn_type kan_act, kan_grouped or kan_glu"
            )
        check_choice("kan_basis", config.kan_basis, EDGE_BASES)
        check_functions(config)

    @staticmethod
    def edge_flops(config) -> int:
        """Forward FLOPs for the features of one input of a layer."""
        base = SILU_FLOPS if config.kan_base != "none" else 0
        order = spline_order(config)
        if order is not None:  # the interval, then order + 1 polynomials by Horner's rule
            return base + 3 + (order + 1) * 2 * order
        return base + num_basis_functions(config) * BASIS_FLOPS[config.kan_basis]

    @classmethod
    def count_flops(cls, config):
        inputs = config.intermediate_size + (config.hidden_size if cls.layers == 2 else 0)
        return inputs * cls.edge_flops(config) + NORM_FLOPS * config.intermediate_size

    @classmethod
    def saved_bytes(cls, config, half):
        return config.intermediate_size * cls.channel_saves[1]  # the same with and without `hidden_norm`


@arm("kan", "kan")
class FullKAN(EdgeKAN):
    """Two KAN layers: 2 D h (K + 1) parameters."""

    layers = 2


@arm("kan_mixed", "kan")
class MixedKAN(EdgeKAN):
    """A matrix, then a KAN layer: D h (K + 2) parameters."""


KAN_TYPES = arm_names("kan")
