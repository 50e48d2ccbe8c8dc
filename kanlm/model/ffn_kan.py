# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""The KAN arms: feed-forward blocks with learned functions.

Two kinds. Functions of edges (`kan`, `kan_mixed`): every pair of an input and an output has its own, a
`KANLinear`; K coefficients each. Functions of channels (the others): a group of channels shares one, a
`LearnedFunction`, between ordinary matrices. Shapes and the scale at the start: ffn.py. A KAN layer out of a
block starts at the output scale of the GELU MLP with equally many parameters.

References: Liu et al. 2024, arXiv:2404.19756 (KAN), Yang & Wang 2024, arXiv:2409.10594 (functions of groups).
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from .basis import BASES, MAX_ORDER
from .ffn import NORM_FLOPS, FeedForward, arm, arm_names, norm_bytes
from .kan import KANLinear
from .learned_function import LearnedFunction

EDGE_BASES = tuple(BASES)
FUNCTION_BASES = EDGE_BASES + ("rational",)
"""`rational` has no linear expansion per edge, so only learned functions of a channel or group take it."""

SILU_FLOPS = 4
BASIS_FLOPS = {"rbf": 5, "relu_switch": 5, "chebyshev": 2, "fourier": 3, "wavelet": 7}
"""Forward FLOPs of one basis function at one input; exp, tanh and the like count as 1. Splines are counted
by their polynomial pieces."""


def num_basis_functions(config) -> int:
    """K of one learned function."""
    if config.kan_basis == "rational":
        return 10
    return config.kan_grid_size + (config.kan_order if config.kan_basis == "bspline" else 1)


def spline_order(config) -> int | None:
    """Degree of the polynomial pieces, or None of a basis that has none."""
    return {"bspline": config.kan_order, "linear": 1}.get(config.kan_basis)


def check_choice(field: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"{field}: unknown value {value!r}; choose one of {', '.join(known)}")


def check_functions(config) -> None:
    """What all learned functions ask of a config."""
    check_choice("kan_basis", config.kan_basis, FUNCTION_BASES)
    check_choice("kan_base", config.kan_base, ("silu", "none"))
    check_choice("kan_conditioning", config.kan_conditioning, ("none", "whitened"))
    check_choice("kan_glu_form", config.kan_glu_form, ("interpolated", "residual"))
    if not 0 <= config.kan_order <= MAX_ORDER:
        raise ValueError(f"kan_order: must lie in 0..{MAX_ORDER}, got {config.kan_order}")
    low, high = config.kan_grid_min, config.kan_grid_max
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"kan_grid_min: must be finite and below kan_grid_max, got {low} and {high}")


class ChannelKAN(FeedForward):
    """Base of the arms whose groups of channels share learned functions.

    `functions` is how many LearnedFunctions of the hidden channels a block has.
    """

    functions = 1

    @classmethod
    def check(cls, config):
        check_functions(config)
        cls.check_groups(config, "intermediate_size")

    @staticmethod
    def check_groups(config, field: str) -> None:
        width = getattr(config, field)
        if width % config.kan_num_groups:
            raise ValueError(
                f"kan_num_groups: {config.kan_num_groups} does not divide {field} {width}; groups have "
                "equally many channels"
            )

    @classmethod
    def width_step(cls, config):
        return config.kan_num_groups

    @classmethod
    def count_coefficients(cls, config):
        return cls.functions * config.kan_num_groups * num_basis_functions(config)

    @classmethod
    def function_flops(cls, config) -> int:
        """Forward FLOPs of one learned function at one input."""
        if config.kan_basis == "rational":
            return 19
        order = spline_order(config)
        if order is not None:  # the interval, then one polynomial from a table
            return 3 + 2 * order
        return num_basis_functions(config) * (BASIS_FLOPS[config.kan_basis] + 2)

    @staticmethod
    def make_function(config, channels: int, initial: str, base: str | None = None) -> LearnedFunction:
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


class PlainKAN(ChannelKAN):
    """Base of the arms with an up and a down projection: 2 D h parameters and the coefficients."""

    def __init__(self, config):
        super().__init__(config)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    @classmethod
    def count_parameters(cls, config):
        return 2 * config.hidden_size * config.intermediate_size, cls.count_coefficients(config)


@arm("kan_act", "kan")
class ActivationKAN(PlainKAN):
    """down(phi(up u)), phi learned per group and starting as GELU.

    The GELU MLP with a learned activation. With `hidden_norm` the norm keeps phi's input on its grid.
    """

    def __init__(self, config):
        super().__init__(config)
        self.phi = self.make_function(config, config.intermediate_size, "gelu")

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(self.phi(self.normalize(self.up_proj(u))))

    @classmethod
    def count_flops(cls, config):
        return config.intermediate_size * (cls.function_flops(config) + NORM_FLOPS * config.hidden_norm)

    @classmethod
    def saved_bytes(cls, config, half):
        return config.intermediate_size * (2 * half + norm_bytes(config))


@arm("kan_grouped", "kan")
class GroupedKAN(PlainKAN):
    """down(phi_hidden(up phi_in(u))), both learned per group; from the identity and from GELU.

    The placement of GR-KAN (Yang & Wang 2024).
    """

    functions = 2

    def __init__(self, config):
        super().__init__(config)
        self.phi_in = self.make_function(config, config.hidden_size, "identity")
        self.phi_hidden = self.make_function(config, config.intermediate_size, "gelu")

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(self.phi_hidden(self.normalize(self.up_proj(self.phi_in(u)))))

    @classmethod
    def check(cls, config):
        super().check(config)
        cls.check_groups(config, "hidden_size")

    @classmethod
    def count_flops(cls, config):
        width, hidden = config.hidden_size, config.intermediate_size
        return (width + hidden) * cls.function_flops(config) + hidden * NORM_FLOPS * config.hidden_norm

    @classmethod
    def saved_bytes(cls, config, half):
        hidden = config.intermediate_size * (2 * half + norm_bytes(config))
        return hidden + 4 * config.hidden_size


class GatedKAN(ChannelKAN):
    """Base of the gated arms, down(phi(gate u) * ...): 3 D h parameters and the coefficients."""

    input_matrices = 2

    def __init__(self, config):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    @classmethod
    def count_parameters(cls, config):
        return 3 * config.hidden_size * config.intermediate_size, cls.count_coefficients(config)


@arm("kan_glu", "kan")
class KANGLU(GatedKAN):
    """down(phi(gate u) * up u): SwiGLU with a learned activation of the gate.

    phi starts as SiLU: `interpolated`, a spline fitted to it, or `residual`, SiLU plus a spline that is
    zero, when the block starts as exactly SwiGLU. With `hidden_norm` both branches are normed first.
    """

    def __init__(self, config):
        super().__init__(config)
        residual = config.kan_glu_form == "residual"
        initial, base = ("zero", "silu") if residual else ("silu", None)
        self.phi = self.make_function(config, config.intermediate_size, initial, base)

    def forward(self, u: Tensor) -> Tensor:
        gate, up = self.normalize(self.gate_proj(u)), self.normalize(self.up_proj(u))
        return self.down_proj(self.phi.gated(gate, up))

    @classmethod
    def count_flops(cls, config):
        residual = 1 + SILU_FLOPS if config.kan_glu_form == "residual" else 0
        norms = 2 * NORM_FLOPS * config.hidden_norm
        return config.intermediate_size * (1 + residual + cls.function_flops(config) + norms)

    @classmethod
    def saved_bytes(cls, config, half):
        return config.intermediate_size * (3 * half + 2 * norm_bytes(config))


@arm("kan_product", "kan")
class ProductKAN(GatedKAN):
    """down(phi(gate u) * psi(up u)), both learned per group; from SiLU and from the identity.

    Starts as SwiGLU. With `hidden_norm` both branches are normed first.
    """

    functions = 2

    def __init__(self, config):
        super().__init__(config)
        self.phi = self.make_function(config, config.intermediate_size, "silu")
        self.psi = self.make_function(config, config.intermediate_size, "identity")

    def forward(self, u: Tensor) -> Tensor:
        gate, up = self.normalize(self.gate_proj(u)), self.normalize(self.up_proj(u))
        return self.down_proj(self.phi.gated(gate, self.psi(up)))

    @classmethod
    def count_flops(cls, config):
        norms = 2 * NORM_FLOPS * config.hidden_norm
        return config.intermediate_size * (1 + 2 * cls.function_flops(config) + norms)

    @classmethod
    def saved_bytes(cls, config, half):
        return config.intermediate_size * (4 * half + 2 * norm_bytes(config))


class EdgeKAN(FeedForward):
    """down(norm(up u)) with `down_proj` a KAN layer; the arms differ in `up_proj`.

    The norm in the middle is an RMSNorm without parameters: it puts the hidden values on the grid, as the
    block's own input is. So `hidden_norm` changes nothing here.
    """

    keeps_casts = False  # recomputed in the backward pass

    def __init__(self, config):
        super().__init__(config)
        self.up_proj: nn.Module = self.make_up_proj(config)
        self.down_proj = self.make_layer(config, config.intermediate_size, config.hidden_size)
        self.down_proj.gain = self.gelu_scale()
        self.down_proj.reset_parameters()

    @classmethod
    def make_up_proj(cls, config) -> nn.Module:
        raise NotImplementedError

    @staticmethod
    def make_layer(config, inputs: int, outputs: int) -> KANLinear:
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

    def forward(self, u: Tensor) -> Tensor:
        hidden = self.up_proj(u)
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
    def edge_parameters(config) -> int:
        """Of one layer: K coefficients an edge, and the weight of the base branch."""
        per_edge = num_basis_functions(config) + (config.kan_base != "none")
        return config.hidden_size * config.intermediate_size * per_edge

    @staticmethod
    def edge_flops(config) -> int:
        """Forward FLOPs for the features of one input of a layer."""
        base = SILU_FLOPS if config.kan_base != "none" else 0
        order = spline_order(config)
        if order is not None:  # the interval, then order + 1 polynomials by Horner's rule
            return base + 3 + (order + 1) * 2 * order
        return base + num_basis_functions(config) * BASIS_FLOPS[config.kan_basis]

    @classmethod
    def saved_bytes(cls, config, half):  # KAN layers keep their inputs and compute the basis again
        return (4 + 2 * half) * config.intermediate_size


@arm("kan", "kan")
class FullKAN(EdgeKAN):
    """Two KAN layers: 2 D h (K + 1) parameters."""

    @classmethod
    def make_up_proj(cls, config):
        return cls.make_layer(config, config.hidden_size, config.intermediate_size)

    @classmethod
    def count_parameters(cls, config):
        return 2 * cls.edge_parameters(config), 0

    @classmethod
    def count_coefficients(cls, config):
        return 2 * config.hidden_size * config.intermediate_size * num_basis_functions(config)

    @classmethod
    def count_flops(cls, config):
        hidden = config.intermediate_size
        return (config.hidden_size + hidden) * cls.edge_flops(config) + NORM_FLOPS * hidden

    @classmethod
    def saved_bytes(cls, config, half):
        return super().saved_bytes(config, half) + 4 * config.hidden_size


@arm("kan_mixed", "kan")
class MixedKAN(EdgeKAN):
    """A matrix, then a KAN layer: D h (K + 2) parameters."""

    @classmethod
    def make_up_proj(cls, config):
        return nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    @classmethod
    def count_parameters(cls, config):
        return config.hidden_size * config.intermediate_size + cls.edge_parameters(config), 0

    @classmethod
    def count_coefficients(cls, config):
        return config.hidden_size * config.intermediate_size * num_basis_functions(config)

    @classmethod
    def count_flops(cls, config):
        return config.intermediate_size * (cls.edge_flops(config) + NORM_FLOPS)


KAN_TYPES = arm_names("kan")
