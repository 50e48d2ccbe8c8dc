"""pykan's hello world in kanlm: fit exp(sin(pi a) + b^2) with learned functions, and find the formula.

    python examples/regression.py            a few seconds on a CPU
    python examples/regression.py --pykan    the same in pykan (pip install 'kanlm[bench]'), for comparison

Prints the root mean squared error on points that were not fitted, before and after the grids are made finer,
and the formula that the functions are read as.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from kanlm import KANLinear
from kanlm.interpret.networks import auto_symbolic, refine, symbolic_formula


def samples(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [N, 2] even on [-1, 1], y [N, 1]."""
    x = torch.rand(number, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x, torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:] ** 2)


def error(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Root mean squared."""
    with torch.no_grad():
        return float((network(x) - y).square().mean().sqrt())


def fit(network: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """L-BFGS on the mean squared error, as pykan's `fit` does; any torch optimiser serves."""
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (network(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def in_kanlm(steps: int) -> dict[str, float | str]:
    x, y = samples(1000, seed=0)
    x_test, y_test = samples(1000, seed=1)
    torch.manual_seed(0)
    network = nn.Sequential(KANLinear(2, 1, grid_min=-1, grid_max=1), KANLinear(1, 1))
    fit(network, x, y, steps)
    found: dict[str, float | str] = {"coarse grid": error(network, x_test, y_test)}
    network = refine(network, 10)  # the same functions on twice as many intervals
    fit(network, x, y, steps)
    found["fine grid"] = error(network, x_test, y_test)
    formulas = auto_symbolic(network, x)
    fit(formulas, x, y, steps)  # the formulas' own constants
    found["formula's error"] = error(formulas, x_test, y_test)
    found["formula"] = str(symbolic_formula(formulas)[0])
    return found


def in_pykan(steps: int) -> dict[str, float | str]:
    from kan import KAN

    x, y = samples(1000, seed=0)
    x_test, y_test = samples(1000, seed=1)
    data = {"train_input": x, "train_label": y, "test_input": x_test, "test_label": y_test}
    model = KAN(width=[2, 1, 1], grid=5, k=3, seed=0, auto_save=False)
    model.fit(data, opt="LBFGS", steps=steps)
    found: dict[str, float | str] = {"coarse grid": error(model, x_test, y_test)}
    model = model.refine(10)
    model.fit(data, opt="LBFGS", steps=steps)
    found["fine grid"] = error(model, x_test, y_test)
    model.auto_symbolic()
    model.fit(data, opt="LBFGS", steps=steps)
    found["formula's error"] = error(model, x_test, y_test)
    found["formula"] = str(model.symbolic_formula()[0][0])
    return found


def main(arguments: list[str] | None = None) -> dict[str, float | str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="of L-BFGS in each of three fits")
    parser.add_argument("--pykan", action="store_true", help="use pykan instead")
    options = parser.parse_args(arguments)
    found = in_pykan(options.steps) if options.pykan else in_kanlm(options.steps)
    for name, value in found.items():
        print(f"{name:16} {value if isinstance(value, str) else format(value, '.2e')}")
    return found


if __name__ == "__main__":
    main()
