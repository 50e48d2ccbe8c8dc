"""A KAN layer with knots of its own for each input, which follow samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kanlm.fitting.knots import KnotSpline, adapted_knots, check_apart
from kanlm.fitting.refit import change_basis
from kanlm.fitting.samples import finite_samples
from kanlm.model.basis import BSpline, at_least_fp32
from kanlm.model.kan import KANLinear


class AdaptiveKAN(KANLinear):
    """KANLinear of B-splines whose knots [G + 1, I], the buffer `basis.knots`, `update_grid` may move.

    Args:
        knots: G + 1 ascending grid points that all inputs start with, instead of grid_size, grid_min and
            grid_max.
        more: of KANLinear: base, conditioning, spline_share, gain.

    Raises:
        ValueError: as KANLinear; knots that do not ascend.
    """

    basis: KnotSpline  # type: ignore[assignment]  # has what a layer asks of a Basis

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        grid_size: int = 5,
        order: int = 3,
        grid_min: float = -3.0,
        grid_max: float = 3.0,
        knots: Sequence[float] | None = None,
        device=None,
        dtype=None,
        **more,
    ):
        if knots is not None:
            knots = [float(knot) for knot in knots]
            if len(knots) < 2 or not all(low < high for low, high in zip(knots, knots[1:], strict=False)):
                raise ValueError(
                    f"knots: must be at least 2 and ascend without repetition, got {knots}; sort them"
                )
            grid_size, grid_min, grid_max = len(knots) - 1, knots[0], knots[-1]
        uniform = BSpline(grid_size, float(grid_min), float(grid_max), order)
        wide = at_least_fp32(torch.empty(0, dtype=dtype)).dtype
        start = None
        if knots is not None:
            start = torch.tensor(knots, dtype=torch.float64, device="cpu").unsqueeze(-1)
            check_apart(start.to(wide))
        own = torch.empty(
            grid_size + 1, max(in_features, 1), dtype=wide, device=device
        )  # 0 is KANLinear's error
        basis = KnotSpline(uniform, own, start)
        features: Any = basis
        super().__init__(in_features, out_features, features, device=device, dtype=dtype, **more)

    @property
    def knots(self) -> Tensor:
        return self.basis.knots

    @torch.no_grad()
    def reset_parameters(self) -> None:  # type: ignore[override]
        """Initial knots, whitening and weights; tensors that transformers has loaded are left alone."""
        self.basis.reset()
        start: Any = self.basis.at_start()
        super().reset_parameters(start)

    @torch.no_grad()
    def update_grid(self, samples: Tensor, grid_eps: float = 0.02) -> float:
        """Move the knots to the samples [..., I] of all ranks and refit the coefficients by least squares.

        Knots run from the smallest to the largest sample of each input: quantiles, mixed with `grid_eps` of a
        uniform grid. Returns the drift as `refine` does. Grids and coefficients are equal on every rank. A
        whitened layer is whitened under the samples. One far sample stretches the intervals beyond the
        others, which the drift shows; leave such samples out.

        Raises:
            ValueError: grid_eps outside (0, 1] or so small that repeated samples leave intervals of no
                length, samples that are not finite, or none.
        """
        if not 0 < grid_eps <= 1:
            raise ValueError(
                f"grid_eps: must lie in (0, 1], got {grid_eps}; 0.02 is nearly quantiles, 1 is uniform"
            )
        samples = finite_samples(samples, self.in_features)
        uniform = self.basis.uniform
        least_span = 1e-3 * (uniform.grid_max - uniform.grid_min)
        knots = adapted_knots(samples, uniform.grid_size, grid_eps, least_span)
        return change_basis(self, self.basis.with_knots(knots.to(self.knots.dtype)), samples)
