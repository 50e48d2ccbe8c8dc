"""How many parameters a KAN and an MLP need for equal error on known functions.

    python scripts/fit_functions.py            # writes docs/fit_functions.md, .png and .json
    python scripts/fit_functions.py --out DIR

Both kinds get the same samples, in fp64, and errors are on fresh samples. On seven of the eight functions
both are trained by Levenberg-Marquardt, with as many random starts and iterations; the start with the lowest
training error goes on. A KAN grows by refining the grid of the smaller fit, and its grids and whitening are
set to the values its layers see twice in every fit; each MLP is trained by itself, with as many iterations as
a KAN of one shape has for all its grids. On the function of 100 inputs the MLPs are too large for a Jacobian:
they get Adam at several learning rates, of which the one with the lowest training error counts, and their KAN
gets Levenberg-Marquardt from one start. The series of grid refinement are KANs alone, trained by L-BFGS.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core

import matplotlib
import numpy as np
import scipy.special
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kanlm.fitting import AdaptiveKAN, refine, whiten
from kanlm.model.kan import KANLinear

TEST_SAMPLES = 1000
STARTS = 6
START_ITERATIONS = 50
"""Iterations after which a start, of a KAN on its coarsest grid, is judged."""
ITERATIONS = 300
"""Iterations that follow: of an MLP, and of a KAN over all its grid sizes."""
FIRST_SCALES = (1.0, 3.0, 10.0)
"""An MLP's starts multiply the first layer's default initialisation by these in turn: with one input the
default holds no more than half an oscillation."""
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
ADAM_STEPS = 2000
ADAM_BATCH = 500
LARGE_ITERATIONS = 10, 10
"""Of the KAN of a large target: at the start, and at each grid size."""
HIDDEN = ((4,), (8,), (16,), (32,), (4, 4), (8, 8), (12, 12), (16, 16), (8, 8, 8))
"""Hidden layers of the MLPs."""


@dataclass(frozen=True)
class Target:
    """A function of inputs in [-1, 1]^n and the networks that are fitted to it."""

    name: str
    function: Callable[[np.ndarray], np.ndarray]
    shapes: tuple[tuple[int, ...], ...]
    """Widths of the KANs' layers."""
    grid_sizes: tuple[int, ...] = (3, 6, 12, 24)
    hidden: tuple[tuple[int, ...], ...] = HIDDEN
    training_samples: int = 3000
    is_large: bool = False
    """Its MLPs are too large for a Jacobian: Adam at several learning rates. Its KAN has one start."""

    @property
    def inputs(self) -> int:
        return self.shapes[0][0]


def between(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (x + 1) / 2 * (high - low)


def shapes_of(inputs: int) -> tuple[tuple[int, ...], ...]:
    """Two layers with n + 1 and, as in Kolmogorov's theorem, 2 n + 1 hidden units; three layers."""
    n = inputs
    return (n, n + 1, 1), (n, 2 * n + 1, 1), (n, n + 1, n + 1, 1)


TARGETS = (
    Target("x y", lambda x: x[:, 0] * x[:, 1], ((2, 2, 1),), (1, 3, 6)),
    Target("J0(20 x)", lambda x: scipy.special.j0(20 * x[:, 0]), ((1, 1),), (6, 12, 24, 48, 96)),
    Target(
        "exp(mean sin^2(pi x_i / 2)), 100 inputs",
        lambda x: np.exp(np.mean(np.sin(np.pi * x / 2) ** 2, axis=1)),
        ((100, 1, 1),),
        (1, 3),
        hidden=((32,), (128,), (512,)),
        training_samples=20_000,
        is_large=True,
    ),
    Target(
        "ellipkinc(phi, m), phi to pi/2, m to 0.9",
        lambda x: scipy.special.ellipkinc(between(x[:, 0], 0, np.pi / 2), between(x[:, 1], 0, 0.9)),
        shapes_of(2),
    ),
    Target(
        "jv(v, x), v in [0.5, 2], x to 10",
        lambda x: scipy.special.jv(between(x[:, 0], 0.5, 2), between(x[:, 1], 0, 10)),
        shapes_of(2),
    ),
    Target(
        "airy Ai(x), x in [-10, 2]",
        lambda x: scipy.special.airy(between(x[:, 0], -10, 2))[0],
        ((1, 1),),
        (6, 12, 24, 48),
    ),
    Target(
        "betainc(a, b, x), a, b in [0.5, 3]",
        lambda x: scipy.special.betainc(
            between(x[:, 0], 0.5, 3), between(x[:, 1], 0.5, 3), between(x[:, 2], 0, 1)
        ),
        shapes_of(3),
    ),
    Target(
        "voigt_profile(x, sigma, gamma)",
        lambda x: scipy.special.voigt_profile(
            between(x[:, 0], -3, 3), between(x[:, 1], 0.3, 1), between(x[:, 2], 0.1, 1)
        ),
        shapes_of(3),
    ),
)


@dataclass(frozen=True)
class Series:
    """A function whose published errors under grid refinement are known."""

    target: Target
    published: tuple[float, ...]
    """Test RMSE at each grid size in the notebooks of Liu et al. 2024, arXiv:2404.19756."""
    starts: int
    iterations: int
    """Iterations at each grid size: these are about the optimum, not about cost."""


SERIES = (
    Series(
        Target(
            "exp(sin(pi x) + y^2)",
            lambda x: np.exp(np.sin(np.pi * x[:, 0]) + x[:, 1] ** 2),
            ((2, 1, 1),),
            (5, 10, 20, 50, 100),
        ),
        (6.8e-3, 3.4e-4, 1.9e-5, 4.9e-7, 3.3e-8),
        starts=2,
        iterations=600,
    ),
    Series(
        Target(
            "exp((sin(pi(x1^2 + x2^2)) + sin(pi(x3^2 + x4^2))) / 2)",
            lambda x: np.exp(
                (
                    np.sin(np.pi * (x[:, 0] ** 2 + x[:, 1] ** 2))
                    + np.sin(np.pi * (x[:, 2] ** 2 + x[:, 3] ** 2))
                )
                / 2
            ),
            ((4, 2, 1, 1),),
            (3, 5, 10, 20, 50),
        ),
        (9.2e-3, 3.2e-3, 1.1e-3, 3.8e-4, 3.8e-5),
        starts=10,
        iterations=300,
    ),
)


@dataclass(frozen=True)
class Fit:
    widths: tuple[int, ...]
    parameters: int
    train_rmse: float
    test_rmse: float


def samples(target: Target, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Uniform inputs [count, n] and values [count, 1], fp64."""
    x = np.random.default_rng(seed).uniform(-1, 1, (count, target.inputs))
    return torch.tensor(x), torch.tensor(target.function(x)).unsqueeze(-1)


def new_kan(shape: tuple[int, ...], grid_size: int, seed: int) -> nn.Sequential:
    """Whitened cubic layers; the grids of hidden layers follow their inputs."""
    torch.manual_seed(seed)
    layers = []
    for index, (inputs, outputs) in enumerate(zip(shape, shape[1:], strict=False)):
        kind = AdaptiveKAN if index else KANLinear
        settings = {"grid_size": grid_size, "grid_min": -1.0, "grid_max": 1.0, "base": None}
        layers.append(kind(inputs, outputs, **settings, conditioning="whitened", dtype=torch.float64))
    return nn.Sequential(*layers)


def new_mlp(widths: tuple[int, ...], seed: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, dtype=torch.float64), activation()]
    with torch.no_grad():
        for parameter in layers[0].parameters():
            parameter *= FIRST_SCALES[seed % len(FIRST_SCALES)]
    return nn.Sequential(*layers[:-1])


def parameter_count(model: nn.Module) -> int:
    """Weights and knots; whitening is a choice of coordinates that folds away."""
    knots = sum(layer.knots.numel() for layer in model if isinstance(layer, AdaptiveKAN))
    return sum(parameter.numel() for parameter in model.parameters()) + knots


def rmse(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - y).square().mean().sqrt())


def centre_on(model: nn.Sequential, x: Tensor):
    """Uniform grids and white features for the values that each layer of the KAN now sees."""
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, AdaptiveKAN):
                layer.update_grid(x, grid_eps=1.0)
            else:
                whiten(layer, x)
            x = layer(x)


def lbfgs(model: nn.Module, x: Tensor, y: Tensor, iterations: int):
    """L-BFGS with a strong Wolfe line search on the mean square error."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=iterations,
        history_size=100,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def matrices(model: nn.Sequential) -> list[nn.Linear]:
    """The layers that hold the parameters: of a KAN, its coefficients."""
    children = [layer.spline if isinstance(layer, KANLinear) else layer for layer in model]
    return [child for child in children if isinstance(child, nn.Linear)]


def jacobian(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [N, 1] and their derivatives by the parameters [N, P].

    Rows do not mix, so one backward pass of the sum gives every row's gradient by the outputs of each matrix;
    that by the matrix is the outer product with its inputs.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].detach(), output)))
        for layer in matrices(model)
    ]
    y = model(x)
    for hook in hooks:
        hook.remove()
    columns = []
    gradients = torch.autograd.grad(y.sum(), [output for _, output in seen])
    for layer, (inputs, _), gradient in zip(matrices(model), seen, gradients, strict=True):
        columns.append((gradient.unsqueeze(-1) * inputs.unsqueeze(1)).flatten(1))
        if layer.bias is not None:
            columns.append(gradient)
    return y.detach(), torch.cat(columns, dim=1)


def levenberg_marquardt(model: nn.Sequential, x: Tensor, y: Tensor, iterations: int):
    """Damped Gauss-Newton on the mean square error (Marquardt 1963); every step tried is an iteration."""
    parameters = [p for layer in matrices(model) for p in layer.parameters()]

    def loss() -> float:
        with torch.no_grad():
            return float((model(x) - y).square().mean())

    present, best, damping = nn.utils.parameters_to_vector(parameters).detach(), loss(), 1e-2
    normal = None
    for _ in range(iterations):
        if normal is None:
            output, rows = jacobian(model, x)
            normal, slope = rows.t() @ rows, rows.t() @ (output - y)
            scale = normal.diagonal()
            scale = torch.diag(scale + 0.1 * scale.mean())
        factor, failed = torch.linalg.cholesky_ex(normal + damping * scale)
        if not failed:
            tried = present - torch.cholesky_solve(slope, factor).squeeze(1)
            nn.utils.vector_to_parameters(tried, parameters)
            error = loss()
            if error < best:
                present, best, normal, damping = tried, error, None, damping / 5
                continue
        damping *= 4
        if damping > 1e12:  # rounding hides any descent that is left
            break
    nn.utils.vector_to_parameters(present, parameters)


def adam(model: nn.Module, x: Tensor, y: Tensor, steps: int, learning_rate: float):
    """Adam on batches of ADAM_BATCH samples, with a one-cycle schedule."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (ADAM_BATCH,), generator=generator)
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()


Minimiser = Callable[[nn.Sequential, Tensor, Tensor, int], None]


def trained_kan(model: nn.Sequential, x: Tensor, y: Tensor, iterations: int, minimise: Minimiser):
    """Two rounds, as the hidden layers' inputs move while they train."""
    for _ in range(2):
        centre_on(model, x)
        minimise(model, x, y, iterations // 2)


def best_of(models: list[nn.Sequential], x: Tensor, y: Tensor) -> nn.Sequential:
    return min(models, key=lambda model: rmse(model, x, y))


def kan_fits(
    target: Target,
    widths: tuple[int, ...],
    starts: int,
    start_iterations: int,
    iterations: int,
    minimise: Minimiser,
) -> list[Fit]:
    """A fit for each grid size: the best of the starts on the coarsest grid, then refined; `iterations` at
    each size."""
    x, y = samples(target, target.training_samples, seed=0)
    test = samples(target, TEST_SAMPLES, seed=1)
    models = [new_kan(widths, target.grid_sizes[0], seed) for seed in range(starts)]
    for model in models:
        trained_kan(model, x, y, start_iterations, minimise)
    model = best_of(models, x, y)
    fits = []
    for grid_size in target.grid_sizes:
        if grid_size != model[0].basis.grid_size:
            for layer in model:
                refine(layer, grid_size)
        trained_kan(model, x, y, iterations, minimise)
        fits.append(Fit(widths, parameter_count(model), rmse(model, x, y), rmse(model, *test)))
    return fits


def series_fits(series: Series) -> list[Fit]:
    target = series.target
    return kan_fits(target, target.shapes[0], series.starts, 80, series.iterations, lbfgs)


def fits_of_kan(target: Target, widths: tuple[int, ...]) -> list[Fit]:
    if target.is_large:
        effort = 1, *LARGE_ITERATIONS
    else:
        effort = STARTS, START_ITERATIONS, ITERATIONS // len(target.grid_sizes)
    return kan_fits(target, widths, *effort, levenberg_marquardt)


def fits_of_mlp(target: Target, widths: tuple[int, ...]) -> list[Fit]:
    """The best of the starts, trained on; or the best of the learning rates."""
    x, y = samples(target, target.training_samples, seed=0)
    test = samples(target, TEST_SAMPLES, seed=1)
    if target.is_large:
        models = [new_mlp(widths, 0, nn.SiLU) for _ in LEARNING_RATES]
        for model, learning_rate in zip(models, LEARNING_RATES, strict=True):
            adam(model, x, y, ADAM_STEPS, learning_rate)
        model = best_of(models, x, y)
    else:
        models = [new_mlp(widths, seed) for seed in range(STARTS)]
        for model in models:
            levenberg_marquardt(model, x, y, START_ITERATIONS)
        model = best_of(models, x, y)
        levenberg_marquardt(model, x, y, ITERATIONS)
    return [Fit(widths, parameter_count(model), rmse(model, x, y), rmse(model, *test))]


def parameters_for(fits: list[Fit], error: float) -> float:
    """Parameters at which `fits` reach the test RMSE `error`, interpolated on logarithms; inf if never."""
    reached = None
    for fit in sorted(fits, key=lambda fit: fit.parameters):
        if fit.test_rmse <= error:
            if reached is None:
                return fit.parameters
            share = math.log(reached.test_rmse / error) / math.log(reached.test_rmse / fit.test_rmse)
            return reached.parameters * (fit.parameters / reached.parameters) ** share
        if reached is None or fit.test_rmse < reached.test_rmse:
            reached = fit
    return math.inf


def named(name: str) -> Target | Series:
    series = {series.target.name: series for series in SERIES}
    return series.get(name) or next(target for target in TARGETS if target.name == name)


def run(kind: str, name: str, widths: tuple[int, ...]) -> list[Fit]:
    """One job: kind "kan" or "mlp"."""
    what = named(name)
    if isinstance(what, Series):
        return series_fits(what)
    return fits_of_kan(what, widths) if kind == "kan" else fits_of_mlp(what, widths)


def all_jobs() -> list[tuple[str, str, tuple[int, ...]]]:
    """The arguments of `run`, the long ones first."""
    by_size = sorted(TARGETS, key=lambda target: -target.inputs)
    return [
        *(("kan", series.target.name, ()) for series in reversed(SERIES)),
        *(("kan", target.name, widths) for target in by_size for widths in target.shapes),
        *(
            ("mlp", target.name, (target.inputs, *hidden, 1))
            for target in by_size
            for hidden in reversed(target.hidden)
        ),
    ]


def table(kan: dict[str, list[Fit]], mlp: dict[str, list[Fit]]) -> str:
    """Rows for each function: the parameters of each kind at two equal errors."""
    lines = [
        "| function (its deviation) | best RMSE, KAN | best RMSE, MLP | equal RMSE | KAN parameters "
        "| MLP parameters | MLP / KAN | 100 times fewer? |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        sides = kan[target.name], mlp[target.name]
        best = [min(fits, key=lambda fit: fit.test_rmse) for fits in sides]
        deviation = float(samples(target, TEST_SAMPLES, seed=1)[1].std())
        finest = max(fit.test_rmse for fit in best)
        for row, error in enumerate((math.sqrt(finest * deviation / 3), finest)):
            counts = [parameters_for(fits, error * (1 + 1e-9)) for fits in sides]
            ratio = counts[1] / counts[0]
            cells = [f"{target.name} ({deviation:.1e})"]
            cells += [f"{fit.test_rmse:.1e} ({kind_of(fit)})" for fit in best]
            cells = ["", "", ""] if row else cells
            cells += [f"{error:.1e}", *(f"{count:.0f}" for count in counts), f"{ratio:.2g}"]
            lines.append(f"| {' | '.join(cells)} | {'yes' if ratio >= 100 else 'no'} |")
    holds = sum(line.endswith("| yes |") for line in lines[3::2])
    lines += ["", f"At the best error that both reach, a KAN needs 100 times fewer parameters for {holds} of"]
    lines += [f"{len(TARGETS)} functions."]
    return "\n".join(lines)


def kind_of(fit: Fit) -> str:
    return f"{'-'.join(map(str, fit.widths))}, {fit.parameters} parameters"


def series_table(results: dict[str, list[Fit]]) -> str:
    lines = []
    for series in SERIES:
        target = series.target
        lines += [
            f"`{target.name}`, layers {list(target.shapes[0])}:",
            "",
            "| G | parameters | RMSE | published |",
        ]
        lines += ["|---|---|---|---|"]
        for size, fit, published in zip(
            target.grid_sizes, results[target.name], series.published, strict=True
        ):
            lines.append(f"| {size} | {fit.parameters} | {fit.test_rmse:.1e} | {published:.1e} |")
        lines.append("")
    return "\n".join(lines)


def plot(kan: dict[str, list[Fit]], mlp: dict[str, list[Fit]], path: Path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(13, 5.6), constrained_layout=True)
    for axis, target in zip(axes.flat, TARGETS, strict=True):
        for label, fits, marker, colour in (("KAN", kan, "o", "C0"), ("MLP", mlp, "s", "C1")):
            points = sorted(fits[target.name], key=lambda fit: fit.parameters)
            sizes, errors = zip(*((fit.parameters, fit.test_rmse) for fit in points), strict=True)
            axis.loglog(sizes, errors, marker, color=colour, alpha=0.4, markersize=4)
            axis.step(sizes, np.minimum.accumulate(errors), colour, where="post", label=label)
        axis.axhline(float(samples(target, TEST_SAMPLES, seed=1)[1].std()), color="grey", ls=":", lw=1)
        axis.set_xlim(*((100, 1e5) if target.is_large else (7, 2000)))
        axis.set_title(target.name, fontsize=8)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.supxlabel("parameters")
    figure.supylabel("RMSE on fresh samples")
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def report(kan: dict[str, list[Fit]], mlp: dict[str, list[Fit]]) -> str:
    large = next(target for target in TARGETS if target.is_large)
    shapes = ", ".join("-".join(map(str, hidden)) for hidden in HIDDEN)
    large_shapes = ", ".join("-".join(map(str, hidden)) for hidden in large.hidden)
    scales = ", ".join(map(str, FIRST_SCALES))
    rates = ", ".join(map(str, LEARNING_RATES))
    return f"""# Known functions: parameters for equal error

Written by `python scripts/fit_functions.py`: 3 min 18 s on 2 idle cores, 944 MB of memory at its peak.

KAN: whitened cubic layers without a base branch, grown by refining the grid. MLP: tanh, hidden layers
{shapes}.

Both, but for the function of 100 inputs: {TARGETS[0].training_samples} samples in [-1, 1]^n, {STARTS} random
starts of {START_ITERATIONS} iterations of Levenberg-Marquardt in fp64, of which the one with the lowest
training error goes on for {ITERATIONS} (each MLP by itself; a KAN in equal parts over its grids). Each fit of
a KAN is in two halves, before which its grids and whitening are set to the values that its layers then see;
an MLP has nothing of the kind. An MLP's starts scale its first layer by {scales} in turn;
a KAN's differ in the seed alone. RMSE is that on {TEST_SAMPLES} fresh samples. Knots count as parameters.

With 3000 samples an MLP learns nothing of the function of 100 inputs; there both kinds have
{large.training_samples}, and not the same optimiser. Its MLPs (SiLU, hidden layers {large_shapes})
have too many parameters for Levenberg-Marquardt. Each has one start, in fp64, and {ADAM_STEPS} steps of Adam
with a one-cycle schedule, on batches of {ADAM_BATCH}, at each of the learning rates {rates};
the one with the lowest training error counts. Its KAN has one start and Levenberg-Marquardt on all samples:
{LARGE_ITERATIONS[0]} iterations at first and {LARGE_ITERATIONS[1]} at each grid size.

The layers of the first three KANs were chosen knowing the function, as in the KAN papers. Functions of one
input have a single edge. All others have the shapes [n, n+1, 1], [n, 2n+1, 1] and [n, n+1, n+1, 1], whatever
the function is. What counts of either kind is the smallest network that reaches an error, whatever its shape;
parameters are interpolated between fitted sizes, and a network is not counted below its smallest fitted size.
The second row of a function is the best error that both kinds reach, the first is the geometric mean of that
and a third of the function's deviation.

{table(kan, mlp)}

![RMSE against parameters](fit_functions.png)

Lines: the smallest error up to that size; dotted: the function's deviation, the error of a constant.

## Grid refinement

KANs alone. The error must keep falling as the grid grows. Published: the series in the notebooks of Liu et
al. 2024. Here L-BFGS has up to {SERIES[0].iterations} and {SERIES[1].iterations} iterations at each size,
from the best of {SERIES[0].starts} and {SERIES[1].starts} starts.

{series_table(kan)}"""


def write(kan: dict[str, list[Fit]], mlp: dict[str, list[Fit]], out: Path) -> str:
    """The fits as JSON, the plot, and the report, which is returned."""
    out.mkdir(parents=True, exist_ok=True)
    fits = {
        kind: {name: [vars(fit) for fit in found] for name, found in by_name.items()}
        for kind, by_name in (("kan", kan), ("mlp", mlp))
    }
    (out / "fit_functions.json").write_text(json.dumps(fits, indent=1) + "\n", encoding="utf-8")
    plot(kan, mlp, out / "fit_functions.png")
    text = report(kan, mlp)
    (out / "fit_functions.md").write_text(text, encoding="utf-8")
    return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    docs = Path(__file__).resolve().parents[1] / "docs"
    parser.add_argument("--out", type=Path, default=docs, help="folder to write to; default: docs")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    arguments = parser.parse_args()
    kan: dict[str, list[Fit]] = {}
    mlp: dict[str, list[Fit]] = {}
    jobs = all_jobs()
    with ProcessPoolExecutor(arguments.processes) as pool:
        submitted = {pool.submit(run, *job): job for job in jobs}
        for done in tqdm(as_completed(submitted), total=len(jobs), desc="fits"):
            kind, name, _ = submitted[done]
            (kan if kind == "kan" else mlp).setdefault(name, []).extend(done.result())
    print(write(kan, mlp, arguments.out))


if __name__ == "__main__":
    main()
