# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""A KAN layer: a learned function per edge (`KANLinear`). `LearnedFunction` has one per group of channels.

Shapes: ... leading, I inputs, O outputs, K basis functions.

Reference: Liu et al. 2024, arXiv:2404.19756, eq. 2.10 (an edge: a fixed base function plus a spline).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .basis import BASES, Basis, ExactBuffers, at_least_fp32, check_choice, exact_product, make_basis
from .learned_function import SILU_FLOPS, LearnedFunction
from .whitening import assumed_points, moments, normal_points, whitening_map


class KANLinear(ExactBuffers):
    """y_o = sum_i phi_oi(x_i), phi_oi(x) = w_oi b(x) + sum_m c_oim B_m(x): x [..., I] to y [..., O].

    The coefficients c are the weight of the child `spline`, an nn.Linear(K*I -> O) whose input has the
    inputs of one basis function side by side: `spline.weight.view(O, K, I)`. The weights w are those of the
    child `base`, an nn.Linear(I -> O), absent with base=None. Parameters: O I (K + 1), or O I K without a
    base.

    Whitened layers have the same functions in other coordinates: features psi = W B(x), W the buffer
    `whitening` [K, K]; see `whitening.whitening_map`. As every input has psi_0, the constant function, it is
    scaled by I^(-1/2), so that all together they count as one.

    Args:
        basis: a name, see `basis.make_basis`, or an object with the methods and sizes of a `Basis`.
        grid_size, order, grid_min, grid_max: see `basis.make_basis`.
        base: "silu" or None, the fixed function b.
        conditioning: "none" or "whitened".
        spline_share: share of the output's variance that the splines have at the start; 0 starts them at
            zero. All of it without a base. Random splines are steep: at half, gradients grow more
            than a hundred thousand times through 24 whitened layers, at the default less than twentyfold.
        gain: standard deviation of the output at the start, for independent inputs of distribution N(0, 1).

    Raises:
        ValueError: see `make_basis`; sizes below 1; unknown names; a share outside 0..1; a last dimension
            of x that is not I.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis: str | Basis = "bspline",
        *,
        grid_size: int = 5,
        order: int = 3,
        grid_min: float = -3.0,
        grid_max: float = 3.0,
        base: str | None = "silu",
        conditioning: str = "none",
        spline_share: float = 0.05,
        gain: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        sizes = in_features, out_features
        if min(sizes) < 1:
            raise ValueError(f"in_features, out_features: must be at least 1, got {sizes}")
        if not 0 <= spline_share <= 1:
            raise ValueError(f"spline_share: a share lies in 0..1, got {spline_share}; 0.05 is the default")
        check_choice("base", base, ("silu", None))
        check_choice("conditioning", conditioning, ("none", "whitened"))
        if isinstance(basis, str):
            check_choice("basis", basis, BASES)
            basis = make_basis(basis, grid_size, order, grid_min, grid_max)
        self.in_features, self.out_features, self.basis = in_features, out_features, basis
        self.spline_share, self.gain = spline_share, gain
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.spline = nn.Linear(self.num_functions * in_features, out_features, **factory)
        self.base = nn.Linear(in_features, out_features, **factory) if base else None
        wide = torch.promote_types(self.spline.weight.dtype, torch.float32)
        square = torch.empty(self.num_functions, self.num_functions, device=device, dtype=wide)
        self.whitening: Tensor | None
        self.register_buffer("whitening", square if conditioning == "whitened" else None)
        self.kernel = None  # only kernels.select of the package kanlm sets it
        self.reset_parameters()

    @property
    def num_functions(self) -> int:
        """K, basis functions of an input."""
        return self.basis.num_functions

    @property
    def flops(self) -> int:
        """Forward FLOPs at one input outside the matrices."""
        return self.basis.values_flops + (SILU_FLOPS if self.base is not None else 0)

    @property
    def conditioning(self) -> str:
        return "none" if self.whitening is None else "whitened"

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.basis}, conditioning={self.conditioning}"

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: the last dimension must be in_features {self.in_features}, got shape {tuple(x.shape)}; "
                "pass x [..., in_features] or build the layer for it"
            )
        if self.kernel is not None:
            return self.kernel(self, x)
        return self.reference(x)

    def reference(self, x: Tensor) -> Tensor:
        """The definition, which every kernel is tested against."""
        y = self.spline(self.features(x).flatten(-2).to(x.dtype))
        return y if self.base is None else self.base(F.silu(x)) + y

    def features(self, x: Tensor) -> Tensor:
        """What the coefficients multiply, B(x) or W B(x): x [..., I] to [..., K, I], fp32 or fp64."""
        values = self.basis.values(x)
        return values if self.whitening is None else exact_product(self.whitening.to(values.dtype), values)

    def plain_weight(self) -> Tensor:
        """The coefficients of the basis functions themselves, [O, K*I], differentiable.

        `spline.weight` itself, or in fp32 at least where the layer is whitened: c^T (W B) = (W^T c)^T B.
        """
        weight = self.spline.weight
        if self.whitening is None:
            return weight
        wide = at_least_fp32(weight).unflatten(-1, (-1, self.in_features))  # [O, K, I]
        return exact_product(self.whitening.t().to(wide.dtype), wide).flatten(1)

    @torch.no_grad()
    def reset_parameters(self, basis: Basis | None = None):
        """Initial whitening and weights; tensors that transformers has loaded are left alone.

        basis: the features at the start, where they are not those of `self.basis`.
        """
        basis = basis or self.basis
        points, weights = normal_points()
        values = basis.values(points.unsqueeze(-1))[..., 0]  # [points, K]
        if self.whitening is not None:
            second, mean = moments(basis, *assumed_points(basis.grid_points()))
            white = whitening_map(second, mean, self.in_features**-0.5)
            init.copy_(self.whitening, white)
            values = values @ white.t()
        # Each part's variance at N(0, 1) inputs is std^2 times inputs times the mean square of its features.
        share = self.spline_share if self.base is not None else 1.0
        energy = float((values.square().sum(-1) * weights).sum())
        init.normal_(self.spline.weight, std=self.gain * math.sqrt(share / (self.in_features * energy)))
        if self.base is not None:
            energy = float((F.silu(points).square() * weights).sum())
            std = self.gain * math.sqrt((1 - share) / (self.in_features * energy))
            init.normal_(self.base.weight, std=std)


__all__ = ["KANLinear", "LearnedFunction"]
