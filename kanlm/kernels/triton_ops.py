"""Fused Triton implementations for GPUs; under TRITON_INTERPRET=1 the same code runs on CPU tensors.

Shapes: N rows, I in, O out, C channels, K basis functions, G grid intervals, k order; B* are tile sizes.

(1) phi(a) * u with its gradients. Coefficient gradients are summed in two stages without atomics: each
program writes the sums of its rows, and those are added in order; so results repeat bit for bit.
(2) The full-edge layer as a tiled matrix product whose left operand, the basis, is computed in registers
and never written to memory, with the matching products for the gradients of x and of the coefficients.

Not yet run on a GPU; see docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kanlm.kernels import operators
from kanlm.kernels.operators import (
    NO_NORM,
    Operators,
    activation_numbers,
    basis_of,
    contiguous_like,
    function_numbers,
)
from kanlm.kernels.support import RATIONAL, SILU, SPLINE, product_dtype, require_unchanged
from kanlm.model.basis import MAX_ORDER, UNIFORM_PIECES, Basis
from kanlm.model.kan import KANLinear, LearnedFunction

INTERPRETED = triton.knobs.runtime.interpret
FUNCTION_ORDER = MAX_ORDER
"""Highest order of the splines of a learned function."""


@triton.jit
def product(a, b, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """a @ b in fp32. WIDE widens the operands first: the interpreter multiplies the bit patterns of bf16."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def place(x, lo, inv_h, G: tl.constexpr):
    """Cell, position r in [0, 1] and excess e of x; outside the grid e is not zero."""
    t = (x - lo) * inv_h
    cell = tl.minimum(tl.maximum(tl.floor(t), 0.0), G - 1.0)
    cell = tl.where(t == t, cell, 0.0)
    local = t - cell
    r = tl.where(local < 0.0, 0.0, tl.where(local > 1.0, 1.0, local))
    return cell.to(tl.int32), r, local - r


@triton.jit
def pieces(r, ORDER: tl.constexpr):
    """The functions that are not zero in a cell, at r; four of them, the last ones zero below order 3."""
    q = 1.0 - r
    if ORDER == 1:
        return q, r, r * 0.0, r * 0.0
    elif ORDER == 2:
        return 0.5 * q * q, 0.5 + r * q, 0.5 * r * r, r * 0.0
    else:
        p1 = (0.5 * r - 1.0) * r * r + 0.6666666666666666
        p2 = (0.5 * q - 1.0) * q * q + 0.6666666666666666
        return q * q * q * 0.16666666666666666, p1, p2, r * r * r * 0.16666666666666666


@triton.jit
def slopes(r, ORDER: tl.constexpr):
    """Derivatives of `pieces` by r."""
    q = 1.0 - r
    if ORDER == 1:
        return r * 0.0 - 1.0, r * 0.0 + 1.0, r * 0.0, r * 0.0
    elif ORDER == 2:
        return -q, 1.0 - 2.0 * r, r, r * 0.0
    else:
        return -0.5 * q * q, (1.5 * r - 2.0) * r, (2.0 - 1.5 * q) * q, 0.5 * r * r


@triton.jit
def chosen(distance, p0, p1, p2, p3):
    """p_distance, or 0 where distance is not 0..3."""
    low = tl.where(distance == 0, p0, tl.where(distance == 1, p1, 0.0))
    return low + tl.where(distance == 2, p2, tl.where(distance == 3, p3, 0.0))


@triton.jit
def values_at(x, lo, inv_h, G: tl.constexpr, ORDER: tl.constexpr):
    """Cell of x and the values of its functions."""
    cell, r, e = place(x, lo, inv_h, G)
    p0, p1, p2, p3 = pieces(r, ORDER)
    d0, d1, d2, d3 = slopes(r, ORDER)
    return cell, p0 + e * d0, p1 + e * d1, p2 + e * d2, p3 + e * d3


@triton.jit
def edge_forward_kernel(
    x_ptr, w_ptr, base_ptr, y_ptr, N, I, O, lo, inv_h,  # noqa: E741
    K: tl.constexpr, G: tl.constexpr, ORDER: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """y [N, O] = sum over i, m of B_m(x [N, I]) w [O, K, I], plus silu(x) base [O, I]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    outs = tl.program_id(1) * BO + tl.arange(0, BO)
    total = tl.zeros((BN, BO), tl.float32)
    for start in range(0, I, BI):
        ins = start + tl.arange(0, BI)
        inside = (rows[:, None] < N) & (ins[None, :] < I)
        x = tl.load(x_ptr + rows[:, None] * I + ins[None, :], mask=inside, other=0.0).to(tl.float32)
        cell, p0, p1, p2, p3 = values_at(x, lo, inv_h, G, ORDER)
        w_mask = (ins[:, None] < I) & (outs[None, :] < O)
        w_at = w_ptr + outs[None, :].to(tl.int64) * (K * I) + ins[:, None]  # [BI, BO]
        for m in range(K):
            w = tl.load(w_at + m * I, mask=w_mask, other=0.0)
            feature = chosen(m - cell, p0, p1, p2, p3).to(w.dtype)
            total += product(feature, w, PRECISION, WIDE)
        if BASE:
            w = tl.load(base_ptr + outs[None, :] * I + ins[:, None], mask=w_mask, other=0.0)
            total += product((x * tl.sigmoid(x)).to(w.dtype), w, PRECISION, WIDE)
    y_at = y_ptr + rows[:, None].to(tl.int64) * O + outs[None, :]
    tl.store(y_at, total, mask=(rows[:, None] < N) & (outs[None, :] < O))


@triton.jit
def edge_input_gradient_kernel(
    x_ptr, w_ptr, base_ptr, g_ptr, dx_ptr, N, I, O, lo, inv_h,  # noqa: E741
    K: tl.constexpr, G: tl.constexpr, ORDER: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dx [N, I] = sum over m of B_m'(x) (g [N, O] w [O, m, I]), plus silu'(x) (g base)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    ins = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = (rows[:, None] < N) & (ins[None, :] < I)
    x = tl.load(x_ptr + rows[:, None] * I + ins[None, :], mask=inside, other=0.0).to(tl.float32)
    cell, r, e = place(x, lo, inv_h, G)
    d0, d1, d2, d3 = slopes(r, ORDER)
    total = tl.zeros((BN, BI), tl.float32)
    for m in range(K):
        partial = tl.zeros((BN, BI), tl.float32)
        for start in range(0, O, BO):
            outs = start + tl.arange(0, BO)
            g_mask = (rows[:, None] < N) & (outs[None, :] < O)
            g = tl.load(g_ptr + rows[:, None].to(tl.int64) * O + outs[None, :], mask=g_mask, other=0.0)
            w_mask = (outs[:, None] < O) & (ins[None, :] < I)
            w_at = w_ptr + outs[:, None].to(tl.int64) * (K * I) + m * I + ins[None, :]
            w = tl.load(w_at, mask=w_mask, other=0.0)  # [BO, BI]
            partial += product(g, w, PRECISION, WIDE)
        total += partial * chosen(m - cell, d0, d1, d2, d3)
    total *= inv_h
    if BASE:
        partial = tl.zeros((BN, BI), tl.float32)
        for start in range(0, O, BO):
            outs = start + tl.arange(0, BO)
            g_mask = (rows[:, None] < N) & (outs[None, :] < O)
            g = tl.load(g_ptr + rows[:, None].to(tl.int64) * O + outs[None, :], mask=g_mask, other=0.0)
            w_mask = (outs[:, None] < O) & (ins[None, :] < I)
            w = tl.load(base_ptr + outs[:, None] * I + ins[None, :], mask=w_mask, other=0.0)
            partial += product(g, w, PRECISION, WIDE)
        sigmoid = tl.sigmoid(x)
        total += partial * sigmoid * (1.0 + x * (1.0 - sigmoid))
    tl.store(dx_ptr + rows[:, None] * I + ins[None, :], total, mask=inside)


@triton.jit
def edge_coefficient_gradient_kernel(
    x_ptr, g_ptr, dw_ptr, dbase_ptr, N, I, O, lo, inv_h,  # noqa: E741
    K: tl.constexpr, G: tl.constexpr, ORDER: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dw [O, m, I] = g^T B_m(x) for one m a program; m = K is the base: dbase [O, I] = g^T silu(x)."""
    ins = tl.program_id(0) * BI + tl.arange(0, BI)
    outs = tl.program_id(1) * BO + tl.arange(0, BO)
    m = tl.program_id(2)
    total = tl.zeros((BO, BI), tl.float32)
    for start in range(0, N, BN):
        rows = start + tl.arange(0, BN)
        inside = (rows[:, None] < N) & (ins[None, :] < I)
        x = tl.load(x_ptr + rows[:, None] * I + ins[None, :], mask=inside, other=0.0).to(tl.float32)
        g_mask = (rows[None, :] < N) & (outs[:, None] < O)
        g = tl.load(
            g_ptr + rows[None, :].to(tl.int64) * O + outs[:, None], mask=g_mask, other=0.0
        )  # [BO, BN]
        if m == K:
            feature = x * tl.sigmoid(x)
        else:
            cell, p0, p1, p2, p3 = values_at(x, lo, inv_h, G, ORDER)
            feature = chosen(m - cell, p0, p1, p2, p3)
        total += product(g, feature.to(g.dtype), PRECISION, WIDE)
    mask = (outs[:, None] < O) & (ins[None, :] < I)
    if m == K:
        tl.store(dbase_ptr + outs[:, None] * I + ins[None, :], total, mask=mask)
    else:
        tl.store(dw_ptr + outs[:, None].to(tl.int64) * (K * I) + m * I + ins[None, :], total, mask=mask)


@triton.jit
def phi_at(table_ptr, group, cell, r, e, G: tl.constexpr, ORDER: tl.constexpr):
    """Value and slope (by r) of the group's spline; its table [ORDER + 1, G] holds powers of r."""
    at = table_ptr + group * ((ORDER + 1) * G) + cell
    value = tl.load(at + ORDER * G)
    slope = value * 0.0
    for back in tl.static_range(ORDER):
        slope = slope * r + value
        value = value * r + tl.load(at + (ORDER - 1 - back) * G)
    return value + e * slope, slope


@triton.jit
def rational_at(table_ptr, group, x):
    """Value and slope of the group's P/Q at x, both terms of Q without its 1, and 1 / Q; 10 coefficients."""
    at = table_ptr + group * 10
    p = tl.load(at + 5) + x * 0.0
    dp = x * 0.0
    for back in tl.static_range(5):
        dp = dp * x + p
        p = p * x + tl.load(at + 4 - back)
    q0, q1, q2, q3 = tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9)
    first, second = (q0 + q1 * x) * x, (q2 + q3 * x) * x
    inverse = 1.0 / (1.0 + first * first + second * second)
    value = p * inverse
    dq = 2.0 * (first * (q0 + 2.0 * q1 * x) + second * (q2 + 2.0 * q3 * x))
    return value, (dp - value * dq) * inverse, first, second, inverse


@triton.jit
def learned_forward_kernel(
    a_ptr, u_ptr, y_ptr, table_ptr, total, C, width, lo, inv_h,
    G: tl.constexpr, ORDER: tl.constexpr, SILU: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = phi(a) * u, every tensor of `total` values in rows of C, groups of `width` neighbours."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
    value = a * 0.0
    if KIND == 0:
        cell, r, e = place(a, lo, inv_h, G)
        value, _ = phi_at(table_ptr, (at % C) // width, cell, r, e, G, ORDER)
    if KIND == 1:
        value, _, _, _, _ = rational_at(table_ptr, (at % C) // width, a)
    if SILU:
        value += a * tl.sigmoid(a)
    if GATED:
        value *= tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, value, mask=mask)


@triton.jit
def sum_by_cell(here, terms):
    """Sums [CELLS] of terms [n] over here [n, CELLS]."""
    return tl.sum(tl.where(here, terms[:, None], 0.0), 0)


@triton.jit
def learned_backward_kernel(
    a_ptr, u_ptr, g_ptr, da_ptr, du_ptr, table_ptr, partial_ptr, N, C, width, lo, inv_h,
    G: tl.constexpr, ORDER: tl.constexpr, SILU: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
    CELLS: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """da and du of ROWS rows of one group, and that block's sums for the group's table.

    A spline's table is [ORDER + 1, G], and CELLS >= G is a power of two; a rational function's is [10].
    """
    block, group = tl.program_id(0), tl.program_id(1)
    one_hot = tl.arange(0, CELLS)
    sum0 = tl.zeros((CELLS,), tl.float32)
    sum1, sum2, sum3, sum4, sum5 = sum0, sum0, sum0, sum0, sum0
    p0 = tl.zeros((BR * BC,), tl.float32)
    p1, p2, p3, p4, p5 = p0, p0, p0, p0, p0
    q0, q1, q2, q3 = p0, p0, p0, p0
    for row in range(0, ROWS, BR):
        rows = block * ROWS + row + tl.arange(0, BR)
        for start in range(0, width, BC):
            local = start + tl.arange(0, BC)
            at = rows[:, None].to(tl.int64) * C + (group * width + local)[None, :]
            mask = (rows[:, None] < N) & (local[None, :] < width)
            at = tl.reshape(at, (BR * BC,))
            mask = tl.reshape(mask, (BR * BC,))
            a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
            value, slope = a * 0.0, a * 0.0
            weight = g
            if GATED:
                weight = g * tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if KIND == 0:
                cell, r, e = place(a, lo, inv_h, G)
                value, slope = phi_at(table_ptr, group, cell, r, e, G, ORDER)
                slope *= inv_h
                here = cell[:, None] == one_hot[None, :]  # [BR * BC, CELLS]
                # d phi / d coefficient_j = r^j + e j r^(j-1)
                power = weight * r
                sum0 += sum_by_cell(here, weight)
                sum1 += sum_by_cell(here, weight * (r + e))
                if ORDER > 1:
                    sum2 += sum_by_cell(here, power * (r + 2.0 * e))
                    power *= r
                if ORDER > 2:
                    sum3 += sum_by_cell(here, power * (r + 3.0 * e))
                    power *= r
                if ORDER > 3:
                    sum4 += sum_by_cell(here, power * (r + 4.0 * e))
                    power *= r
                if ORDER > 4:
                    sum5 += sum_by_cell(here, power * (r + 5.0 * e))
            if KIND == 1:
                value, slope, first, second, inverse = rational_at(table_ptr, group, a)
                power = weight * inverse
                shared = -2.0 * power * value * a
                p0 += power
                power *= a
                p1 += power
                power *= a
                p2 += power
                power *= a
                p3 += power
                power *= a
                p4 += power
                p5 += power * a
                q0 += shared * first
                q1 += shared * first * a
                q2 += shared * second
                q3 += shared * second * a
            if SILU:
                sigmoid = tl.sigmoid(a)
                value += a * sigmoid
                slope += sigmoid * (1.0 + a * (1.0 - sigmoid))
            tl.store(da_ptr + at, weight * slope, mask=mask)
            if GATED:
                tl.store(du_ptr + at, g * value, mask=mask)
    number = block * tl.num_programs(1) + group
    if KIND == 0:
        out = partial_ptr + number * ((ORDER + 1) * G) + one_hot
        used = one_hot < G
        tl.store(out, sum0, mask=used)
        tl.store(out + G, sum1, mask=used)
        if ORDER > 1:
            tl.store(out + 2 * G, sum2, mask=used)
        if ORDER > 2:
            tl.store(out + 3 * G, sum3, mask=used)
        if ORDER > 3:
            tl.store(out + 4 * G, sum4, mask=used)
        if ORDER > 4:
            tl.store(out + 5 * G, sum5, mask=used)
    if KIND == 1:
        out = partial_ptr + number * 10
        tl.store(out, tl.sum(p0, 0))
        tl.store(out + 1, tl.sum(p1, 0))
        tl.store(out + 2, tl.sum(p2, 0))
        tl.store(out + 3, tl.sum(p3, 0))
        tl.store(out + 4, tl.sum(p4, 0))
        tl.store(out + 5, tl.sum(p5, 0))
        tl.store(out + 6, tl.sum(q0, 0))
        tl.store(out + 7, tl.sum(q1, 0))
        tl.store(out + 8, tl.sum(q2, 0))
        tl.store(out + 9, tl.sum(q3, 0))


def _tiles() -> dict[str, int]:
    """Tile sizes of the matrix products; small ones where every program is interpreted."""
    if INTERPRETED:
        return {"BN": 32, "BI": 16, "BO": 32}
    return {"BN": 128, "BI": 32, "BO": 128, "num_warps": 8, "num_stages": 3}


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _edge_meta(basis: Basis, dtype: torch.dtype) -> dict:
    return {
        "K": basis.num_functions,
        "G": basis.grid_size,
        "ORDER": basis.order,
        "PRECISION": _precision(dtype),
        "WIDE": INTERPRETED,
        **_tiles(),
    }


class _Edge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, base, basis, dtype):
        x = x.contiguous()
        ctx.save_for_backward(x, weight, base)
        ctx.basis, ctx.dtype = basis, dtype
        return _edge_output(x, weight, base, basis, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[:3]
        return *_edge_gradients(grad, *ctx.saved_tensors, ctx.basis, ctx.dtype, wanted), None, None


def _edge_output(x: Tensor, weight: Tensor, base: Tensor | None, basis: Basis, dtype: torch.dtype) -> Tensor:
    """y [N, O] in dtype of contiguous x [N, I]."""
    cast = weight.to(dtype).contiguous()
    cast_base = None if base is None else base.to(dtype).contiguous()
    rows, inputs, outputs = len(x), x.shape[1], len(weight)
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    meta = _edge_meta(basis, dtype)
    grid = (triton.cdiv(rows, meta["BN"]), triton.cdiv(outputs, meta["BO"]))
    edge_forward_kernel[grid](
        *(x, cast, cast_base, y, rows, inputs, outputs, basis.grid_min, 1 / basis.step),
        BASE=base is not None,
        **meta,
    )
    return y


def _edge_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    basis: Basis,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by x [N, I], weight [O, K * I] and base [O, I], where they are wanted; grad [N, O]."""
    grad = grad.to(dtype).contiguous()
    rows, inputs, outputs = len(x), x.shape[1], len(weight)
    meta = _edge_meta(basis, dtype)
    sizes = (rows, inputs, outputs, basis.grid_min, 1 / basis.step)
    wants_x, wants_weight, wants_base = wanted
    dx = dw = dbase = None
    if wants_x:
        dx = torch.empty_like(x)
        cast_base = None if base is None else base.to(dtype).contiguous()
        grid = (triton.cdiv(rows, meta["BN"]), triton.cdiv(inputs, meta["BI"]))
        edge_input_gradient_kernel[grid](
            *(x, weight.to(dtype).contiguous(), cast_base, grad, dx, *sizes),
            BASE=base is not None,
            **meta,
        )
    if wants_weight or wants_base:
        dw = contiguous_like(weight)
        dbase = None if base is None else contiguous_like(base)
        functions = basis.num_functions + (base is not None)
        blocks = (triton.cdiv(inputs, meta["BI"]), triton.cdiv(outputs, meta["BO"]), functions)
        edge_coefficient_gradient_kernel[blocks](x, grad, dw, dbase, *sizes, **meta)
    return dx, dw if wants_weight else None, dbase if wants_base else None


def edge(layer: KANLinear, x: Tensor) -> Tensor:
    """KANLinear: x [..., I] to [..., O]."""
    if torch.compiler.is_compiling():
        return operators.edge(OPERATORS, layer, x)
    require_unchanged(layer)
    weight = layer.spline.weight
    base = None if layer.base is None else layer.base.weight
    flat = x.reshape(-1, layer.in_features)
    y = _Edge.apply(flat, layer.plain_weight(), base, layer.basis, product_dtype(x, weight))
    return y.view(*x.shape[:-1], layer.out_features)


ROWS, TILE_ROWS, TILE_CHANNELS = (64, 16, 16) if INTERPRETED else (512, 8, 32)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, u, coefficients, function):
        a, u = a.contiguous(), None if u is None else u.contiguous()
        tables = function.tables(coefficients)
        ctx.save_for_backward(a, u, coefficients, tables)
        ctx.function = function
        return _elementwise_output(a, u, tables, function)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[2]
        return *_elementwise_gradients(grad, *ctx.saved_tensors, ctx.function, wanted), None


def _elementwise_output(a: Tensor, u: Tensor | None, tables: Tensor | None, function: _Plan) -> Tensor:
    """phi(a) * u of contiguous tensors."""
    y = torch.empty_like(a)
    block = 1024
    learned_forward_kernel[(triton.cdiv(a.numel(), block),)](
        *(a, u, y, tables, a.numel(), function.channels, function.channels // function.groups),
        *(function.low, function.inverse),
        **function.meta,
        GATED=u is not None,
        BLOCK=block,
    )
    return y


def _elementwise_gradients(
    grad: Tensor,
    a: Tensor,
    u: Tensor | None,
    coefficients: Tensor | None,
    tables: Tensor | None,
    function: _Plan,
    wanted: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients by contiguous a and u and, where they are wanted, the coefficients."""
    grad = grad.contiguous()
    da, du = torch.empty_like(a), None if u is None else torch.empty_like(u)
    rows = a.numel() // function.channels
    blocks, groups = triton.cdiv(rows, ROWS), function.groups
    partial = None
    if tables is not None:
        partial = torch.empty(blocks, groups, tables.numel() // groups, dtype=torch.float32, device=a.device)
    cells = max(16, triton.next_power_of_2(function.meta["G"]))
    learned_backward_kernel[(blocks, groups)](
        *(a, u, grad, da, du, tables, partial, rows, function.channels, function.channels // groups),
        *(function.low, function.inverse),
        **function.meta,
        GATED=u is not None,
        CELLS=cells,
        ROWS=ROWS,
        BR=TILE_ROWS,
        BC=TILE_CHANNELS,
    )
    dc = None
    if partial is not None and coefficients is not None and wanted:
        dc = function.coefficient_gradient(partial.double().sum(0), coefficients)
    return da, du, dc


class _Plan:
    """What a launch needs to know of a function beside its coefficients."""

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        basis: Basis | None = None,
        *,
        rational: bool = False,
        silu: bool = False,
    ):
        self.channels, self.groups, self.basis = channels, groups, basis
        self.low, self.inverse = (0.0, 1.0) if basis is None else (basis.grid_min, 1 / basis.step)
        self.meta = {
            "G": 1 if basis is None else basis.grid_size,
            "ORDER": 1 if basis is None else basis.order,
            "SILU": silu,
            "KIND": SPLINE if basis is not None else RATIONAL if rational else SILU,
        }

    def tables(self, coefficients: Tensor | None) -> Tensor | None:
        """coefficients [groups, K] as the kernels read them, fp32: splines as [groups, k + 1, G]."""
        if coefficients is None or self.basis is None:
            return None if coefficients is None else coefficients.float().contiguous()
        windows = coefficients.float().unfold(-1, self.basis.order + 1, 1)  # [groups, G, k+1]
        return (windows @ self._pieces(windows)).transpose(1, 2).contiguous()

    def coefficient_gradient(self, sums: Tensor, coefficients: Tensor) -> Tensor:
        """The gradient of the tables [groups, size] fp64 as that of the coefficients."""
        if self.basis is None:
            return sums.to(coefficients.dtype)
        order, cells = self.basis.order, self.basis.grid_size
        by_function = self._pieces(sums) @ sums.view(self.groups, order + 1, cells)  # [groups, k+1, G]
        total = sums.new_zeros(coefficients.shape)
        for j in range(order + 1):
            total[:, j : j + cells] += by_function[:, j]
        return total.to(coefficients.dtype)

    def _pieces(self, like: Tensor) -> Tensor:
        """[k + 1 functions, k + 1 powers]."""
        assert self.basis is not None
        return torch.tensor(UNIFORM_PIECES[self.basis.order], dtype=like.dtype, device=like.device)


def learned(layer: LearnedFunction, a: Tensor, u: Tensor | None) -> Tensor:
    """LearnedFunction: phi(a) * u, or phi(a) where u is None; [..., C]."""
    if torch.compiler.is_compiling():
        return OPERATORS.elementwise(a, u, layer.coefficients, *function_numbers(layer), *NO_NORM)
    basis = None if layer.is_rational else layer.basis
    function = _Plan(
        layer.channels, layer.groups, basis, rational=layer.is_rational, silu=layer.base is not None
    )
    return _Elementwise.apply(a, u, layer.coefficients, function)


def activation(function: Callable) -> Callable | None:
    """The kernel (module, a, u) -> SiLU(a) * u of a SwiGLU; torch fuses the ungated activations."""
    return _silu if function is F.silu else None


def _silu(module: Any, a: Tensor, u: Tensor) -> Tensor:
    a, u = module.normalize(a), module.normalize(u)
    if torch.compiler.is_compiling():
        return OPERATORS.elementwise(a, u, None, *activation_numbers(SILU, a.shape[-1]), *NO_NORM)
    return _Elementwise.apply(a, u, None, _Plan(a.shape[-1], silu=True))


apply_normed = norm = learned_product = None
"""No kernel here norms hidden values, which torch does, or has two functions."""


def _plan_from(kind, channels, groups, order, cells, low, high, silu, *norms) -> _Plan:
    """Of an operator's numbers."""
    basis = basis_of(order, cells, low, high) if kind == SPLINE else None
    return _Plan(channels, groups, basis, rational=kind == RATIONAL, silu=silu or kind == SILU)


def _elementwise_operator(a: Tensor, u: Tensor | None, coefficients: Tensor | None, *numbers) -> Tensor:
    function = _plan_from(*numbers)
    second = None if u is None else u.contiguous()
    return _elementwise_output(a.contiguous(), second, function.tables(coefficients), function)


def _elementwise_gradient_operator(grad, a, u, coefficients, *numbers):
    *numbers, wanted = numbers
    function = _plan_from(*numbers)
    tables, second = function.tables(coefficients), None if u is None else u.contiguous()
    return _elementwise_gradients(grad, a.contiguous(), second, coefficients, tables, function, wanted)


def _edge_operator(x, weight, base, order, cells, low, high, dtype) -> Tensor:
    return _edge_output(x.contiguous(), weight, base, basis_of(order, cells, low, high), dtype)


def _edge_gradient_operator(grad, x, weight, base, order, cells, low, high, dtype, wanted):
    basis = basis_of(order, cells, low, high)
    return _edge_gradients(grad, x.contiguous(), weight, base, basis, dtype, wanted)


OPERATORS = Operators(
    "triton", _elementwise_operator, _elementwise_gradient_operator, _edge_operator, _edge_gradient_operator
)
