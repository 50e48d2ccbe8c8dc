"""B-splines on any ascending knots, each input on its own, and knots that follow samples.

Shapes: ... leading, N samples, I inputs, K basis functions, G grid intervals, k order, n knots.

References: de Boor 1978 (B-splines), Liu et al. 2024, arXiv:2404.19756, section 2.2 (grids from samples).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import initialization as init

from kanlm.fitting.samples import mixture_quantiles
from kanlm.model.basis import BSpline, at_least_fp32, spread


def check_apart(knots: Tensor) -> None:
    """Knots [G + 1, I] must ascend in their own dtype; an interval of no length is 0 / 0."""
    if not (knots.diff(dim=0) > 0).all():
        raise ValueError(
            f"knots: some lie closer than {str(knots.dtype).removeprefix('torch.')} can tell, between "
            f"{float(knots.min()):g} and {float(knots.max()):g}; move them apart (a larger grid_eps, fewer "
            "intervals) or build the layer with dtype=torch.float64"
        )


def adapted_knots(samples: Tensor, grid_size: int, grid_eps: float, least_span: float) -> Tensor:
    """Knots [G + 1, I] from the smallest to the largest sample: quantiles mixed with `grid_eps` uniform ones.

    Strictly ascending also for repeated and constant samples: a range below `least_span`, or too narrow at
    its magnitude for knots in fp32, is widened.
    Liu et al. 2024, arXiv:2404.19756, section 2.2 (grid extension from samples).
    """
    levels = torch.linspace(0, 1, grid_size + 1, dtype=torch.float64, device=samples.device)
    quantiles = mixture_quantiles(samples, levels)
    low, high = quantiles[0], quantiles[-1]
    magnitude = torch.maximum(low.abs(), high.abs())
    margin = ((1e-5 * grid_size * magnitude).clamp(min=least_span) - (high - low)).clamp(min=0) / 2  # [I]
    uniform = (low - margin).lerp(high + margin, levels.unsqueeze(-1))
    # Where the range was widened the quantiles would not reach its ends.
    share = torch.where(margin > 0, 1.0, grid_eps).to(uniform.dtype)
    return quantiles.lerp(uniform, share)


def local_splines(x: Tensor, index: Tensor, knots: Tensor, order: int) -> list[Tensor]:
    """The k + 1 B-splines that are not zero on knot interval `index` [..., I], as polynomials at x [..., I].

    knots [n, I]. The triangular scheme of Cox and de Boor (de Boor 1978, chapter X, eq. 6) from order 0 up.
    """

    def knot(offset: int) -> Tensor:
        return knots.gather(0, (index + offset).reshape(-1, index.shape[-1])).view_as(index)

    left = {j: x - knot(1 - j) for j in range(1, order + 1)}
    right = {j: knot(j) - x for j in range(1, order + 1)}
    splines = [x * 0 + 1]  # NaN where x is
    for j in range(1, order + 1):
        carried, raised = torch.zeros_like(x), []
        for r in range(j):
            share = splines[r] / (right[r + 1] + left[j - r])
            raised.append(carried + right[r + 1] * share)
            carried = left[j - r] * share
        splines = [*raised, carried]
    return splines


def spline_values(x: Tensor, knots: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Values and derivatives [..., K, I] of B-splines of order k on any ascending knots [K + k + 1, I].

    x [..., I]. The grid is knots[order] .. knots[K], both ends included; beyond it values go on linearly.
    """
    last = len(knots) - order - 1
    inside = torch.minimum(torch.maximum(x, knots[order]), knots[last])
    # The interval is the number of inner knots at or below x: the right edge is in the last one.
    inner = knots[order + 1 : last]
    index = (inside.detach().unsqueeze(-2) >= inner).sum(-2) + order  # [..., I]
    pieces = local_splines(inside, index, knots, order)
    if order == 0:
        slopes = [inside * 0]
    else:
        # dB_{m,k}/dx = k (B_{m,k-1} / (t_{m+k} - t_m) - B_{m+1,k-1} / (t_{m+k+1} - t_{m+1}))
        widths = (knots[order:] - knots[:-order]) / order  # [n - k, I]
        first = index - order + 1
        scaled = [
            piece / widths.gather(0, (first + r).reshape(-1, index.shape[-1])).view_as(index)
            for r, piece in enumerate(local_splines(inside, index, knots, order - 1))
        ]
        slopes = [-scaled[0], *(a - b for a, b in zip(scaled, scaled[1:], strict=False)), scaled[-1]]
    pieces = [piece + (x - inside) * slope for piece, slope in zip(pieces, slopes, strict=True)]
    return spread(index - order, pieces, last), spread(index - order, slopes, last)


def divided(knots: Tensor, grid_size: int) -> Tensor:
    """Knots [G + 1, I] made `grid_size` + 1 by dividing the intervals in proportion."""
    last = len(knots) - 1
    position = torch.linspace(0, last, grid_size + 1, dtype=torch.float64, device=knots.device)
    below = position.floor().clamp(max=last - 1).long()
    wide = knots.double()
    return wide[below].lerp(wide[below + 1], (position - below).unsqueeze(-1)).to(knots.dtype)


class KnotSpline(nn.Module):
    """B-splines of order k on knots [G + 1, I] of each input; k more knots lie on either side, evenly.

    It has what a `Basis` has. The knots are a buffer, which stays fp32 where the module is cast to half
    precision.

    Args:
        uniform: number of intervals, order and range at the start.
        knots: [G + 1, I].
        start: the knots at the start, fp64 [G + 1, 1] on the CPU; the uniform ones if not given.
    """

    knots: Tensor

    def __init__(self, uniform: BSpline, knots: Tensor, start: Tensor | None = None):
        super().__init__()
        self.uniform = uniform
        self.start = uniform.grid_points() if start is None else start
        self.register_buffer("knots", knots)

    @property
    def order(self) -> int:
        return self.uniform.order

    @property
    def grid_size(self) -> int:
        return self.uniform.grid_size

    @property
    def num_functions(self) -> int:
        return self.uniform.num_functions

    @torch.no_grad()
    def reset(self) -> None:
        """The knots of the start; loaded ones are left alone."""
        init.copy_(self.knots, self.start.expand_as(self.knots))

    def at_start(self) -> KnotSpline:
        """The splines of the start, fp64 on the CPU, as one input has them."""
        return KnotSpline(self.uniform, self.start, self.start)

    def with_knots(self, knots: Tensor) -> KnotSpline:
        return KnotSpline(self.uniform, knots, self.start)

    def refined(self, grid_size: int) -> KnotSpline:
        uniform = dataclasses.replace(self.uniform, grid_size=grid_size)
        return KnotSpline(uniform, divided(self.knots, grid_size), divided(self.start, grid_size))

    def grid_points(self) -> Tensor:
        """The G + 1 ends of the intervals of each input, fp64 [G + 1, I]."""
        return self.knots.double()

    def values(self, x: Tensor) -> Tensor:
        """B_m(x): x [..., I] to [..., K, I], fp32 or fp64."""
        return spline_values(at_least_fp32(x), self._all_knots(), self.order)[0]

    def derivatives(self, x: Tensor) -> Tensor:
        """dB_m/dx: x [..., I] to [..., K, I], fp32 or fp64."""
        return spline_values(at_least_fp32(x), self._all_knots(), self.order)[1]

    def _all_knots(self) -> Tensor:
        """[G + 1 + 2 k, I]."""
        knots = self.knots
        step = (knots[-1] - knots[0]) / (len(knots) - 1)
        count = torch.arange(1, self.order + 1, device=knots.device, dtype=knots.dtype)
        steps = count.unsqueeze(-1) * step
        return torch.cat((knots[0] - steps.flip(0), knots, knots[-1] + steps))

    def _apply(self, fn, recurse=True):
        before = self.knots
        super()._apply(fn, recurse)
        if at_least_fp32(self.knots[:0]).dtype != self.knots.dtype:
            self.knots = before.to(self.knots.device)
        if before.dtype != self.knots.dtype and not self.knots.is_meta:
            check_apart(self.knots)
        return self
