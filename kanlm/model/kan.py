# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""A KAN layer: a learned function per edge (`KANLinear`). `LearnedFunction` has one per group of channels.

Shapes: ... leading, N rows (all leading dimensions together), I inputs, O outputs, K basis functions, G grid
intervals, k order.

Reference: Liu et al. 2024, arXiv:2404.19756, eq. 2.10 (an edge: a fixed base function plus a spline).
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .basis import (
    Basis,
    BSpline,
    KnotSpline,
    WhiteBasis,
    at_least_fp32,
    exact_product,
    make_basis,
    row_chunks,
)
from .learned_function import LearnedFunction
from .refit import (
    EVEN_SHARE,
    adapted_knots,
    assumed_points,
    basis_grid,
    check_finer,
    even_points,
    finite_samples,
    near_grid,
    normal_points,
    refit_map,
    share_of_samples,
    summed_over_ranks,
    whitening_map,
)


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x and weight here: autocast's where it is on."""
    kind = x.device.type
    if weight.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a call of `layer` is the product with its weight and no more.

    It is more with an adapter (LoRA), a quantised or sharded weight, any hook, or weights that are offloaded.
    """
    if type(layer) is not nn.Linear or type(layer._parameters.get("weight")) is not nn.Parameter:
        return False
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return "forward" not in vars(layer) and not any(hooks)


def check_apart(knots: Tensor):
    """Knots [G + 1, I] must ascend in their own dtype; an interval of no length is 0 / 0."""
    if not (knots.diff(dim=0) > 0).all():
        raise ValueError(
            f"knots: some lie closer than {str(knots.dtype).removeprefix('torch.')} can tell, between "
            f"{float(knots.min()):g} and {float(knots.max()):g}; move them apart (a larger grid_eps, fewer "
            "intervals) or build the layer with dtype=torch.float64"
        )


class _RecomputedSpline(torch.autograd.Function):
    """start [N, O] or 0, plus features(x) [N, K*I] times weight [O, K*I], in chunks of rows.

    Saves x and computes its features again in backward. `basis` has their `values` and `derivatives`.
    """

    @staticmethod
    def forward(ctx, x, weight, start, layer, basis, dtype):
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.basis, ctx.dtype = layer, basis, dtype
        weight = weight.to(dtype)
        y = x.new_empty(len(x), len(weight), dtype=dtype)
        for rows in layer._chunks(x):
            features = basis.values(x[rows]).flatten(-2).to(dtype)
            if start is None:
                torch.mm(features, weight.t(), out=y[rows])
            else:
                torch.addmm(start[rows], features, weight.t(), out=y[rows])
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        layer, basis, dtype = ctx.layer, ctx.basis, ctx.dtype
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_start = grad if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # create_graph=True: second derivatives are those of the plain formula
            y = F.linear(basis.values(x).flatten(-2).to(dtype), weight.to(dtype))
            wanted = [tensor for tensor, needed in ((x, needs_x), (weight, needs_weight)) if needed]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            grad_x, grad_weight = next(found) if needs_x else None, next(found) if needs_weight else None
            return grad_x, grad_weight, grad_start, None, None, None
        grad, cast_weight = grad.to(dtype), weight.to(dtype)
        grad_x = torch.empty_like(x) if needs_x else None
        # Sums over chunks are kept in fp32 at least.
        total = torch.zeros_like(weight, dtype=at_least_fp32(weight[:0]).dtype) if needs_weight else None
        for rows in layer._chunks(x):
            if needs_weight:
                features = basis.values(x[rows]).flatten(-2).to(dtype)
                if total.dtype == dtype:
                    total.addmm_(grad[rows].t(), features)
                else:
                    total += grad[rows].t() @ features
            if needs_x:
                grad_features = at_least_fp32(grad[rows] @ cast_weight).unflatten(-1, (-1, layer.in_features))
                grad_x[rows] = (grad_features * basis.derivatives(x[rows])).sum(-2).to(x.dtype)
        return grad_x, total.to(weight.dtype) if needs_weight else None, grad_start, None, None, None


class KANLinear(nn.Module):
    """y_o = sum_i phi_oi(x_i), phi_oi(x) = w_oi b(x) + sum_m c_oim B_m(x): x [..., I] to y [..., O].

    The coefficients c are the weight of the child `spline`, an nn.Linear(K*I -> O) whose input has the
    inputs of one basis function side by side: `spline.weight.view(O, K, I)`. The weights w are those of the
    child `base`, an nn.Linear(I -> O), absent with base=None. Parameters: O I (K + 1), or O I K without a
    base.

    Whitened layers have the same functions in other coordinates: features psi = W B(x), W the buffer
    `whitening` [K, K], of mean zero, variance one and uncorrelated under the assumed input, 0.9 N(0, 1) +
    0.1 spread over the grid, or under samples (`whiten`). psi_0 is the part of the constant function that
    the basis has; as every input has it, it is scaled by I^(-1/2), so that all together they count as one.

    Adaptive layers have knots of their own for each input, in the buffer `knots` [G + 1, I]. Both buffers
    stay fp32 where the layer is cast to half precision.

    Args:
        basis, grid_size, order, grid_min, grid_max: see `basis.make_basis`.
        base: "silu" or None, the fixed function b.
        conditioning: "none" or "whitened".
        grid: "uniform", or "adaptive" (B-splines only), which `update_grid` may move.
        knots: G + 1 ascending grid points shared by all inputs; makes the grid adaptive.
        spline_share: share of the output's variance that the splines have at the start; 0 starts them at
            zero. All of it without a base. Random splines are steep: at half, gradients grow more
            than a hundred thousand times through 24 whitened layers, at the default less than twentyfold.
        gain: standard deviation of the output at the start, for independent inputs of distribution N(0, 1).
        recompute: compute the basis again in backward, in chunks, and save only x.

    Raises:
        ValueError: see `make_basis`; sizes below 1; unknown names; knots that do not ascend; a share outside
            0..1; a last dimension of x that is not I.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis: str = "bspline",
        *,
        grid_size: int = 5,
        order: int = 3,
        grid_min: float = -3.0,
        grid_max: float = 3.0,
        base: str | None = "silu",
        conditioning: str = "none",
        grid: str = "uniform",
        knots: Sequence[float] | None = None,
        spline_share: float = 0.05,
        gain: float = 1.0,
        recompute: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if min(in_features, out_features) < 1:
            raise ValueError(
                f"in_features, out_features: must be at least 1, got {in_features} and {out_features}; "
                "write positive ints"
            )
        if not 0 <= spline_share <= 1:
            raise ValueError(f"spline_share: a share lies in 0..1, got {spline_share}; 0.05 is the default")
        if base not in ("silu", None):
            raise ValueError(f"base: unknown function {base!r}; choose 'silu' or None")
        if conditioning not in ("none", "whitened"):
            raise ValueError(f"conditioning: unknown form {conditioning!r}; choose 'none' or 'whitened'")
        if grid not in ("uniform", "adaptive"):
            raise ValueError(f"grid: unknown kind {grid!r}; choose 'uniform' or 'adaptive'")
        if knots is not None:
            knots = [float(knot) for knot in knots]
            if len(knots) < 2 or not all(low < high for low, high in zip(knots, knots[1:], strict=False)):
                raise ValueError(
                    f"knots: must be at least 2 and ascend without repetition, got {knots}; sort them"
                )
            grid, grid_size, grid_min, grid_max = "adaptive", len(knots) - 1, knots[0], knots[-1]
        self.in_features, self.out_features = in_features, out_features
        self.basis_name = basis
        self.basis = make_basis(basis, grid_size, order, grid_min, grid_max)
        if grid == "adaptive" and not isinstance(self.basis, BSpline):
            raise ValueError(
                f"grid: only B-splines have adaptive grids, got basis {basis!r}; use grid='uniform'"
            )
        self.initial_knots = knots
        self.spline_share, self.gain, self.recompute = spline_share, gain, recompute
        self.kernel = None
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.spline = nn.Linear(self.num_functions * in_features, out_features, **factory)
        self.base = nn.Linear(in_features, out_features, **factory) if base else None
        self.knots: Tensor | None
        self.whitening: Tensor | None
        self.register_buffer("knots", None)
        self.register_buffer("whitening", None)
        wide = {"device": device, "dtype": at_least_fp32(self.spline.weight[:0]).dtype}
        if knots is not None:
            check_apart(torch.tensor(knots, dtype=wide["dtype"], device="cpu").unsqueeze(-1))
        if grid == "adaptive":
            self.knots = torch.empty(grid_size + 1, in_features, **wide)
        if conditioning == "whitened":
            self.whitening = torch.empty(self.num_functions, self.num_functions, **wide)
        self.reset_parameters()

    @property
    def num_functions(self) -> int:
        """K, basis functions of an input."""
        return self.basis.num_functions

    @property
    def conditioning(self) -> str:
        return "none" if self.whitening is None else "whitened"

    @property
    def grid(self) -> str:
        return "uniform" if self.knots is None else "adaptive"

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, {self.basis_name}, {self.basis}, grid={self.grid}, "
            f"conditioning={self.conditioning}"
        )

    def _apply(self, fn, recurse=True):
        wide = {"knots": self.knots, "whitening": self.whitening}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            after = self._buffers[name]
            if after is not None and at_least_fp32(after[:0]).dtype != after.dtype:
                self._buffers[name] = before.to(after.device)
        if self.knots is not None and wide["knots"].dtype != self.knots.dtype and not self.knots.is_meta:
            check_apart(self.knots)
        return self

    @torch.no_grad()
    def reset_parameters(self):
        """Initial grid, whitening and weights; tensors that transformers has loaded are left alone."""
        basis = self.basis
        if self.knots is not None:
            knots = basis.grid_points()
            if self.initial_knots is not None:
                knots = knots.new_tensor(self.initial_knots).unsqueeze(-1)
            init.copy_(self.knots, knots.expand(-1, self.in_features))
            basis = KnotSpline(knots, basis.order)
        points, weights = normal_points()
        values = basis.values(points.unsqueeze(-1)).squeeze(-1)  # [points, K]
        if self.whitening is not None:
            white = self._whitening_under([assumed_points(basis_grid(basis))], basis)
            init.copy_(self.whitening, white)
            values = values @ white.t()
        share = self.spline_share if self.base is not None else 1.0
        energy = float((values.square().sum(-1) * weights).sum())
        init.normal_(self.spline.weight, std=self.gain * math.sqrt(share / (self.in_features * energy)))
        if self.base is not None:
            energy = float((F.silu(points).square() * weights).sum())
            std = self.gain * math.sqrt((1 - share) / (self.in_features * energy))
            init.normal_(self.base.weight, std=std)

    def present_basis(self) -> Basis | KnotSpline:
        """What evaluates the B_m: `basis`, or splines on the present knots."""
        return self.basis if self.knots is None else KnotSpline(self.knots, self.basis.order)

    def features(self, x: Tensor) -> Tensor:
        """x [..., I] to the inputs of the coefficients [..., K, I], fp32 or fp64."""
        return self._white_basis().values(x)

    def _white_basis(self):
        basis = self.present_basis()
        return basis if self.whitening is None else WhiteBasis(basis, self.whitening)

    def _chunks(self, x: Tensor) -> list[slice]:
        """Slices of the rows of x [N, I] whose features are alive at once."""
        return row_chunks(x, self.num_functions)

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
        """`forward` without a kernel: the definition."""
        start = None if self.base is None else self.base(F.silu(x))
        dtype = product_dtype(x, self.spline.weight)
        if not is_plain_linear(self.spline):
            y = self.spline(self.features(x).flatten(-2).to(dtype))
            return y if start is None else start + y
        if self.whitening is None or at_least_fp32(x.new_empty(0, dtype=dtype)).dtype == dtype:
            # The same in fewer operations; the products of half precision need the white features.
            basis, weight = self.present_basis(), self.plain_weight()
        else:
            basis, weight = self._white_basis(), self.spline.weight
        if not self.recompute or torch.compiler.is_compiling():  # a compiler recomputes by itself
            y = F.linear(basis.values(x).flatten(-2).to(dtype), weight)
            return y if start is None else start + y
        if start is not None:
            start = start.reshape(-1, self.out_features)
        y = _RecomputedSpline.apply(x.reshape(-1, self.in_features), weight, start, self, basis, dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def plain_weight(self) -> Tensor:
        """The coefficients of the basis functions themselves, [O, K*I], differentiable.

        `spline.weight` itself, or in fp32 at least where the layer is whitened.
        """
        weight = self.spline.weight
        if self.whitening is None:
            return weight
        wide = at_least_fp32(weight).unflatten(-1, (-1, self.in_features))  # [O, K, I]
        return exact_product(self.whitening.t().to(wide.dtype), wide).flatten(1)

    @torch.no_grad()
    def fold(self):
        """Turn a whitened layer into the plain layer with the same functions."""
        weight = self.plain_weight().clone()
        self.whitening = None
        self.spline.weight.copy_(weight)

    @torch.no_grad()
    def whiten(self, samples: Tensor | None = None):
        """Whiten the features under samples [..., I] of all ranks, or the assumed input; keeps the functions.

        The distribution is 0.9 of the samples, pooled over inputs, and 0.1 spread evenly over the grid
        intervals. Samples further outside the grid than its width count as at that distance.

        Raises:
            ValueError: samples that are not finite, or none.
        """
        plain = self._plain_coefficients()
        self.whitening = self._whitening(samples)
        self._set_coefficients(plain)

    @torch.no_grad()
    def update_grid(self, samples: Tensor, grid_eps: float = 0.02) -> float:
        """Move an adaptive grid to the samples [..., I] of all ranks and refit the coefficients by least
        squares.

        Knots run from the smallest to the largest sample of each input: quantiles, mixed with `grid_eps` of a
        uniform grid. Returns the drift, rms(new output - old output) / rms(old output), the largest of three:
        on the samples, over the new grid, and over the old grid as far as the new one reaches. Grids and
        coefficients are equal on every rank. A whitened layer is whitened under the samples. One far sample
        stretches the intervals beyond the others, which the drift shows; leave such samples out.

        Raises:
            ValueError: a layer with a uniform grid, grid_eps outside (0, 1] or so small that repeated
                samples leave intervals of no length, samples that are not finite, or none.
        """
        if self.knots is None:
            raise ValueError("grid: a 'uniform' grid does not move; build the layer with grid='adaptive'")
        if not 0 < grid_eps <= 1:
            raise ValueError(
                f"grid_eps: must lie in (0, 1], got {grid_eps}; 0.02 is nearly quantiles, 1 is uniform"
            )
        samples = finite_samples(samples, self.in_features)
        least_span = 1e-3 * (self.basis.grid_max - self.basis.grid_min)
        knots = adapted_knots(samples, self.basis.grid_size, grid_eps, least_span)
        return self._refit(self.basis, knots.to(self.knots.dtype), samples)

    @torch.no_grad()
    def refine(self, grid_size: int, samples: Tensor | None = None, allow_coarsen: bool = False) -> float:
        """Change the grid to `grid_size` intervals and refit the coefficients by least squares.

        Exact where the new functions contain the old: for splines at a multiple of the present size (adaptive
        intervals are divided in proportion), for Chebyshev and Fourier at any larger one. Otherwise the fit
        is to points of every interval and to samples [..., I] of all ranks, where given; those further
        outside the grid than its width count as at that distance. Returns the drift as `update_grid` does.
        `spline.weight` becomes a new parameter: build optimisers anew.

        Raises:
            ValueError: fewer intervals without `allow_coarsen`, grid_size < 1, more intervals than the
                knots' dtype can hold apart, samples that are not finite, or none.
        """
        check_finer(grid_size, self.basis.grid_size, allow_coarsen)
        old = self.basis
        basis = make_basis(self.basis_name, grid_size, old.order, old.grid_min, old.grid_max)
        knots = None
        if self.knots is not None:
            position = torch.linspace(
                0, old.grid_size, grid_size + 1, dtype=torch.float64, device=self.knots.device
            )
            below = position.floor().clamp(max=old.grid_size - 1).long()
            wide = self.knots.double()
            knots = wide[below].lerp(wide[below + 1], (position - below).unsqueeze(-1)).to(self.knots.dtype)
        if samples is not None:
            samples = finite_samples(samples, self.in_features)
        return self._refit(basis, knots, samples, is_exact=basis.contains(old))

    def _refit(
        self, basis: Basis, knots: Tensor | None, samples: Tensor | None, is_exact: bool = False
    ) -> float:
        """Change to `basis` and `knots`, refit the coefficients on samples [N, I] and return the drift.

        is_exact: the new functions contain the old, so any points give the same fit; even ones, which are the
        best conditioned, do.
        """
        if knots is not None:
            check_apart(knots)
        weight = self.spline.weight
        old, plain = self._wide_basis(), self._plain_coefficients()
        new = basis if knots is None else KnotSpline(knots.double(), basis.order)
        grid = basis_grid(new).to(weight.device)
        # Far samples alone would hide what a refit does to the functions on the grid.
        probes = [even_points(grid), even_points(basis_grid(old).to(grid.device)).clamp(grid[0], grid[-1])]
        probes = [probe.expand(-1, self.in_features).to(weight.dtype) for probe in probes]
        if samples is not None:
            share_of_samples(samples)  # none on any rank is an error
            probes.append(samples.to(weight.dtype))
        before = [self(probe).double() for probe in probes]
        mapping = refit_map(
            (new.values(points), old.values(points), weights)
            for points, weights in self._fit_points(None if is_exact else samples, grid)
        ).expand(self.in_features, -1, -1)

        self.basis, self.knots, self.initial_knots = basis, knots, None
        if self.whitening is not None:
            self.whitening = self._whitening(samples)
        self._set_coefficients(torch.einsum("iab,obi->oai", mapping, plain))
        pairs = [(self(probe).double(), then) for probe, then in zip(probes, before, strict=True)]
        squares = torch.stack(
            [torch.stack(((y - then).square().sum(), then.square().sum())) for y, then in pairs]
        )
        squares = summed_over_ranks(squares)  # [probes, 2]
        return float((squares[:, 0] / squares[:, 1].clamp_min(1e-300)).max().sqrt())

    def _wide_basis(self) -> Basis | KnotSpline:
        """`present_basis` in fp64."""
        return self.basis if self.knots is None else KnotSpline(self.knots.double(), self.basis.order)

    def _fit_points(self, samples: Tensor | None, grid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of points [n, I] and weights [n] that sum to one over all ranks.

        0.9 of the weight on the samples [N, I] and 0.1 even on the intervals of grid [G + 1, I], so that
        every function has data; without samples all of it.
        """
        even = even_points(grid)
        if samples is not None:  # of one shape on all ranks, also on one without samples
            even = even.expand(-1, self.in_features)
        even_share = 1.0 if samples is None else EVEN_SHARE
        yield even, (share_of_samples(even) * even_share).expand(len(even))
        if samples is not None:
            weight = share_of_samples(samples) * (1 - EVEN_SHARE)
            for rows in self._chunks(samples):
                yield near_grid(samples[rows], grid), weight.expand(len(samples[rows]))

    def _whitening(self, samples: Tensor | None) -> Tensor:
        """`whitening` for the present grid under samples of all ranks or the assumed input."""
        basis, weight = self._wide_basis(), self.spline.weight
        grid = basis_grid(basis).to(weight.device)
        if samples is None:
            white = self._whitening_under([assumed_points(grid)], basis)
        else:
            samples = finite_samples(samples, self.in_features)
            white = self._whitening_under(self._fit_points(samples, grid), basis, over_ranks=True)
        return white.to(at_least_fp32(weight[:0]).dtype)

    def _whitening_under(self, batches, basis: Basis | KnotSpline, over_ranks: bool = False) -> Tensor:
        second = mean = torch.zeros((), dtype=torch.float64, device="cpu")  # joins tensors of any device
        for points, weights in batches:
            values = basis.values(points)  # [n, K, I]
            weighted = values * (weights / values.shape[-1]).view(-1, 1, 1)
            second = second + torch.einsum("nai,nbi->ab", weighted, values)
            mean = mean + weighted.sum((0, 2))
        if over_ranks:
            second, mean = summed_over_ranks(second), summed_over_ranks(mean)
        return whitening_map(second, mean, self.in_features**-0.5)

    def _plain_coefficients(self) -> Tensor:
        """Coefficients of the basis functions, fp64 [O, K, I]."""
        weight = self.spline.weight.double().unflatten(-1, (-1, self.in_features))
        return (
            weight if self.whitening is None else torch.einsum("oji,jm->omi", weight, self.whitening.double())
        )

    def _set_coefficients(self, plain: Tensor):
        """Set the functions to those of coefficients [O, K, I] of the basis functions."""
        if self.whitening is not None:
            plain = torch.einsum("omi,mj->oji", plain, torch.linalg.inv(self.whitening.double()))
        old = self.spline.weight
        weight = plain.flatten(1).to(old.dtype)
        if weight.shape == old.shape:
            old.copy_(weight)
        else:
            self.spline = nn.Linear(weight.shape[1], self.out_features, bias=False, device="meta")
            self.spline.weight = nn.Parameter(weight, requires_grad=old.requires_grad)


def kan_coefficient_names(model: nn.Module) -> set[str]:
    """Names of the parameters of `model` that are coefficients of learned functions.

    They get no weight decay and their own learning rate: decay pulls a function to zero, not to a simpler
    one.
    """
    names = set()
    for prefix, module in model.named_modules():
        child = {KANLinear: "spline.weight", LearnedFunction: "coefficients"}.get(type(module))
        if child:
            names.add(f"{prefix}.{child}" if prefix else child)
    return names


__all__ = ["KANLinear", "LearnedFunction", "kan_coefficient_names"]
