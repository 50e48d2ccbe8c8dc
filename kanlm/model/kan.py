# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""KAN layers: a learned function per edge (`KANLinear`) or per group of channels (`LearnedFunction`).

Shapes: ... leading, N rows (all leading dimensions together), I inputs, O outputs, C channels, K basis
functions, G grid intervals, k order.

References: Liu et al. 2024, arXiv:2404.19756, eq. 2.10 (an edge: a fixed base function plus a spline); Yang &
Wang 2024, arXiv:2409.10594 (functions shared by groups of channels).
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .basis import (
    BASES,
    Basis,
    BSpline,
    KnotSpline,
    WhiteBasis,
    at_least_fp32,
    exact_product,
    make_basis,
    slope_of,
    uniform_pieces,
)
from .refit import (
    EVEN_SHARE,
    adapted_knots,
    finite_samples,
    refit_map,
    share_of_samples,
    summed_over_ranks,
    whitening_map,
)

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Size of the basis values alive at once where they are recomputed, by kind of device."""


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x and weight here: autocast's where it is on."""
    kind = x.device.type
    if weight.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a call of `layer` is the product with its weight and no more.

    It is more with an adapter (LoRA), a quantised or sharded weight, a hook, or weights that are offloaded.
    """
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
        return False
    return "forward" not in vars(layer) and not (layer._forward_pre_hooks or layer._forward_hooks)


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
    inputs of
    one basis function side by side: `spline.weight.view(O, K, I)`. The weights w are those of the child
    `base`, an nn.Linear(I -> O), absent with base=None. Parameters: O I (K + 1), or O I K without a base.

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
            zero. All of it without a base. Random splines are steep: at half, gradients of 24 whitened
            layers grow a hundred thousand times.
        gain: standard deviation of the output at the start, for independent inputs of distribution N(0, 1).
        recompute: compute the basis again in backward, in chunks, and save only x.

    Raises:
        ValueError: see `make_basis`; unknown names; knots that do not ascend; a last dimension of x that is
            not I.
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
        self.register_buffer("knots", None)
        self.register_buffer("whitening", None)
        wide = {"device": device, "dtype": at_least_fp32(self.spline.weight[:0]).dtype}
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
            white = self._whitening_under([_assumed_points(basis_grid(basis))], basis)
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

    def feature_derivatives(self, x: Tensor) -> Tensor:
        """d features / dx: [..., I] to [..., K, I]."""
        return self._white_basis().derivatives(x)

    def _white_basis(self):
        basis = self.present_basis()
        return basis if self.whitening is None else WhiteBasis(basis, self.whitening)

    def _chunks(self, x: Tensor) -> list[slice]:
        """Slices of the rows of x [N, I] whose features fill CHUNK_BYTES."""
        budget = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"])
        size = max(128, budget // (4 * self.num_functions * self.in_features))
        return [slice(start, start + size) for start in range(0, len(x), size)]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: the last dimension must be in_features {self.in_features}, got shape {tuple(x.shape)}"
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
        intervals.

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
        uniform grid. Returns the drift, rms(new output - old output) / rms(old output) on the samples.
        Grids and coefficients are equal on every rank. A whitened layer is whitened under the samples.

        Raises:
            ValueError: a layer with a uniform grid, grid_eps outside (0, 1], samples that are not finite,
                or none.
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

        A multiple of the present size on a uniform grid keeps the functions exactly; adaptive intervals are
        divided in proportion. The fit is to samples [..., I] of all ranks, where given, and to points of
        every interval. Returns the drift, rms(new output - old output) / rms(old output), on the samples or
        else on those points. `spline.weight` becomes a new parameter: build optimisers anew.

        Raises:
            ValueError: fewer intervals without `allow_coarsen`, grid_size < 1, samples that are not finite,
                or none.
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
        return self._refit(basis, knots, samples)

    def _refit(self, basis: Basis, knots: Tensor | None, samples: Tensor | None) -> float:
        """Change to `basis` and `knots`, refit the coefficients on samples [N, I] and return the drift."""
        weight = self.spline.weight
        old, plain = self._wide_basis(), self._plain_coefficients()
        new = basis if knots is None else KnotSpline(knots.double(), basis.order)
        grid = basis_grid(new).to(weight.device)
        probe = _even_points(grid).expand(-1, self.in_features) if samples is None else samples
        before = self(probe.to(weight.dtype)).double()
        mapping = refit_map(
            (new.values(points), old.values(points), weights)
            for points, weights in self._fit_points(samples, grid)
        ).expand(self.in_features, -1, -1)

        self.basis, self.knots, self.initial_knots = basis, knots, None
        if self.whitening is not None:
            self.whitening = self._whitening(samples)
        self._set_coefficients(torch.einsum("iab,obi->oai", mapping, plain))
        change = self(probe.to(weight.dtype)).double() - before
        squares = summed_over_ranks(torch.stack((change.square().sum(), before.square().sum())))
        return float((squares[0] / squares[1].clamp_min(1e-300)).sqrt())

    def _wide_basis(self) -> Basis | KnotSpline:
        """`present_basis` in fp64."""
        return self.basis if self.knots is None else KnotSpline(self.knots.double(), self.basis.order)

    def _fit_points(self, samples: Tensor | None, grid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of points [n, I] and weights [n] that sum to one over all ranks.

        0.9 of the weight on the samples [N, I] and 0.1 even on the intervals of grid [G + 1, I], so that
        every function has data; without samples all of it.
        """
        even = _even_points(grid)
        even_share = 1.0 if samples is None else EVEN_SHARE
        yield even, (share_of_samples(even) * even_share).expand(len(even))
        if samples is not None:
            weight = share_of_samples(samples) * (1 - EVEN_SHARE)
            for rows in self._chunks(samples):
                yield samples[rows], weight.expand(len(samples[rows]))

    def _whitening(self, samples: Tensor | None) -> Tensor:
        """`whitening` for the present grid under samples of all ranks or the assumed input."""
        basis, weight = self._wide_basis(), self.spline.weight
        grid = basis_grid(basis).to(weight.device)
        if samples is None:
            white = self._whitening_under([_assumed_points(grid)], basis)
        else:
            samples = finite_samples(samples, self.in_features)
            white = self._whitening_under(self._fit_points(samples, grid), basis, over_ranks=True)
        return white.to(at_least_fp32(weight[:0]).dtype)

    def _whitening_under(self, batches, basis: Basis | KnotSpline, over_ranks: bool = False) -> Tensor:
        second = mean = 0
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


def _even_points(grid: Tensor) -> Tensor:
    """16 points in every interval of grid [G + 1, I]: fp64 [16 G, I]."""
    shares = (torch.arange(16, dtype=torch.float64, device=grid.device) + 0.5) / 16
    return grid[:-1].unsqueeze(1).lerp(grid[1:].unsqueeze(1), shares.view(1, -1, 1)).flatten(0, 1)


def _assumed_points(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Points [n, I] and weights [n] of 0.9 N(0, 1) + 0.1 even on the intervals of grid [G + 1, I]."""
    normal, weights = (tensor.to(grid.device) for tensor in normal_points())
    even = _even_points(grid)
    points = torch.cat((normal.unsqueeze(-1).expand(-1, grid.shape[-1]), even))
    return points, torch.cat(
        (weights * (1 - EVEN_SHARE), weights.new_full((len(even),), EVEN_SHARE / len(even)))
    )


def normal_points(limit: float = 6.0, count: int = 1201) -> tuple[Tensor, Tensor]:
    """Points [count] fp64 on the CPU and their weights under N(0, 1), which sum to one."""
    points = torch.linspace(-limit, limit, count, dtype=torch.float64, device="cpu")
    weights = torch.exp(-points.square() / 2)
    return points, weights / weights.sum()


INITIAL_FUNCTIONS = {
    "zero": torch.zeros_like,
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
}

RATIONAL_INITIAL = {
    "silu": (
        (3.4949337e-06, 0.5, 0.24998142, 0.053008988, 0.0056863941, 0.000260205),
        (0.26493473, -0.013261471, 0.18928171, 0.01856188),
    ),
    "gelu": (
        (-0.0023883712, 0.5, 0.41356217, 0.11339915, 0.010300634, 0.0),
        (0.40959986, 0.0, 0.24295322, 0.0),
    ),
}
"""Numerator and denominator of the least-squares fits on [-4, 4]; maximal errors 1.2e-5 and 2.4e-3."""


class _Gated(torch.autograd.Function):
    """phi(a) * u, or phi(a) without u; saves a and u and evaluates phi again in backward."""

    @staticmethod
    def forward(ctx, a, u, coefficients, layer):
        ctx.save_for_backward(a, u, coefficients)
        ctx.layer = layer
        phi = layer._value(a, coefficients)
        return phi if u is None else phi * u

    @staticmethod
    def backward(ctx, grad):
        a, u, coefficients = ctx.saved_tensors
        value, slope = ctx.layer._value_and_slope(a, coefficients)
        grad_u = grad * value.to(grad.dtype) if u is not None and ctx.needs_input_grad[1] else None
        grad_phi = at_least_fp32(grad) if u is None else at_least_fp32(grad) * u
        grad_a = (grad_phi * slope).to(a.dtype) if ctx.needs_input_grad[0] else None
        grad_c = None
        if ctx.needs_input_grad[2]:
            grad_c = ctx.layer._coefficient_gradient(a, grad_phi, coefficients).to(coefficients.dtype)
        return grad_a, grad_u, grad_c, None


class LearnedFunction(nn.Module):
    """phi_g(x) on every channel of group g: x [..., C] to [..., C]; `gated(a, u)` is phi(a) * u.

    Channels are split in `groups` runs of neighbours. phi_g(x) = b(x) + sum_m c_gm B_m(x), the coefficients
    c in the parameter `coefficients` [groups, K]. `basis="rational"` is phi_g(x) = P(x) / Q(x), K = 10
    coefficients p_0..p_5, q_0..q_3: P(x) = sum_n p_n x^n and Q(x) = 1 + (q_0 x + q_1 x^2)^2 + (q_2 x + q_3
    x^2)^2. Q is positive everywhere; its gradient vanishes only at q = 0, where this layer never starts.

    A B-spline is evaluated from a table of each interval's polynomial (`table`), not from basis functions.

    Args:
        groups: default: one function per channel.
        basis, grid_size, order, grid_min, grid_max: see `basis.make_basis`; the grid is also where
            `initial` is fitted.
        base: "silu" or None, a fixed function b added to the learned one.
        initial: "silu", "gelu", "identity" or "zero": what sum_m c_gm B_m is at the start.

    Raises:
        ValueError: groups that do not divide channels, unknown names, inputs whose last dimension is not C.
    """

    def __init__(
        self,
        channels: int,
        groups: int | None = None,
        basis: str = "bspline",
        *,
        grid_size: int = 16,
        order: int = 3,
        grid_min: float = -4.0,
        grid_max: float = 4.0,
        base: str | None = None,
        initial: str = "silu",
        device=None,
        dtype=None,
    ):
        super().__init__()
        groups = channels if groups is None else groups
        if groups < 1 or channels % groups:
            raise ValueError(f"groups: {groups} does not divide channels {channels}; choose a divisor")
        if base not in ("silu", None):
            raise ValueError(f"base: unknown function {base!r}; choose 'silu' or None")
        if initial not in INITIAL_FUNCTIONS:
            raise ValueError(
                f"initial: unknown function {initial!r}; choose one of {', '.join(INITIAL_FUNCTIONS)}"
            )
        self.channels, self.groups = channels, groups
        self.basis_name, self.base, self.initial = basis, base, initial
        self.is_rational = basis == "rational"
        if basis not in BASES and not self.is_rational:
            raise ValueError(f"basis: unknown name {basis!r}; choose one of {', '.join(BASES)}, rational")
        if self.is_rational and initial == "zero":
            raise ValueError(
                "initial: a rational function cannot start at 'zero' and train; choose 'identity'"
            )
        self.basis = make_basis(
            "bspline" if self.is_rational else basis, grid_size, order, grid_min, grid_max
        )
        self.kernel = None
        self.coefficients = nn.Parameter(torch.empty(groups, self.num_functions, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_functions(self) -> int:
        return 10 if self.is_rational else self.basis.num_functions

    @property
    def is_spline(self) -> bool:
        """Whether phi is evaluated from `table`."""
        return isinstance(self.basis, BSpline) and not self.is_rational

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, {self.basis_name}, base={self.base}, {self.basis}"

    @torch.no_grad()
    def reset_parameters(self):
        """Initial values; weights that transformers has loaded are left alone."""
        init.copy_(self.coefficients, self.initial_coefficients().expand(self.groups, -1))

    def initial_coefficients(self) -> Tensor:
        """The coefficients [K] of `initial`, fp64 on the CPU: least squares on the grid."""
        if self.is_rational:
            if self.initial in RATIONAL_INITIAL:
                numerator, denominator = RATIONAL_INITIAL[self.initial]
            else:  # x = x Q(x) / Q(x), with the Q of SiLU
                denominator = RATIONAL_INITIAL["silu"][1]
                q0, q1, q2, q3 = denominator
                numerator = (0.0, 1.0, 0.0, q0**2 + q2**2, 2 * (q0 * q1 + q2 * q3), q1**2 + q3**2)
            return torch.tensor(numerator + denominator, dtype=torch.float64, device="cpu")
        basis = self.basis
        count = 40 * basis.num_functions + 1
        points = torch.linspace(basis.grid_min, basis.grid_max, count, dtype=torch.float64, device="cpu")
        values = basis.values(points.unsqueeze(-1)).squeeze(-1)  # [points, K]
        target = INITIAL_FUNCTIONS[self.initial](points)
        return torch.linalg.lstsq(values, target.unsqueeze(-1)).solution.squeeze(-1)

    def gated(self, a: Tensor, u: Tensor) -> Tensor:
        """phi(a) * u: [..., C] and [..., C] to [..., C]. A call, so that hooks (offloading, FSDP) see it."""
        return self(a, u)

    def forward(self, a: Tensor, u: Tensor | None = None) -> Tensor:
        """phi(a), or phi(a) * u: [..., C] to [..., C] in the dtype of a."""
        if a.shape[-1] != self.channels:
            raise ValueError(
                f"x: the last dimension must be channels {self.channels}, got shape {tuple(a.shape)}"
            )
        if u is not None and u.shape != a.shape:
            raise ValueError(f"u: must have the shape of a {tuple(a.shape)}, got {tuple(u.shape)}")
        if self.kernel is not None:
            return self.kernel(self, a, u)
        return self.reference(a, u)

    def reference(self, a: Tensor, u: Tensor | None) -> Tensor:
        """phi(a) * u, or phi(a) where u is None, without a kernel: the definition."""
        return _Gated.apply(a, u, self.table() if self.is_spline else self.coefficients, self)

    def table(self) -> Tensor:
        """Polynomials of B-spline functions, [groups, G + 2, k + 1], fp32 or fp64, differentiable.

        Entry [g, j, p] is the coefficient of u^p on interval j - 1, u = (x - left edge) / step; rows 0 and
        G + 1 are the linear continuations outside the grid, with u measured from the grid's edge.
        """
        order = self.basis.order
        c = at_least_fp32(self.coefficients)
        factory = {"dtype": c.dtype, "device": c.device}
        pieces = torch.tensor(uniform_pieces(order), **factory)  # [k+1, k+1]
        slopes = torch.tensor([slope_of(piece) for piece in uniform_pieces(order)], **factory)  # [k+1, k]
        inner = c.unfold(-1, order + 1, 1) @ pieces  # [groups, G, k+1]
        first, last = c[:, : order + 1], c[:, -order - 1 :]
        left = torch.stack((first @ pieces[:, 0], first @ slopes[:, 0]), dim=-1)
        right = torch.stack((last @ pieces.sum(1), last @ slopes.sum(1)), dim=-1)
        width = max(order + 1, 2)
        outer = [F.pad(end, (0, width - 2)).unsqueeze(1) for end in (left, right)]
        return torch.cat((outer[0], F.pad(inner, (0, width - order - 1)), outer[1]), dim=1)

    @torch.no_grad()
    def refine(self, grid_size: int, allow_coarsen: bool = False) -> float:
        """Change the grid to `grid_size` intervals and refit the coefficients by least squares over the grid.

        Multiples of the present size keep B-spline functions exactly. Returns the drift, rms(new - old) /
        rms(old) of the learned functions on the grid. `coefficients` becomes a new parameter: build
        optimisers anew.

        Raises:
            ValueError: fewer intervals without `allow_coarsen`, grid_size < 1, a rational function.
        """
        if self.is_rational:
            raise ValueError("basis: a 'rational' function has no grid to refine; choose a spline basis")
        check_finer(grid_size, self.basis.grid_size, allow_coarsen)
        old = self.basis
        basis = make_basis(self.basis_name, grid_size, old.order, old.grid_min, old.grid_max)
        points = _even_points(basis.grid_points()).to(self.coefficients.device)
        new_values, old_values = basis.values(points), old.values(points)  # [points, K, 1]
        even = points.new_full((len(points),), 1 / len(points))
        mapping = refit_map([(new_values, old_values, even)]).squeeze(0)  # [K_new, K_old]
        plain = self.coefficients.double()
        before = plain @ old_values.squeeze(-1).t()
        change = plain @ mapping.t() @ new_values.squeeze(-1).t() - before
        coefficients = (plain @ mapping.t()).to(self.coefficients.dtype)
        self.basis = basis
        self.coefficients = nn.Parameter(coefficients, requires_grad=self.coefficients.requires_grad)
        return float(change.norm() / before.norm().clamp_min(1e-300))

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Index int64 [..., C] into the rows of `table` (flattened over groups) and the position u."""
        intervals = self.basis.grid_size
        position = (at_least_fp32(x) - self.basis.grid_min) * (1 / self.basis.step)
        index = position.floor().clamp(-1, intervals)
        u = position - index.clamp(min=0)
        group = torch.arange(self.groups, device=x.device).repeat_interleave(self.channels // self.groups)
        # A NaN has no interval; it must come out as NaN, not as an index outside the memory.
        return (index.long() + 1).clamp(0, intervals + 1) + group * (intervals + 2), u

    def _per_channel(self, coefficients: Tensor) -> Tensor:
        """[groups, K] to [K, C]."""
        return at_least_fp32(coefficients).t().repeat_interleave(self.channels // self.groups, dim=-1)

    def _value(self, a: Tensor, coefficients: Tensor) -> Tensor:
        return self._value_and_slope(a, coefficients, slope=False)[0].to(a.dtype)

    def _value_and_slope(
        self, a: Tensor, coefficients: Tensor, slope: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """phi(a) and phi'(a), fp32 or fp64; `coefficients` is the table of a B-spline."""
        x = at_least_fp32(a)
        derivative = None
        if self.is_spline:
            rows, u = self._rows(x)
            columns = coefficients.flatten(0, 1).t().contiguous()  # [k+1, rows]
            gathered = [column.take(rows) for column in columns]
            value = gathered[-1]
            for column in gathered[-2::-1]:
                value = torch.addcmul(column, value, u)
            if slope:
                degree = len(gathered) - 1
                derivative = gathered[-1] * degree
                for p in range(degree - 1, 0, -1):
                    derivative = torch.addcmul(gathered[p] * p, derivative, u)
                derivative = derivative * (1 / self.basis.step)
        elif self.is_rational:
            value, derivative = self._rational(x, self._per_channel(coefficients))
        else:
            c = self._per_channel(coefficients)  # [K, C]
            value = (self.basis.values(x) * c).sum(-2)
            derivative = (self.basis.derivatives(x) * c).sum(-2) if slope else None
        if self.base is not None:
            value = value + F.silu(x)
            if slope:
                gate = torch.sigmoid(x)
                derivative = derivative + gate * (1 + x * (1 - gate))
        return value, derivative

    @staticmethod
    def _rational(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """P/Q and its derivative at x [..., C] for coefficients c [10, C]."""
        numerator, numerator_slope = c[5], 5 * c[5]
        for n in range(4, -1, -1):
            numerator = numerator * x + c[n]
        for n in range(4, 0, -1):
            numerator_slope = numerator_slope * x + n * c[n]
        first, second = (c[6] + c[7] * x) * x, (c[8] + c[9] * x) * x
        denominator = 1 + first.square() + second.square()
        denominator_slope = 2 * (first * (c[6] + 2 * c[7] * x) + second * (c[8] + 2 * c[9] * x))
        value = numerator / denominator
        return value, (numerator_slope - value * denominator_slope) / denominator

    def _coefficient_gradient(self, a: Tensor, grad: Tensor, coefficients: Tensor) -> Tensor:
        """Gradient of sum(grad * phi(a)) by `coefficients` (the table of a B-spline), fp32 or fp64."""
        x = at_least_fp32(a)
        if self.is_spline:
            rows, u = self._rows(x)
            rows, u, weights = rows.flatten(), u.flatten(), grad.flatten()
            empty = grad.new_zeros(coefficients.shape[:-1].numel())
            sums = [empty.index_add(0, rows, weights)]
            while len(sums) < coefficients.shape[-1]:
                weights = weights * u
                sums.append(empty.index_add(0, rows, weights))
            return torch.stack(sums, dim=-1).view_as(coefficients)
        x, grad = x.reshape(-1, self.channels), grad.reshape(-1, self.channels)
        if not self.is_rational:
            per_channel = (self.basis.values(x) * grad.unsqueeze(-2)).sum(0)  # [K, C]
            return per_channel.unflatten(-1, (self.groups, -1)).sum(-1).t()
        c = self._per_channel(coefficients)
        first, second = (c[6] + c[7] * x) * x, (c[8] + c[9] * x) * x
        denominator = 1 + first.square() + second.square()
        value, _ = self._rational(x, c)
        weights = grad / denominator
        by_coefficient = [(weights * x**n).sum(0) for n in range(6)]
        for term in (first, second):
            shared = weights * value * term * -2 * x
            by_coefficient += [shared.sum(0), (shared * x).sum(0)]
        return torch.stack(by_coefficient).unflatten(-1, (self.groups, -1)).sum(-1).t()


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
