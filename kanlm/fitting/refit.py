"""A layer on a finer grid or in other coordinates, its functions kept: least squares, equal on every rank.

Shapes: N samples, n points, I inputs, O outputs, K basis functions, G grid intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kanlm.fitting.knots import KnotSpline, check_apart
from kanlm.fitting.samples import finite_samples, share_of_samples, summed_over_ranks
from kanlm.model.basis import Basis, BSpline, Chebyshev, Fourier, at_least_fp32
from kanlm.model.kan import KANLinear, LearnedFunction
from kanlm.model.whitening import EVEN_SHARE, assumed_points, even_points, moments, whitening_map

AnyBasis: TypeAlias = Basis | KnotSpline
BATCH_VALUES = 2**20
"""Basis values of samples that are alive at once."""


@torch.no_grad()
def refine(
    layer: KANLinear, grid_size: int, samples: Tensor | None = None, allow_coarsen: bool = False
) -> float:
    """Change the layer's grid to `grid_size` intervals and refit the coefficients by least squares.

    Exact where the new functions contain the old: for splines at a multiple of the present size (adaptive
    intervals are divided in proportion), for Chebyshev and Fourier at any larger one. Otherwise the fit is to
    points of every interval and to samples [..., I] of all ranks, where given; those further outside the grid
    than its width count as at that distance. `spline.weight` becomes a new parameter: build optimisers anew.

    Returns:
        The drift, rms(new output - old output) / rms(old output), the largest of three: on the samples, over
        the new grid, and over the old grid as far as the new one reaches.

    Raises:
        ValueError: fewer intervals without `allow_coarsen`, grid_size < 1, more intervals than the knots'
            dtype can hold apart, samples that are not finite, or none.
    """
    old = layer.basis
    check_finer(grid_size, old.grid_size, allow_coarsen)
    basis = refined(old, grid_size)
    if samples is not None:
        samples = finite_samples(samples, layer.in_features)
    return change_basis(layer, basis, samples, is_exact=contains(basis, old))


@torch.no_grad()
def refine_function(layer: LearnedFunction, grid_size: int, allow_coarsen: bool = False) -> float:
    """Change the grid to `grid_size` intervals and refit the coefficients by least squares over the grid.

    Multiples of the present size keep B-spline functions exactly. `coefficients` becomes a new parameter:
    build optimisers anew. Returns the drift, rms(new - old) / rms(old) of the learned functions on the grid.

    Raises:
        ValueError: fewer intervals without `allow_coarsen`, grid_size < 1, a rational function.
    """
    if layer.is_rational:
        raise ValueError("basis: a 'rational' function has no grid to refine; choose a spline basis")
    old, weight = layer.basis, layer.coefficients
    check_finer(grid_size, old.grid_size, allow_coarsen)
    basis = dataclasses.replace(old, grid_size=grid_size)
    points = even_points(basis.grid_points()).to(weight.device)
    new_values, old_values = basis.values(points), old.values(points)  # [points, K, 1]
    even = points.new_full((len(points),), 1 / len(points))
    mapping = refit_map([(new_values, old_values, even)]).squeeze(0)  # [K_new, K_old]
    plain = weight.double()
    before = plain @ old_values.squeeze(-1).t()
    change = plain @ mapping.t() @ new_values.squeeze(-1).t() - before
    layer.basis = basis
    layer.coefficients = nn.Parameter(
        (plain @ mapping.t()).to(weight.dtype), requires_grad=weight.requires_grad
    )
    return float(change.norm() / before.norm().clamp_min(1e-300))


@torch.no_grad()
def whiten(layer: KANLinear, samples: Tensor | None = None) -> None:
    """Whiten the features under samples [..., I] of all ranks, or the assumed input; keeps the functions.

    The distribution is 0.9 of the samples, pooled over inputs, and 0.1 spread evenly over the grid intervals.
    Samples further outside the grid than its width count as at that distance.

    Raises:
        ValueError: samples that are not finite, or none.
    """
    if samples is not None:
        samples = finite_samples(samples, layer.in_features)
    plain = plain_coefficients(layer)
    layer.whitening = whitening_of(layer, samples)
    set_coefficients(layer, plain)


def check_finer(grid_size: int, present: int, allow_coarsen: bool) -> None:
    if grid_size < present and not allow_coarsen:
        raise ValueError(
            f"grid_size: {grid_size} is coarser than the present {present}, which loses detail; pass "
            "allow_coarsen=True if that is meant"
        )


def refined(basis: AnyBasis, grid_size: int) -> AnyBasis:
    """The basis of `grid_size` intervals on the same range."""
    if isinstance(basis, KnotSpline):
        return basis.refined(grid_size)
    return dataclasses.replace(basis, grid_size=grid_size)


def contains(finer: AnyBasis, coarser: AnyBasis) -> bool:
    """Whether every function of `coarser` is one of `finer`, of the same kind on the same range."""
    if isinstance(finer, BSpline | KnotSpline):
        return finer.grid_size % coarser.grid_size == 0
    if isinstance(finer, Chebyshev | Fourier):
        return finer.grid_size >= coarser.grid_size
    return finer.grid_size == coarser.grid_size


def change_basis(layer: KANLinear, basis: AnyBasis, samples: Tensor | None, is_exact: bool = False) -> float:
    """Give the layer `basis`, refit its coefficients on samples [N, I] and return the drift.

    is_exact: the new functions contain the old, so any points give the same fit; even ones, which are the
    best conditioned, do.
    """
    if isinstance(basis, KnotSpline):
        check_apart(basis.knots)
    weight = layer.spline.weight
    old, new, plain = in_fp64(layer.basis), in_fp64(basis), plain_coefficients(layer)
    grid = new.grid_points().to(weight.device)
    # Far samples alone would hide what a refit does to the functions on the grid.
    old_points = even_points(old.grid_points().to(grid.device)).clamp(grid[0], grid[-1])
    probes = [
        probe.expand(-1, layer.in_features).to(weight.dtype) for probe in (even_points(grid), old_points)
    ]
    if samples is not None:
        share_of_samples(samples)  # none on any rank is an error
        probes.append(samples.to(weight.dtype))
    before = [layer(probe).double() for probe in probes]
    mapping = refit_map(
        (new.values(points), old.values(points), weights)
        for points, weights in fit_points(layer, None if is_exact else samples, grid)
    ).expand(layer.in_features, -1, -1)

    layer.basis = basis  # type: ignore[assignment]  # knots in place of a uniform grid
    if layer.whitening is not None:
        layer.whitening = whitening_of(layer, samples)
    set_coefficients(layer, torch.einsum("iab,obi->oai", mapping, plain))
    pairs = [(layer(probe).double(), then) for probe, then in zip(probes, before, strict=True)]
    squares = torch.stack(
        [torch.stack(((y - then).square().sum(), then.square().sum())) for y, then in pairs]
    )
    squares = summed_over_ranks(squares)  # [probes, 2]
    return float((squares[:, 0] / squares[:, 1].clamp_min(1e-300)).max().sqrt())


def refit_map(batches) -> Tensor:
    """The map T [I, K_new, K_old] for which T c is the least-squares refit of coefficients c.

    `batches` yields (new [N, K_new, I], old [N, K_old, I], weights [N]): values of both bases at the same
    points. T minimises sum_n w_n (new_n . c' - old_n . c)^2 over the batches of all ranks. Directions of c'
    that the points do not show, below 1e-14 of the largest after each function is scaled to norm one, stay
    as small as can be, so that any data have one solution.
    """
    gram = cross = torch.zeros((), dtype=torch.float64, device="cpu")  # joins tensors of any device
    for new, old, weights in batches:
        weighted = new * weights.view(-1, 1, 1)
        gram = gram + torch.einsum("nai,nbi->iab", weighted, new)
        cross = cross + torch.einsum("nai,nbi->iab", weighted, old)
    gram, cross = summed_over_ranks(gram), summed_over_ranks(cross)
    squares = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # [I, K_new, 1]
    scale = torch.where(squares > 0, squares, 1.0).rsqrt()
    values, vectors = torch.linalg.eigh(gram * scale * scale.mT)
    inverse = torch.where(values > 1e-14 * values[..., -1:], 1 / values, 0.0).unsqueeze(-1)
    return scale * (vectors @ (inverse * (vectors.mT @ (cross * scale))))


def near_grid(samples: Tensor, grid: Tensor) -> Tensor:
    """samples [N, I], those beyond the ends of grid [G + 1, I] moved to at most its width away from it.

    A function is linear out there, which two points show as well as any others; values of 1e7 in a fit would
    leave nothing of the precision for the grid.
    """
    low, high = grid[0], grid[-1]
    return samples.clamp(2 * low - high, 2 * high - low)


def in_fp64(basis: AnyBasis) -> AnyBasis:
    return basis.with_knots(basis.knots.double()) if isinstance(basis, KnotSpline) else basis


def fit_points(layer: KANLinear, samples: Tensor | None, grid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of points [n, I] and weights [n] that sum to one over all ranks.

    0.9 of the weight on the samples [N, I] and 0.1 even on the intervals of grid [G + 1, I], so that every
    function has data; without samples all of it.
    """
    even = even_points(grid)
    if samples is not None:  # of one shape on all ranks, also on one without samples
        even = even.expand(-1, layer.in_features)
    even_share = 1.0 if samples is None else EVEN_SHARE
    yield even, (share_of_samples(even) * even_share).expand(len(even))
    if samples is not None:
        weight = share_of_samples(samples) * (1 - EVEN_SHARE)
        rows = max(128, BATCH_VALUES // (layer.num_functions * layer.in_features))
        for batch in samples.split(rows):
            yield near_grid(batch, grid), weight.expand(len(batch))


def whitening_of(layer: KANLinear, samples: Tensor | None) -> Tensor:
    """The buffer `whitening` for the present grid under samples [N, I] of all ranks or the assumed input."""
    basis, weight = in_fp64(layer.basis), layer.spline.weight
    grid = basis.grid_points().to(weight.device)
    if samples is None:
        second, mean = moments(basis, *assumed_points(grid))
    else:
        second, mean = pooled_moments(basis, fit_points(layer, samples, grid))
    white = whitening_map(second, mean, layer.in_features**-0.5)
    return white.to(at_least_fp32(weight[:0]).dtype)


def pooled_moments(basis: AnyBasis, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`moments` of the batches of all ranks together."""
    second = mean = torch.zeros((), dtype=torch.float64, device="cpu")  # joins tensors of any device
    for points, weights in batches:
        batch_second, batch_mean = moments(basis, points, weights)
        second, mean = second + batch_second, mean + batch_mean
    return summed_over_ranks(second), summed_over_ranks(mean)


def plain_coefficients(layer: KANLinear) -> Tensor:
    """Coefficients of the basis functions, fp64 [O, K, I]."""
    weight = layer.spline.weight.double().unflatten(-1, (-1, layer.in_features))
    if layer.whitening is None:
        return weight
    return torch.einsum("oji,jm->omi", weight, layer.whitening.double())


def set_coefficients(layer: KANLinear, plain: Tensor) -> None:
    """Set the functions to those of coefficients [O, K, I] of the basis functions."""
    if layer.whitening is not None:
        plain = torch.einsum("omi,mj->oji", plain, torch.linalg.inv(layer.whitening.double()))
    old = layer.spline.weight
    weight = plain.flatten(1).to(old.dtype)
    if weight.shape == old.shape:
        old.copy_(weight)
    else:
        layer.spline = nn.Linear(weight.shape[1], layer.out_features, bias=False, device="meta")
        layer.spline.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
