"""Moving grids, refits, whitening: functions stay, whatever the samples and however many the ranks."""

import copy
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from kanlm.fitting import AdaptiveKAN, refine, whiten
from kanlm.fitting.knots import adapted_knots
from kanlm.fitting.refit import fit_points, refit_map
from kanlm.fitting.samples import mixture_quantiles
from kanlm.model.basis import BASES
from kanlm.model.kan import KANLinear

SEED = 0
KIND = {"uniform": KANLinear, "adaptive": AdaptiveKAN}


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(SEED)


def random_inputs(*shape, seed=0, scale=1.5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def change(layer: KANLinear, x: torch.Tensor, before: torch.Tensor) -> float:
    with torch.no_grad():
        return float((layer(x) - before).norm() / before.norm())


def midpoints(layer: KANLinear) -> torch.Tensor:
    """The middles of 16 parts of every interval."""
    grid = layer.basis.grid_points().expand(-1, layer.in_features)
    return torch.cat([grid[:-1] + (part + 0.5) / 16 * grid.diff(dim=0) for part in range(16)])


def drift_of(layer: KANLinear, old: KANLinear, samples: torch.Tensor) -> float:
    """The largest change on the samples, over the new grid, and over the old one as far as that reaches."""
    ends = layer.basis.grid_points()[[0, -1]]
    places = (samples, midpoints(layer), midpoints(old).clamp(*ends))
    with torch.no_grad():
        return max(change(layer, x.to(samples.dtype), old(x.to(samples.dtype))) for x in places)


# Whitening


@pytest.mark.parametrize("basis", list(BASES))
def test_whitening_under_samples_keeps_the_function(basis):
    layer = KANLinear(5, 4, basis, dtype=torch.float64)
    samples = random_inputs(500, 5, seed=1) * 0.4 + 1
    x = random_inputs(60, 5)
    before = layer(x).detach()
    whiten(layer, samples)
    assert layer.conditioning == "whitened"
    assert change(layer, x, before) < 1e-11
    second = 0
    for points, weights in fit_points(layer, samples, layer.basis.grid_points()):
        features = layer.features(points.expand(-1, 5))
        second = second + torch.einsum("n,nai,nbi->ab", weights / 5, features, features)
    torch.testing.assert_close(
        second[1:, 1:], torch.eye(len(second) - 1, dtype=second.dtype), atol=1e-6, rtol=0
    )


# Refits


DEGENERATE = {
    "one sample": random_inputs(1, 3),
    "fewer samples than coefficients": random_inputs(4, 3),
    "constant": torch.full((50, 3), 0.7, dtype=torch.float64),
    "zeros": torch.zeros(50, 3, dtype=torch.float64),
    "two values": random_inputs(60, 3).sign(),
    "repeated": random_inputs(5, 3).repeat(40, 1),
    "far outside the grid": random_inputs(30, 3) * 1e3 + 1e4,
    "constant, far outside the grid": torch.full((50, 3), 3e5, dtype=torch.float64),
    "one outlier": torch.cat((random_inputs(200, 3), torch.full((1, 3), 1e5, dtype=torch.float64))),
    "a narrow range, far outside the grid": random_inputs(100, 3).clamp(0, 1) + 1e8,
    "tiny": random_inputs(30, 3) * 1e-12,
}


@pytest.mark.parametrize("conditioning", ["none", "whitened"])
@pytest.mark.parametrize("grid", ["uniform", "adaptive"])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_refined_grid_keeps_the_function(order, grid, conditioning):
    layer = KIND[grid](3, 4, order=order, grid_size=4, conditioning=conditioning, dtype=torch.float64)
    x = random_inputs(200, 3)  # some of it outside the grid
    assert (x.abs() > 3).any()
    before = layer(x).detach()
    drift = refine(layer, 12)
    assert layer.spline.weight.shape == (4, 3 * (12 + order))
    assert drift < 1e-8
    assert change(layer, x, before) < 1e-8
    layer(x).sum().backward()
    assert layer.spline.weight.grad.abs().sum() > 0


def test_refine_to_a_size_that_is_no_multiple_returns_the_true_drift():
    layer = KANLinear(3, 4, grid_size=4, dtype=torch.float64)
    samples = random_inputs(400, 3, scale=1)
    old = copy.deepcopy(layer)
    drift = refine(layer, 7, samples)
    assert 1e-6 < drift < 0.05
    assert drift == pytest.approx(drift_of(layer, old, samples), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("far", [1e3, 1e7, -1e12])
@pytest.mark.parametrize("grid_size, finer", [(4, 12), (50, 100), (4, 7)])
def test_far_samples_leave_the_functions_within_the_grid(grid_size, finer, far, order, dtype):
    layer = KANLinear(3, 4, grid_size=grid_size, order=order, dtype=dtype)
    old = copy.deepcopy(layer)
    samples = torch.full((50, 3), far, dtype=dtype)
    drift = refine(layer, finer, samples)
    x = random_inputs(500, 3, scale=1).clamp(-3, 3).to(dtype)
    with torch.no_grad():
        changed = change(layer, x, old(x))
    if finer % grid_size == 0:
        assert changed < (1e-11 if dtype == torch.float64 else 1e-6)
    else:
        assert changed < 0.2 and drift > changed / 10  # far samples do not hide what the grid lost


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("conditioning", ["none", "whitened"])
@pytest.mark.parametrize("grid", ["uniform", "adaptive"])
@pytest.mark.parametrize("grid_size, finer", [(4, 12), (50, 100), (4, 7)])
def test_refining_keeps_the_functions_whatever_the_samples(grid_size, finer, grid, conditioning, dtype):
    both_sides = random_inputs(50, 3).sign() * 1e7
    for name, samples in (DEGENERATE | {"both sides": both_sides}).items():
        torch.manual_seed(SEED)
        layer = KIND[grid](3, 4, grid_size=grid_size, conditioning=conditioning, dtype=dtype)
        old = copy.deepcopy(layer)
        drift = refine(layer, finer, samples.to(dtype))
        if finer % grid_size == 0:
            assert drift < (1e-10 if dtype == torch.float64 else 1e-3), (name, drift)
        else:
            assert 1e-6 < drift < 0.05, (name, drift)
        # Rounding moves a sum over far samples.
        assert drift == pytest.approx(drift_of(layer, old, samples.to(dtype)), rel=1e-3, abs=1e-5), name


def test_an_outlier_does_not_hide_what_moving_the_grid_does_to_the_rest():
    """It alone has most of the output's mean square."""
    layer = AdaptiveKAN(3, 4, dtype=torch.float64)
    samples = torch.cat((random_inputs(200, 3), torch.full((1, 3), 1e6, dtype=torch.float64)))
    old = copy.deepcopy(layer)
    drift = layer.update_grid(samples)
    assert change(layer, samples, old(samples)) < 1e-4
    assert drift > 0.5 * change(layer, samples[:200], old(samples[:200])) > 0.01


def test_functions_of_any_scale_are_refitted_alike():
    """Some reached by the samples a billion times more than others."""
    points = random_inputs(200, 6, 2)
    scales = torch.logspace(0, 9, 6, dtype=torch.float64).view(1, 6, 1)
    mapping = refit_map([(points * scales, points * scales, torch.ones(200, dtype=torch.float64))])
    in_function = scales * mapping / scales.mT
    torch.testing.assert_close(in_function, torch.eye(6).double().expand(2, 6, 6), atol=1e-12, rtol=0)


@pytest.mark.parametrize("conditioning", ["none", "whitened"])
@pytest.mark.parametrize("basis", list(BASES))
def test_every_basis_refines_to_a_better_fit(basis, conditioning):
    """Refit to as many and to twice as many functions: the same function, and one close to it."""
    layer = KANLinear(3, 4, basis, grid_size=8, conditioning=conditioning, dtype=torch.float64)
    samples = random_inputs(400, 3, scale=1)
    samples[7] = 1e6
    old = copy.deepcopy(layer)
    assert refine(layer, 8, samples) < 1e-9
    drift = refine(layer, 16, samples)
    assert drift == pytest.approx(drift_of(layer, old, samples), rel=1e-3, abs=1e-7)
    nested = basis in ("bspline", "linear", "chebyshev", "fourier")
    assert drift < (1e-9 if nested else 0.2)


def test_moved_grid_refits_the_coefficients():
    """Knots moved without a refit make the layer jump by most of its output."""
    layer = AdaptiveKAN(3, 4, grid_size=20, base=None, dtype=torch.float64)
    with torch.no_grad():  # smooth functions, as trained ones are
        bumps = torch.linspace(-3.45, 3.45, 23, dtype=torch.float64).sin().view(1, 23, 1)
        layer.spline.weight.copy_((bumps * random_inputs(4, 1, 3)).flatten(1))
    samples = random_inputs(1000, 3, scale=0.9).clamp(-3, 3)
    before, old = layer(samples).detach(), copy.deepcopy(layer)
    jumped = copy.deepcopy(layer)
    jumped.knots.copy_(adapted_knots(samples, 20, 0.02, 1e-3))
    assert change(jumped, samples, before) > 0.3
    drift = layer.update_grid(samples)
    assert drift == pytest.approx(drift_of(layer, old, samples), rel=1e-6)
    assert drift < 5e-3
    inner = (layer.knots[1:-1].min(), layer.knots[1:-1].max())
    assert torch.equal(layer.knots[0], samples.amin(0)) and torch.equal(layer.knots[-1], samples.amax(0))
    assert (layer.knots.diff(dim=0) > 0).all() and inner[0] > samples.min() and inner[1] < samples.max()


def test_knots_are_quantiles_mixed_with_a_uniform_grid():
    samples = random_inputs(5000, 2) ** 3
    quantiles = adapted_knots(samples, 10, 1e-9, 1e-3)
    expected = torch.quantile(samples, torch.linspace(0, 1, 11, dtype=torch.float64), dim=0)
    torch.testing.assert_close(quantiles, expected, atol=2e-2, rtol=1e-2)
    uniform = adapted_knots(samples, 10, 1.0, 1e-3)
    torch.testing.assert_close(uniform.diff(dim=0), (expected[-1:] - expected[:1]).expand(10, -1) / 10)
    half = adapted_knots(samples, 10, 0.5, 1e-3)
    torch.testing.assert_close(half, (quantiles + uniform) / 2, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("conditioning", ["none", "whitened"])
@pytest.mark.parametrize("name", list(DEGENERATE))
def test_degenerate_samples_give_finite_layers(name, conditioning, dtype):
    samples = DEGENERATE[name].to(dtype)
    layer = AdaptiveKAN(3, 4, conditioning=conditioning, dtype=dtype)
    for step in (lambda: layer.update_grid(samples), lambda: refine(layer, 9, samples)):
        old = copy.deepcopy(layer)
        drift = step()
        assert layer.spline.weight.isfinite().all() and layer.knots.isfinite().all()
        assert (layer.knots.diff(dim=0) > 0).all()
        assert layer(samples).isfinite().all()
        if name != "one outlier":  # which stretches the intervals far beyond the other samples
            assert drift < (5e-2 if dtype == torch.float64 else 0.2), (name, drift)
        assert drift == pytest.approx(drift_of(layer, old, samples), rel=1e-3, abs=1e-6)


def test_bad_refits_are_named():
    adaptive = AdaptiveKAN(3, 2)
    good = torch.randn(10, 3)
    cases = [
        (lambda: adaptive.update_grid(good, grid_eps=0), "grid_eps.*got 0"),
        (lambda: adaptive.update_grid(good[:2].repeat(9, 1), grid_eps=1e-12), "knots: .*closer than float32"),
        (lambda: refine(AdaptiveKAN(3, 2, knots=[1e6, 1e6 + 1]), 100), "too narrow for fp32"),
        (lambda: adaptive.update_grid(torch.tensor(1.0)), r"samples.*in_features 3.*\(\)"),
        (lambda: adaptive.update_grid(torch.randn(10, 4)), r"samples.*in_features 3.*\(10, 4\)"),
        (lambda: adaptive.update_grid(good * float("nan")), "samples: 30 of 30 values are not finite"),
        (lambda: refine(adaptive, 9, good * float("inf")), "samples: 30 of 30 values are not finite"),
        (lambda: whiten(adaptive, good / 0), "samples.*not finite"),
        (lambda: adaptive.update_grid(good[:0]), "samples: got none"),
        (lambda: refine(adaptive, 4), "grid_size: 4 is coarser than the present 5.*allow_coarsen"),
        (lambda: refine(adaptive, 0, allow_coarsen=True), "grid_size.*0"),
    ]
    before = copy.deepcopy(adaptive.state_dict())
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    assert all(torch.equal(before[name], value) for name, value in adaptive.state_dict().items())
    assert refine(adaptive, 4, allow_coarsen=True) < 1 and adaptive.basis.grid_size == 4


# Several processes


def _refit_on_rank(rank: int, world_size: int, path: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    layer = AdaptiveKAN(3, 4, conditioning="whitened", dtype=torch.float64)
    samples = random_inputs(301, 3, seed=5)
    share = samples[:200] if rank == 0 else samples[200:]  # unequal shares
    drifts = [layer.update_grid(share), refine(layer, 11, share)]
    whiten(layer, share)
    torch.save(
        (layer.state_dict(), drifts, mixture_quantiles(share, torch.linspace(0, 1, 9).double())),
        f"{path}/{rank}",
    )
    dist.destroy_process_group()


def test_two_processes_refit_as_one(tmp_path):
    multiprocessing.spawn(_refit_on_rank, args=(2, str(tmp_path)), nprocs=2)
    (first, drifts, quantiles), (second, *others) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert others[0] == drifts and torch.equal(others[1], quantiles)
    assert {"basis.knots", "whitening", "spline.weight"} <= set(first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    # One process that has all samples finds nearly the same grid and functions.
    torch.manual_seed(0)
    layer = AdaptiveKAN(3, 4, conditioning="whitened", dtype=torch.float64)
    samples = random_inputs(301, 3, seed=5)
    layer.update_grid(samples)
    refine(layer, 11, samples)
    torch.testing.assert_close(first["basis.knots"], layer.knots, atol=0.05, rtol=0)
    assert torch.equal(first["basis.knots"][[0, -1]], layer.knots[[0, -1]])
    expected = layer(samples).detach()
    refine(layer, 11)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(first)
    assert change(twin, samples, expected) < 2e-2


def _refuse_on_rank(rank: int, world_size: int, path: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    uniform, adaptive = KANLinear(3, 4), AdaptiveKAN(3, 4, conditioning="whitened")
    good = torch.randn(40, 3)
    bad = good.clone()
    bad[3, 1] = float("nan")
    found = []
    for layer in (uniform, adaptive):
        before = copy.deepcopy(layer.state_dict())
        for samples in (bad if rank else good, torch.randn(5, 2 + rank)):
            with pytest.raises(ValueError) as refused:
                refine(layer, 9, samples)
            found.append(str(refused.value))
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    mixed = good if rank else bad
    for refused in (adaptive.update_grid, partial(whiten, adaptive), partial(whiten, uniform)):
        with pytest.raises(ValueError, match="not finite"):
            refused(mixed)
    # A rank without samples takes part and ends with the same layer.
    mine = good[:0] if rank else good
    drifts = [refine(uniform, 9, mine), adaptive.update_grid(mine), refine(adaptive, 9, mine)]
    whiten(uniform, mine)
    torch.save((found, drifts, uniform.state_dict(), adaptive.state_dict()), f"{path}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_bad_samples_of_one_rank_are_refused_on_all(tmp_path):
    """A rank that alone refuses would leave the others waiting for it."""
    context = multiprocessing.spawn(_refuse_on_rank, args=(2, str(tmp_path)), nprocs=2, join=False)
    started = time.monotonic()
    while not context.join(timeout=5):
        if time.monotonic() - started > 60:
            for process in context.processes:
                process.kill()
            pytest.fail("a rank waits for another")
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    line = "samples: 1 of 240 values are not finite; a refit needs finite values, so find the step"
    assert first[0][::2] == second[0][::2] == [line + " that made them"] * 2
    assert all("in_features 3, got shape (5, 2)" in line for line in first[0][1::2])
    assert all("another on 1 rank" in line for line in second[0][1::2])
    assert first[1] == second[1]
    for mine, other in zip(first[2:], second[2:], strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
