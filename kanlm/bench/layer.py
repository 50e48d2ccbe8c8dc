"""`kanlm bench layer`: one full-edge KAN layer, forward and backward, against an MLP and the registry's
peers.

All KAN layers have the same inputs, outputs, grid intervals and order; the MLP (up, GELU, down) has as many
parameters as ours. Peers are optional: `pip install 'kanlm[bench]'`, and `pip install --no-deps kan-gpt`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kanlm import kernels
from kanlm.bench.measure import (
    PARITY,
    Arm,
    cuda_peak_memory,
    parity_error,
    peak_memory,
    report,
    require_device,
)
from kanlm.config import UserError
from kanlm.model.kan import KANLinear


class TwoLayerMLP(nn.Module):
    """down(GELU(up x)) with about `parameters` weights."""

    def __init__(self, inputs: int, outputs: int, parameters: int):
        super().__init__()
        hidden = round(parameters / (inputs + outputs))
        self.up = nn.Linear(inputs, hidden, bias=False)
        self.down = nn.Linear(hidden, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class FirstOutput(nn.Module):
    """pykan's layer returns a tuple, of which the first is y."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def _pykan(inputs: int, outputs: int, grid: int, order: int) -> nn.Module:
    module = importlib.import_module("kan.KANLayer")
    return FirstOutput(module.KANLayer(inputs, outputs, num=grid, k=order, grid_range=[-3, 3]))


def _kan_gpt(inputs: int, outputs: int, grid: int, order: int) -> nn.Module:
    module = importlib.import_module("kan_gpt.efficient_kan.model")
    return module.KANLinear(inputs, outputs, grid_size=grid, spline_order=order, grid_range=[-3, 3])


def _inkan(inputs: int, outputs: int, grid: int, order: int) -> nn.Module:
    module = importlib.import_module("inkan.layer")
    return module.KANLayer(inputs, outputs, grid_size=grid, spline_order=order, grid_range=(-3, 3))


def _inkan_eager(inputs: int, outputs: int, grid: int, order: int) -> nn.Module:
    module = importlib.import_module("inkan.layer")
    return module.KANLayer(
        inputs, outputs, grid_size=grid, spline_order=order, grid_range=(-3, 3), compile_basis=False
    )


def _flashkan(inputs: int, outputs: int, grid: int, order: int) -> nn.Module:
    module = importlib.import_module("flashkan.layer")
    return module.KANLayer(inputs, outputs, grid_size=grid, spline_order=order, grid_range=(-3, 3))


def _kanditioned(impl: str) -> Callable[[int, int, int, int], nn.Module]:
    """Its layer is piecewise linear: as many control points as ours has functions, base included."""

    def layer(inputs: int, outputs: int, grid: int, order: int) -> nn.Module:
        module = importlib.import_module("KANditioned.kan_layer")
        points = grid + order + 1
        return module.KANLayer(inputs, outputs, "random_normal", points, spline_width=6.0, impl=impl)

    return layer


PEERS: dict[str, tuple[str, Callable[[int, int, int, int], nn.Module], int | None]] = {
    # name: package, layer, most tokens of a step (for those that take seconds, or keep [tokens, I, O]
    # tensors)
    "kan-gpt (efficient-kan)": ("kan_gpt", _kan_gpt, None),
    "inkan (compiled)": ("inkan", _inkan, None),
    "inkan": ("inkan", _inkan_eager, None),
    "flashkan": ("flashkan", _flashkan, None),
    "kanditioned (csr)": ("KANditioned", _kanditioned("sparse_matmul_csr"), 64),
    "kanditioned (embedding_bag)": ("KANditioned", _kanditioned("embedding_bag"), 64),
    "pykan": ("kan", _pykan, 64),
}
OURS = {
    # name: basis, grid intervals beyond --grid, backend
    "kanlm": ("bspline", None),
    "kanlm reference": ("bspline", "reference"),
    "kanlm linear": ("linear", None),
}


def build_layer(
    name: str, inputs: int, outputs: int, grid: int, order: int, backend: str, device: str
) -> nn.Module:
    """The layer of an arm. `kanlm linear` has order 1 and order - 1 more intervals: the same parameters."""
    torch.manual_seed(0)
    if name == "mlp":
        return TwoLayerMLP(inputs, outputs, inputs * outputs * (grid + order + 1)).to(device)
    if name in OURS:
        basis, own = OURS[name]
        intervals = grid if basis == "bspline" else grid + order - 1
        layer = KANLinear(inputs, outputs, basis, grid_size=intervals, order=order).to(device)
        kernels.select(layer, own or backend)
        return layer
    return PEERS[name][1](inputs, outputs, grid, order).to(device)


def layer_arm(
    name: str,
    tokens: int,
    inputs: int,
    outputs: int,
    grid: int,
    order: int,
    backend: str,
    device: str = "cpu",
) -> Arm:
    """Forward and backward, input's gradient included."""
    layer = build_layer(name, inputs, outputs, grid, order, backend, device)
    most = PEERS[name][2] if name in PEERS else None
    tokens = min(tokens, most or tokens)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, inputs, generator=generator).to(device).requires_grad_()
    grad = torch.randn(tokens, outputs, generator=generator).to(device)

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(grad)

    parameters = sum(p.numel() for p in layer.parameters())
    chosen = getattr(layer, "kernel", None)
    return Arm(
        name,
        step,
        tokens,
        parameters,
        flops=6.0 * tokens * inputs * outputs * (grid + order + 1),
        least_bytes=4.0 * (3 * parameters + 3 * tokens * inputs + 2 * tokens * outputs),
        baseline="mlp",
        kernels=(backend if chosen else "reference") if name in OURS else "-",
    )


def run(
    inputs: int = 512,
    outputs: int = 512,
    grid: int = 8,
    order: int = 3,
    tokens: int = 4096,
    arms: tuple[str, ...] = (),
    backend: str = "auto",
    device: str = "cpu",
    seconds: float = 60.0,
    memory: bool = True,
    out: str | None = None,
    echo: Callable[[str], Any] = print,
) -> list[dict]:
    """Compare one layer of each arm (default: all); prints a table, writes JSON, returns the records.

    Raises:
        UserError: sizes below 1, an unknown arm or backend, or a device that is not there.
    """
    require_device(device)
    sizes = {"inputs": inputs, "outputs": outputs, "grid": grid, "order": order, "tokens": tokens}
    for key, value in sizes.items():
        if value < 1:
            raise UserError(f"--{key}: must be at least 1, got {value}")
    known = ["mlp", *OURS, *PEERS]
    if unknown := [name for name in arms if name not in known]:
        raise UserError(f"--arm: unknown arm {unknown[0]!r}; choose from {', '.join(known)}")
    skipped: dict[str, str] = {}
    runnable = []
    for name in arms or known:
        reason = _reason_to_skip(name, inputs, outputs, grid, order, backend, device)
        if reason:
            skipped[name] = reason
        else:
            runnable.append(name)
    arguments = (tokens, inputs, outputs, grid, order, backend)
    built_arms = [layer_arm(name, *arguments, device) for name in runnable]
    peaks: dict[str, dict[str, int] | None] = {}
    if memory:
        for arm in built_arms:
            if device == "cuda":
                peaks[arm.name] = cuda_peak_memory(arm)
            else:
                peaks[arm.name] = peak_memory(layer_arm, arm.name, *arguments)
    settings = {**sizes, "backend": backend, "device": device}
    return report(
        "layer", settings, built_arms, peaks, skipped, seconds=seconds, device=device, out=out, echo=echo
    )


def _reason_to_skip(
    name: str, inputs: int, outputs: int, grid: int, order: int, backend: str, device: str
) -> str | None:
    """Why an arm is not timed: a peer that is absent or refuses these sizes, or red parity of ours."""
    if name in PEERS:
        package = PEERS[name][0]
        if importlib.util.find_spec(package) is None:
            return f"package {package} is not installed (pip install 'kanlm[bench]', or --no-deps {name})"
        try:
            layer = build_layer(name, 4, 3, grid, order, backend, device)
            y = layer(torch.randn(5, 4, device=device))
        except (ValueError, NotImplementedError, RuntimeError, ImportError) as error:
            return f"does not run here: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return None if y.shape == (5, 3) and y.isfinite().all() else "its output is not finite [tokens, O]"
    if name == "mlp":
        return None
    try:
        layer = build_layer(name, inputs, outputs, grid, order, backend, device)
    except ValueError as error:
        raise UserError(str(error)) from None
    x = torch.randn(64, inputs, generator=torch.Generator().manual_seed(2)).to(device)
    worst = parity_error(layer, x)
    if worst < PARITY[torch.float32]:
        return None
    return f"parity is red: relative error {worst:.2g} >= {PARITY[torch.float32]}"
