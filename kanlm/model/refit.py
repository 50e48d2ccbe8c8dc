# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""Statistics of samples and stable least squares, equal on every rank of a distributed run.

Shapes: N samples, I inputs, K basis functions, G grid intervals, Q stored quantiles.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .basis import Basis, KnotSpline

STORED_QUANTILES = 1025
"""Points of a rank's empirical quantile function that are exchanged; knots are read from their mixture."""

EVEN_SHARE = 0.1
"""Weight of points spread evenly over the grid intervals, so that no basis function is without data."""


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks; x itself in a single process."""
    if is_distributed():
        x = x.clone()
        dist.all_reduce(x)
    return x


def finite_samples(samples: Tensor, inputs: int) -> Tensor:
    """samples [..., I] as fp64 [N, I].

    Raises, on every rank if on one:
        ValueError: another last dimension, or values that are not finite.
    """
    misshapen, broken = samples.shape[-1:] != (inputs,), (~samples.isfinite()).sum()
    counts = torch.stack((broken, *(broken.new_tensor(count) for count in (samples.numel(), misshapen))))
    broken, values, misshapen_ranks = summed_over_ranks(counts).tolist()
    if misshapen_ranks:
        raise ValueError(
            f"samples: the last dimension must be in_features {inputs}, got shape {tuple(samples.shape)}"
            + (
                "; pass what goes into the layer"
                if misshapen
                else f" here, but another on {misshapen_ranks} rank(s)"
            )
        )
    if broken:
        raise ValueError(
            f"samples: {broken} of {values} values are not finite; a refit needs finite values, "
            "so find the step that made them"
        )
    return samples.detach().reshape(-1, inputs).double()


def mixture_quantiles(samples: Tensor, levels: Tensor) -> Tensor:
    """Quantiles [levels, I] of the samples [N, I] of all ranks together.

    Each rank sends Q quantiles and its sample count; the quantiles of their weighted mixture are exact at the
    minimum and maximum and within 1/(Q-1) in rank elsewhere.

    Raises:
        ValueError: no samples on any rank.
    """
    counts = samples.new_tensor([len(samples)])
    points = torch.linspace(0, 1, STORED_QUANTILES, dtype=samples.dtype, device=samples.device)
    if len(samples):
        # quantile() is limited to 2^24 values, sorted columns are not.
        position = points * (len(samples) - 1)
        below = position.floor().long()
        above = (below + 1).clamp(max=len(samples) - 1)
        ordered = samples.sort(dim=0).values
        stored = ordered[below].lerp(ordered[above], (position - below).unsqueeze(-1))  # [Q, I]
    else:
        stored = samples.new_zeros(STORED_QUANTILES, samples.shape[-1])
    if is_distributed():
        gathered = [torch.empty_like(stored) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, stored.contiguous())
        all_counts = [torch.empty_like(counts) for _ in gathered]
        dist.all_gather(all_counts, counts)
        stored, counts = torch.stack(gathered), torch.cat(all_counts)
    else:
        stored = stored.unsqueeze(0)  # [ranks, Q, I]
    kept = counts > 0
    if not kept.any():
        raise ValueError("samples: got none; a grid needs at least one sample")
    stored, counts = stored[kept], counts[kept]
    if len(stored) == 1:
        values, ranks = stored[0], points.unsqueeze(-1).expand_as(stored[0]).contiguous()
    else:
        weights = (counts / counts.sum()).view(-1, 1, 1).expand_as(stored).flatten(0, 1)
        values, order = stored.flatten(0, 1).sort(dim=0, stable=True)
        mass = weights.gather(0, order).cumsum(0)
        ranks = (mass - mass[:1]) / (mass[-1:] - mass[:1])  # [ranks * Q, I], from 0 to 1
    above = torch.searchsorted(ranks.t().contiguous(), levels.expand(ranks.shape[-1], -1).contiguous())
    above = above.t().clamp(1, len(ranks) - 1)  # [levels, I]
    low, high = ranks.gather(0, above - 1), ranks.gather(0, above)
    share = ((levels.unsqueeze(-1) - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    return values.gather(0, above - 1).lerp(values.gather(0, above), share)


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


def share_of_samples(samples: Tensor) -> Tensor:
    """One over the number of samples [N, I] on all ranks together.

    Raises:
        ValueError: no samples on any rank.
    """
    count = summed_over_ranks(samples.new_tensor(float(len(samples)), dtype=torch.float64))
    if not count > 0:
        raise ValueError("samples: got none; a refit needs at least one sample")
    return 1 / count


def whitening_map(second: Tensor, mean: Tensor, constant_scale: float) -> Tensor:
    """W [K, K] for which psi = W B is white, from second = E[B B^T] [K, K] and mean = E[B] [K].

    psi_0 is the part of the constant function that the basis can represent, times `constant_scale`; all
    others have mean zero, variance one, and are uncorrelated. For a basis that sums to one psi_0 is
    constant. W is (a reflection that brings the constant first) second^(-1/2): invertible, and otherwise as
    local as can be.
    """
    eigenvalues, vectors = torch.linalg.eigh(second)
    root = vectors @ torch.diag(eigenvalues.clamp_min(1e-12 * eigenvalues[-1]).rsqrt()) @ vectors.t()
    constant = root @ mean
    constant = constant / constant.norm()
    axis = torch.zeros_like(constant)
    # The sign keeps the reflection away from cancellation.
    axis[0] = 1.0 if constant[0] <= 0 else -1.0
    mirror = constant - axis
    identity = torch.eye(len(axis), dtype=root.dtype, device=root.device)
    white = (identity - 2 * torch.outer(mirror, mirror) / mirror.dot(mirror)) @ root * axis[0]
    white[0] *= constant_scale
    return white


def check_finer(grid_size: int, present: int, allow_coarsen: bool):
    if grid_size < present and not allow_coarsen:
        raise ValueError(
            f"grid_size: {grid_size} is coarser than the present {present}, which loses detail; pass "
            "allow_coarsen=True if that is meant"
        )


def basis_grid(basis: Basis | KnotSpline) -> Tensor:
    """The ends of the grid intervals, fp64 [G + 1, I], or [G + 1, 1] where all inputs share them."""
    if isinstance(basis, Basis):
        return basis.grid_points()
    return basis.knots[basis.order : len(basis.knots) - basis.order]


def even_points(grid: Tensor) -> Tensor:
    """16 points in every interval of grid [G + 1, I]: fp64 [16 G, I]."""
    shares = (torch.arange(16, dtype=torch.float64, device=grid.device) + 0.5) / 16
    return grid[:-1].unsqueeze(1).lerp(grid[1:].unsqueeze(1), shares.view(1, -1, 1)).flatten(0, 1)


def near_grid(samples: Tensor, grid: Tensor) -> Tensor:
    """samples [N, I], those beyond the ends of grid [G + 1, I] moved to at most its width away from it.

    A function is linear out there, which two points show as well as any others; values of 1e7 in a fit would
    leave nothing of the precision for the grid.
    """
    low, high = grid[0], grid[-1]
    return samples.clamp(2 * low - high, 2 * high - low)


def assumed_points(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Points [n, I] and weights [n] of 0.9 N(0, 1) + 0.1 even on the intervals of grid [G + 1, I]."""
    normal, weights = (tensor.to(grid.device) for tensor in normal_points())
    even = even_points(grid)
    points = torch.cat((normal.unsqueeze(-1).expand(-1, grid.shape[-1]), even))
    return points, torch.cat(
        (weights * (1 - EVEN_SHARE), weights.new_full((len(even),), EVEN_SHARE / len(even)))
    )


def normal_points(limit: float = 6.0, count: int = 1201) -> tuple[Tensor, Tensor]:
    """Points [count] fp64 on the CPU and their weights under N(0, 1), which sum to one."""
    points = torch.linspace(-limit, limit, count, dtype=torch.float64, device="cpu")
    weights = torch.exp(-points.square() / 2)
    return points, weights / weights.sum()
