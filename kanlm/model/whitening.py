# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""Basis functions in other coordinates: of mean zero, variance one, and uncorrelated under assumed inputs.

Raw basis functions are all positive and their neighbours correlated, which a first-order optimiser of their
coefficients feels: it moves the sum of all functions far faster than their differences.

Shapes: n points, I inputs, K basis functions, G grid intervals.
"""

import torch
from torch import Tensor

EVEN_SHARE = 0.1
"""Weight of points spread evenly over the grid intervals, so that no basis function is without data."""


def normal_points(limit: float = 6.0, count: int = 1201) -> tuple[Tensor, Tensor]:
    """Points [count] fp64 on the CPU and their weights under N(0, 1), which sum to one."""
    points = torch.linspace(-limit, limit, count, dtype=torch.float64, device="cpu")
    weights = torch.exp(-points.square() / 2)
    return points, weights / weights.sum()


def even_points(grid: Tensor) -> Tensor:
    """16 points in every interval of grid [G + 1, I]: [16 G, I]."""
    shares = (torch.arange(16, dtype=torch.float64, device=grid.device) + 0.5) / 16
    return grid[:-1].unsqueeze(1).lerp(grid[1:].unsqueeze(1), shares.view(1, -1, 1)).flatten(0, 1)


def assumed_points(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Points [n, I] and weights [n] of 0.9 N(0, 1) + 0.1 even on the intervals of grid [G + 1, I]."""
    normal, weights = (tensor.to(grid.device) for tensor in normal_points())
    even = even_points(grid)
    shares = weights.new_full((len(even),), EVEN_SHARE / len(even))
    points = torch.cat((normal.unsqueeze(-1).expand(-1, grid.shape[-1]), even))
    return points, torch.cat((weights * (1 - EVEN_SHARE), shares))


def moments(basis, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """E[B B^T] [K, K] and E[B] [K] at points [n, I] of weights [n], pooled over inputs."""
    values = basis.values(points)  # [n, K, I]
    weighted = values * (weights / values.shape[-1]).view(-1, 1, 1)
    return torch.einsum("nai,nbi->ab", weighted, values), weighted.sum((0, 2))


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
