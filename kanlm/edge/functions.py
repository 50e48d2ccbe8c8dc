"""Learned functions as few operations of an ONNX graph: gather a polynomial and evaluate it, or a value.

Legend: C channels (inputs) of a layer, K values of each (1, or basis functions), G intervals, k degree,
R rows, S = STEPS.

Polynomials are exact, not sampled: on each interval a B-spline is a polynomial, and beyond the grid a line,
so a table of G + 2 rows holds the function. Functions of another basis stay as they are; the exporter takes
them apart.

Values (`sampled=True`) need five operations instead of seventeen, for graphs that are rounded anyhow: the
nearest of 2 S points, evenly spaced in x / (1 + |x|). With d = 1 + |x| the error is at most d^2 / (2 S - d)
times the function's steepest slope up to that point: times 0.004 at 0, 0.016 at |x| = 1, 0.06 at 3. Beyond
|x| = 2 S the last value stands.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanlm.model.basis import BSpline
from kanlm.model.learned_function import LearnedFunction


@torch.library.custom_op("kanlm::piecewise", mutates_args=())
def piecewise(
    x: Tensor, table: Tensor, offsets: Tensor | None, scale: float, shift: float, last_row: int, degree: int
) -> Tensor:
    """Piecewise polynomials of x [..., C]: [..., C, K].

    Position p = scale x + shift; row floor(p), but at least 0 and at most `last_row`, plus offsets [C] of
    table [R, (k + 1) K] holds the coefficients of (p - row)^0 for K values, then of (p - row)^1, and so on.
    """
    position = x * scale + shift
    row = position.clamp(0, last_row).floor()
    index = row.long() if offsets is None else row.long() + offsets
    u = (position - row).unsqueeze(-1)  # [..., C, 1]
    *lower, value = table[index].chunk(degree + 1, dim=-1)
    for coefficient in reversed(lower):
        value = value * u + coefficient
    return value.clone()


@piecewise.register_fake
def _(x, table, offsets, scale, shift, last_row, degree):
    return x.new_empty(*x.shape, table.shape[1] // (degree + 1))


def piecewise_graph(x, table, offsets, scale, shift, last_row, degree):
    """`piecewise` in operations of ONNX, for `torch.onnx.export(custom_translation_table=...)`."""
    from onnxscript import opset18 as op

    position = op.Add(op.Mul(x, scale), shift)
    row = op.Floor(op.Clip(position, 0.0, float(last_row)))
    index = op.Cast(row, to=7)  # int64
    if offsets is not None:
        index = op.Add(index, offsets)
    u = op.Unsqueeze(op.Sub(position, row), [-1])
    gathered = op.Gather(table, index, axis=0)  # [..., C, (k + 1) K]
    if degree == 0:
        return gathered
    *lower, value = op.Split(gathered, num_outputs=degree + 1, axis=-1)
    for coefficient in reversed(lower):
        value = op.Add(op.Mul(value, u), coefficient)
    return value


STEPS = 128
"""S: values of a sampled function on either side of 0."""
SCALE = STEPS - 1 / 64
"""A little less, so that no x is beyond the last of them (softsign rounds to 1)."""
MAX_SAMPLED = 32
"""Functions of a layer that are sampled; of more, 1 KiB each, the file would grow and caches would miss."""


@torch.library.custom_op("kanlm::nearest", mutates_args=())
def nearest(x: Tensor, values: Tensor, middle: Tensor) -> Tensor:
    """Sampled functions of x [..., C], flat: `values` [R] at row middle [C] + floor(S x / (1 + |x|))."""
    return values[(F.softsign(x) * SCALE + middle).long()].flatten()


@nearest.register_fake
def _(x, values, middle):
    return x.new_empty(x.numel())


def nearest_graph(x, values, middle):
    """`nearest` in operations of ONNX. GatherElements is faster than Gather here, but wants flat rows."""
    from onnxscript import opset18 as op

    row = op.Cast(op.Add(op.Mul(op.Softsign(x), SCALE), middle), to=7)  # int64
    return op.GatherElements(values, op.Reshape(row, [-1]), axis=0)


def translations() -> dict[Any, Any]:
    ops = torch.ops.kanlm
    return {ops.piecewise.default: piecewise_graph, ops.nearest.default: nearest_graph}


def from_row_zero(table: Tensor) -> Tensor:
    """A table [..., G + 2, k + 1] of `LearnedFunction` for `piecewise`, whose row 0 starts a step earlier."""
    table = table.detach().clone()
    table[..., 0, 0] -= table[..., 0, 1]
    return table


def basis_table(basis: BSpline) -> Tensor:
    """Each function of `basis` as polynomials [K, G + 2, k + 1], fp64; see `LearnedFunction.table`."""
    function = LearnedFunction(
        basis.num_functions,
        grid_size=basis.grid_size,
        order=basis.order,
        grid_min=basis.grid_min,
        grid_max=basis.grid_max,
        dtype=torch.float64,
    )
    with torch.no_grad():
        function.coefficients.copy_(torch.eye(basis.num_functions))
        return function.table()


class GraphFunction(nn.Module):
    """`LearnedFunction` by `piecewise`, same outputs."""

    def __init__(self, function: Any):
        super().__init__()
        basis, groups, channels = function.basis, function.groups, function.channels
        table = from_row_zero(function.table()).float()  # [groups, G + 2, k + 1]
        self.register_buffer("table", table.flatten(0, 1).contiguous())
        self.offsets: Tensor | None
        offsets = torch.arange(groups).repeat_interleave(channels // groups) * table.shape[1]
        self.register_buffer("offsets", offsets if groups > 1 else None)
        self.scale, self.shift = 1 / basis.step, 1 - basis.grid_min / basis.step
        self.last_row, self.degree = basis.grid_size + 1, table.shape[2] - 1
        self.has_base = function.base is not None

    def forward(self, a: Tensor, u: Tensor | None = None) -> Tensor:
        phi = piecewise(
            a, self.table, self.offsets, self.scale, self.shift, self.last_row, self.degree
        ).squeeze(-1)
        if self.has_base:
            phi = phi + F.silu(a)
        return phi if u is None else phi * u

    def gated(self, a: Tensor, u: Tensor) -> Tensor:
        return self(a, u)


class SampledFunction(nn.Module):
    """`LearnedFunction` by `nearest`; its errors are those of the module docstring."""

    def __init__(self, function: Any):
        super().__init__()
        groups, width = function.groups, function.channels // function.groups
        place = (torch.arange(2 * STEPS, dtype=torch.float64) + 0.5 - STEPS) / SCALE
        points = place / (1 - place.abs())  # softsign's inverse
        with torch.no_grad():
            values = copy.deepcopy(function).double()(points[:, None].expand(-1, function.channels))
        self.register_buffer("values", values[:, ::width].T.float().flatten())  # [groups 2 S]
        middle = torch.arange(groups).repeat_interleave(width) * 2 * STEPS + STEPS
        self.register_buffer("middle", middle.float())

    def forward(self, a: Tensor, u: Tensor | None = None) -> Tensor:
        phi = nearest(a, self.values, self.middle).view(a.shape)
        return phi if u is None else phi * u

    def gated(self, a: Tensor, u: Tensor) -> Tensor:
        return self(a, u)


class GraphEdges(nn.Module):
    """`KANLinear` by `piecewise` and one matrix product over basis values and base branch."""

    def __init__(self, layer: Any):
        super().__init__()
        basis, inputs, outputs = layer.basis, layer.in_features, layer.out_features
        functions = basis.num_functions
        table = from_row_zero(basis_table(basis))  # [K, G + 2, k + 1]
        self.register_buffer("table", table.permute(1, 2, 0).flatten(1).float().contiguous())
        self.scale, self.shift = 1 / basis.step, 1 - basis.grid_min / basis.step
        self.last_row, self.degree = basis.grid_size + 1, table.shape[2] - 1
        spline = layer.plain_weight().detach().view(outputs, functions, inputs)
        weight = spline.transpose(1, 2).flatten(1)  # [O, I K]
        self.has_base = layer.base is not None
        if self.has_base:
            weight = torch.cat((weight, layer.base.weight.detach()), dim=1)
        self.mix = nn.Linear(weight.shape[1], outputs, bias=False)
        self.mix.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        values = piecewise(
            x, self.table, None, self.scale, self.shift, self.last_row, self.degree
        )  # [..., I, K]
        features = values.flatten(-2)
        if self.has_base:
            features = torch.cat((features, F.silu(x)), dim=-1)
        return self.mix(features)


def with_graph_functions(model: nn.Module, sampled: bool = False) -> nn.Module:
    """A copy of `model` without kernels, its functions replaced by those of this module.

    `sampled`: those that `can_be_sampled` by their values.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        replacement = graph_module(module, sampled)
        if replacement is not None:
            model.set_submodule(name, replacement)
    return model


def can_be_sampled(module: Any) -> bool:
    return type(module).__name__ == "LearnedFunction" and module.groups <= MAX_SAMPLED


def graph_module(module: nn.Module, sampled: bool = False) -> nn.Module | None:
    """What stands for `module` in a graph; None where it is exported as it is.

    By the class' name: a model that was loaded with its own code has classes of its own.
    """
    if getattr(module, "kernel", None) is not None:
        module.kernel = None  # type: ignore[assignment]
    kind = type(module).__name__
    if sampled and can_be_sampled(module):
        return SampledFunction(module)
    if kind == "LearnedFunction" and module.is_spline:
        return GraphFunction(module)
    if kind == "KANLinear" and type(module.basis).__name__ == "BSpline":
        return GraphEdges(module)
    return None
