"""Cached decoding at batch 1 as one native call a token (decode.cpp), for models in fp32 on a CPU.

    decoder = NativeDecoder(model)
    logits = decoder.prefill(ids)        # [V], by the model's own forward pass
    logits = decoder.step(int(logits.argmax()))

The weights are packed once, so a decoder is a snapshot of its model. A feed-forward block is not known by
name: torch.fx traces its forward pass, and every operation in it has a native counterpart or the model is
refused.

Shapes: V vocabulary, D hidden size, I inputs, O outputs, W columns of a tile, K functions, G grid intervals,
H heads, C key-value heads, E head dim, S positions of the cache.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from kanlm.kernels.native import NativeUnavailable, load, pointer
from kanlm.kernels.support import is_plain_linear
from kanlm.model.basis import UNIFORM_PIECES, Basis, BSpline, Fourier
from kanlm.model.ffn import XIELU, PolyNorm
from kanlm.model.kan import KANLinear, LearnedFunction
from kanlm.model.modeling_kanlm import (
    CACHE,
    KanLMDecoderLayer,
    KanLMForCausalLM,
    KanLMModel,
)

SOURCE = Path(__file__).with_name("decode.cpp")
KINDS = (
    "embed norm matrix attention table short_table rational silu gelu relu square xielu polynorm multiply "
    "add edge features"
).split()
"""As the Kind of decode.cpp."""
PRODUCTS = ("table", "short_table", "rational", "silu", "gelu", "relu", "square", "xielu")
"""Those that multiply what they compute by a second input."""
CUBIC, SHORT = 4, 16
"""Coefficients of a piece, and cells, of a table that stays in registers."""
ALIGNMENT = 64
"""Bytes of a line of a cache."""
TABLE_ERROR = 1e-6
"""Largest error of a tabulated function, relative to its largest value on the grid."""
Weights = Literal["float32", "int8"]
log = logging.getLogger(__name__)
_logged: set[str] = set()


class NotServed(ValueError):
    """The model cannot be decoded natively; the message says why."""


class Operation(ctypes.Structure):
    """struct Operation of decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "barrier", "accumulate", "int8")),
        *((name, ctypes.c_void_p) for name in ("a", "u", "y", "w", "s")),
        *((name, ctypes.c_int64) for name in ("I", "O", "K")),
        *((name, ctypes.c_int32) for name in ("order", "cells", "groups", "silu", "periodic")),
        *((name, ctypes.c_float) for name in ("lo", "inv_h", "eps")),
    ]


class Decoder(ctypes.Structure):
    """struct Decoder of decode.cpp."""

    _fields_ = [
        ("operations", ctypes.POINTER(Operation)),
        *((name, ctypes.c_int64) for name in ("count", "capacity")),
        *((name, ctypes.c_void_p) for name in ("embedding", "cosines", "sines", "scores")),
    ]


@cache
def library() -> ctypes.CDLL:
    """The compiled decode.cpp.

    Raises:
        NativeUnavailable: it cannot be built or loaded here.
    """
    loaded = load(SOURCE, {"kanlm_decode_step": "plli", "kanlm_decode_tile": ""})
    loaded.kanlm_decode_tile.restype = ctypes.c_int64
    return loaded


def reason_not_served(model: nn.Module) -> str | None:
    """Why `model` as a whole cannot be decoded natively, or None; its blocks are judged by `Program`."""
    if not computes(model, KanLMForCausalLM):
        return f"the model is a {type(model).__name__}, not kanlm's own"
    assert isinstance(model, KanLMForCausalLM)
    tensors = list(model.parameters())
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "the model is not on the CPU"
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return "the model is not in float32"
    config = model.config
    if config._attn_implementation not in ("sdpa", "eager", None):
        return f"its attention implementation is {config._attn_implementation!r}, not sdpa or eager"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None):
        return "its attention sees a part of the text only (sliding_window, layer_types)"
    parts: list[tuple[nn.Module, type[nn.Module]]] = [
        (model.model, KanLMModel),
        (model.model.embed_tokens, nn.Embedding),
        (model.model.norm, nn.RMSNorm),
    ]
    for layer in model.model.layers:
        parts += [(layer, KanLMDecoderLayer), (layer.self_attn, LlamaAttention)]
        parts += [(layer.input_layernorm, nn.RMSNorm), (layer.post_attention_layernorm, nn.RMSNorm)]
    for part, kind in parts:
        if not computes(part, kind):
            return f"it has a {type(part).__name__} in place of {kind.__name__}"
    if model.model.rotary_emb.rope_type != "default":
        return f"its rotary embeddings are scaled (rope_type {model.model.rotary_emb.rope_type!r})"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has a hook or another forward method"
    return None


def computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` is that of `kind`: an instance, whose class has no forward of its own."""
    return isinstance(module, kind) and type(module).forward is kind.forward


class NativeDecoder:
    """Logits of one token after the other, batch 1.

    weights: "int8" keeps every matrix in 8 bits with a scale for each output: a quarter of the bytes, and
        other logits; `weight_error` is the relative rms error of the weights.
    max_length: positions of the cache; default all that the model has.
    threads: default: one or torch's number, whichever is faster here and now, measured on a few tokens.
        Logits do not depend on it.

    Raises:
        NotServed: the model cannot be decoded natively.
        NativeUnavailable: no compiler here.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: Weights = "float32",
        max_length: int | None = None,
        threads: int | None = None,
    ):
        if reason := reason_not_served(model):
            raise NotServed(reason)
        assert isinstance(model, KanLMForCausalLM)
        if weights not in ("float32", "int8"):
            raise ValueError(f"weights: expected float32 or int8, got {weights!r}")
        self.model = model
        self.capacity = max_length or model.config.max_position_embeddings
        self.length = 0
        with torch.no_grad():
            self._program = Program(model, self.capacity, weights == "int8")
        self.weight_error = self._program.weight_error()
        self.weight_bytes = self._program.weight_bytes
        most = torch.get_num_threads()
        self._decoder = self._program.decoder(max(most, threads or 1))
        self._step = library().kanlm_decode_step
        self.threads = threads or self._faster_threads(most)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Forget what was read and read `ids`; the logits [V] after the last."""
        prompt = torch.as_tensor(ids, dtype=torch.long).reshape(1, -1)
        self._check_room(0, prompt.shape[1])
        output = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        self.length = prompt.shape[1]
        for layer, kept in enumerate(getattr(output, CACHE).layers):
            self._program.cache[layer, 0, :, : self.length] = kept.keys[0]
            self._program.cache[layer, 1, :, : self.length] = kept.values[0]
        return output.logits[0, -1]

    def step(self, token: int) -> Tensor:
        """Read one token; the logits [V] after it.

        Raises:
            ValueError: a token outside the vocabulary, or no room left in the cache.
        """
        self._check_room(self.length, 1)
        if not 0 <= token < self._program.vocab_size:
            raise ValueError(f"token: must lie in 0..{self._program.vocab_size - 1}, got {token}")
        self._step(ctypes.addressof(self._decoder), token, self.length, self.threads)
        self.length += 1
        return self._program.logits.clone()

    def _check_room(self, length: int, more: int) -> None:
        if length + more > self.capacity:
            raise ValueError(
                f"max_length: {length + more} tokens do not fit the cache of {self.capacity} positions; "
                "give a larger max_length, at most the model's max_position_embeddings"
            )

    def _faster_threads(self, most: int, tokens: int = 4, rounds: int = 5) -> int:
        """1 or `most`; the tokens that measure it are written where the first ones of a text will be."""
        if most == 1:
            return 1
        seconds: dict[int, list[float]] = {1: [], most: []}
        address = ctypes.addressof(self._decoder)
        for _ in range(rounds):
            for threads, taken in seconds.items():
                start = time.perf_counter()
                for at in range(min(tokens, self.capacity)):
                    self._step(address, 0, at, threads)
                taken.append(time.perf_counter() - start)
        return min(seconds, key=lambda threads: statistics.median(seconds[threads]))


def native_decoder(model: nn.Module, **settings: Any) -> NativeDecoder | None:
    """A decoder of `model`, or None where there cannot be one, which one line in the log explains, once."""
    try:
        return NativeDecoder(model, **settings)
    except (NotServed, NativeUnavailable) as reason:
        say_once(f"decoding: the model's own forward pass ({reason})")
    return None


def say_once(message: str) -> None:
    """A warning in the log, which without settings is a line on standard error."""
    if message not in _logged:
        _logged.add(message)
        log.warning(message)


class Value:
    """A vector in the decoder's memory."""

    def __init__(self, memory: Tensor):
        self.memory, self.size = memory, memory.numel()


class LargePages:
    """Tensors one after the other in memory of large pages, where the system has them.

    A token reads every weight once: in pages of 4 KiB it looks up an address for every 32 rows of a tile.
    """

    CHUNK = 1 << 25

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        whole = -(-size // ALIGNMENT) * ALIGNMENT
        if len(self._free) < whole:
            # Nothing of it takes memory before it is written to.
            memory = mmap.mmap(-1, max(self.CHUNK, whole))
            with suppress(AttributeError, OSError):  # another system, or a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(memory, dtype=torch.uint8)
        taken, self._free = self._free[:size], self._free[whole:]
        return taken.view(dtype).view(*shape)


class Program:
    """The operations of one token through `model`, and what they read and write."""

    def __init__(self, model: KanLMForCausalLM, capacity: int, int8: bool):
        config: Any = model.config
        self.operations: list[Operation] = []
        self.int8, self.capacity, self.vocab_size = int8, capacity, config.vocab_size
        self.weight_bytes = 0
        self._kept: list[Tensor] = []
        self._weights = LargePages()
        self._squares = [0.0, 0.0]
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._written: set[int] = set()
        self._read: set[int] = set()
        heads = config.num_key_value_heads
        layers = model.model.layers[: config.num_hidden_layers]
        self.cache = torch.zeros(len(layers), 2, heads, capacity, config.head_dim)
        self.embedding = self.keep_alive(model.model.embed_tokens.weight)
        positions = torch.arange(capacity).unsqueeze(0)
        angles = model.model.rotary_emb(torch.zeros(1), positions)
        half = config.head_dim // 2
        self.cosines, self.sines = (self.keep_alive(angle[0, :, :half]) for angle in angles)

        stream = Value(self.keep_alive(torch.empty(config.hidden_size)))
        self.add("embed", y=stream, I=stream.size)
        for index, layer in enumerate(layers):
            self._count = 0
            self.attention(layer, index, stream)
            self.block(layer.mlp, self.norm(layer.post_attention_layernorm, stream), stream)
        self._count = 0
        last = self.norm(model.model.norm, stream)
        self.logits = torch.empty(config.vocab_size)
        self.linear([model.lm_head], last, Value(self.logits))

    def decoder(self, threads: int) -> Decoder:
        """What the library takes; `self` must live as long."""
        self.scores = torch.empty(threads, self.capacity)
        self.array = (Operation * len(self.operations))(*self.operations)
        return Decoder(
            *(self.array, len(self.operations), self.capacity),
            *(pointer(part) for part in (self.embedding, self.cosines, self.sines, self.scores)),
        )

    def weight_error(self) -> float:
        """rms(packed - weight) / rms(weight) over all matrices; 0 without int8."""
        error, size = self._squares
        return (error / size) ** 0.5 if size else 0.0

    def keep_alive(self, tensor: Tensor) -> Tensor:
        """`tensor` contiguous in fp32 (int8 stays), kept alive; a copy, where it was not so already."""
        kept = tensor.detach()
        kept = (kept if kept.dtype == torch.int8 else kept.float()).contiguous()
        self._kept.append(kept)
        return kept

    def new_vector(self, size: int) -> Value:
        """Memory for a vector; the layers share it, as each only reads what it wrote itself."""
        self._count += 1
        key = self._count, size
        if key not in self._buffers:
            self._buffers[key] = torch.empty(size)
        return Value(self._buffers[key])

    def add(self, kind: str, y: Value, a: Value | None = None, u: Value | None = None, **fields) -> Value:
        """One operation; it waits for the other threads where it uses what they may still write or read."""
        reads = {value.memory.data_ptr() for value in (a, u) if value is not None}
        writes = {y.memory.data_ptr()}
        if kind in ("attention", "edge"):  # which write to an input
            writes |= reads
        if fields.get("accumulate"):
            reads |= writes
        waits = bool(reads & self._written or writes & (self._written | self._read))
        if waits:
            self._written, self._read = set(), set()
        self._written |= writes
        self._read |= reads
        tensors = {name: fields.pop(name) for name in ("w", "s") if fields.get(name) is not None}
        self.operations.append(
            Operation(
                kind=KINDS.index(kind),
                barrier=waits,
                y=pointer(y.memory),
                a=None if a is None else pointer(a.memory),
                u=None if u is None else pointer(u.memory),
                **{name: pointer(tensor) for name, tensor in tensors.items()},
                **fields,
            )
        )
        return y

    def norm(self, layer: nn.RMSNorm, a: Value) -> Value:
        return self.rms_norm(a, layer.eps, self.keep_alive(layer.weight))

    def rms_norm(self, a: Value, eps: float | None, weight: Tensor | None = None) -> Value:
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        return self.add("norm", self.new_vector(a.size), a, I=a.size, eps=eps, w=weight)

    def attention(self, layer: nn.Module, index: int, stream: Value) -> None:
        attention: Any = layer.self_attn
        heads, shared = attention.config.num_attention_heads, attention.config.num_key_value_heads
        width = attention.head_dim
        projected = self.linear(
            [attention.q_proj, attention.k_proj, attention.v_proj],
            self.norm(layer.input_layernorm, stream),  # type: ignore[arg-type]
        )
        attended = self.add(
            "attention",
            self.new_vector(heads * width),
            projected,
            I=width,
            O=heads,
            K=shared,
            eps=attention.scaling,
            w=self.cache[index, 0],
            s=self.cache[index, 1],
        )
        self.linear([attention.o_proj], attended, stream, accumulate=True)

    def linear(
        self, layers: list[nn.Module], a: Value, y: Value | None = None, accumulate: bool = False
    ) -> Value:
        """Matrices that read the same input, side by side."""
        for layer in layers:
            if not is_plain_linear(layer):
                raise NotServed(f"a projection is a {type(layer).__name__}, not a plain nn.Linear")
            if layer.bias is not None:
                raise NotServed("a projection has a bias")
        weight = torch.cat([layer.weight for layer in layers])  # type: ignore[misc]
        return self.matrix(weight, a, y, accumulate)

    def matrix(self, weight: Tensor, a: Value, y: Value | None = None, accumulate: bool = False) -> Value:
        packed, scales = self.packed(weight)
        outputs, inputs = weight.shape
        return self.add(
            "matrix",
            y or self.new_vector(outputs),
            a,
            w=packed,
            s=scales,
            I=inputs,
            O=outputs,
            accumulate=accumulate,
            int8=self.int8,
        )

    def packed(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """weight [O, I] in tiles [tiles, I, W], and of int8 the scale of each output [O]."""
        weight, scales = self.rounded(weight)
        inputs = weight.shape[1]
        tiles = self.whole_tiles(weight).view(-1, library().kanlm_decode_tile(), inputs)
        return self.keep_weights(tiles.transpose(1, 2)), scales

    def packed_edges(self, weight: Tensor, base: bool) -> tuple[Tensor, Tensor | None]:
        """weight [O, K, I] as [I, K, P], P = O in whole tiles; the base, the last of K, before them."""
        weight, scales = self.rounded(weight)
        rows = self.whole_tiles(weight).permute(2, 1, 0)
        parts = [rows[:, -1:], rows[:, :-1]] if base else [rows]
        return self.keep_weights(torch.cat([part.flatten() for part in parts])), scales

    def rounded(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """weight [O, ...] as it is kept, and of int8 the scale of each output [O]."""
        if not self.int8:
            return weight, None
        rows = weight.flatten(1)
        scales = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        rounded = (rows / scales).round()
        self._squares[0] += float((rounded * scales - rows).double().square().sum())
        self._squares[1] += float(rows.double().square().sum())
        return rounded.to(torch.int8).view(weight.shape), self.keep_alive(scales.flatten())

    def whole_tiles(self, weight: Tensor) -> Tensor:
        """weight [O, ...] with rows of zeros up to a whole tile."""
        missing = -len(weight) % library().kanlm_decode_tile()
        return torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])

    def keep_weights(self, packed: Tensor) -> Tensor:
        """`packed` in the weights' own memory, counted."""
        kept = self.keep_alive(self._weights.empty(packed.shape, packed.dtype).copy_(packed))
        self.weight_bytes += kept.numel() * kept.element_size()
        return kept

    def block(self, block: nn.Module, a: Value, stream: Value) -> None:
        """stream + block(a), by the operations that torch.fx finds in the block's forward pass."""
        graph = traced(block)
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = a
            elif node.op == "output":
                self.add("add", stream, stream, values[node.args[0]], I=stream.size)
            else:
                values[node] = self.lowered(block, node, values)

    def lowered(self, block: nn.Module, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """What `node` computes, from the values of the nodes before it."""
        inputs = [values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
        if node.op == "call_module":
            module = block.get_submodule(str(node.target))
            for kind, lower in MODULES.items():
                if computes(module, kind):
                    return lower(self, module, *inputs)
            raise NotServed(f"{type(block).__name__} has a {type(module).__name__}")
        if node.target is operator.mul and self.fused(node, *inputs):
            return inputs[0]
        lower_function = FUNCTIONS.get(node.target)
        if lower_function is None:
            raise NotServed(f"{type(block).__name__} calls {getattr(node.target, '__name__', node.target)}")
        return lower_function(self, *inputs, **node.kwargs)

    def fused(self, node: fx.Node, a: Any, b: Any) -> bool:
        """Whether a * b became part of the operation just added, which computes a for nothing else."""
        last = self.operations[-1]
        if not (isinstance(a, Value) and isinstance(b, Value) and len(node.all_input_nodes[0].users) == 1):
            return False
        if a.memory is b.memory:  # a square: one node, so one user
            return False
        if last.y != a.memory.data_ptr() or last.u or KINDS[last.kind] not in PRODUCTS:
            return False
        last.u = b.memory.data_ptr()
        if not last.barrier and last.u in self._written:
            last.barrier, self._written, self._read = 1, {last.y}, {last.a}
        self._read.add(last.u)
        return True

    def elementwise(self, kind: str, a: Value, u: Value | None = None, **fields) -> Value:
        return self.add(kind, self.new_vector(a.size), a, u, I=a.size, **fields)

    def product(self, a: Value, b: Value) -> Value:
        if not isinstance(a, Value) or not isinstance(b, Value):
            raise NotServed("a block multiplies by a number")
        return self.elementwise("multiply", a, b)

    def sum(self, a: Value, b: Value) -> Value:
        if not isinstance(a, Value) or not isinstance(b, Value):
            raise NotServed("a block adds a number")
        return self.elementwise("add", a, b)

    def function(self, layer: LearnedFunction, a: Value, u: Value | None = None) -> Value:
        """phi(a) * u."""
        silu = layer.base is not None
        if layer.is_rational:
            return self.elementwise(
                "rational", a, u, w=self.keep_alive(layer.coefficients), groups=layer.groups, silu=silu
            )
        if isinstance(layer.basis, BSpline):
            table = layer.table()[:, 1:-1]  # [groups, G, k + 1]
        else:
            table = hermite_table(layer.basis, layer.coefficients)
        grid = grid_fields(layer.basis, table)
        kind = "table"
        if is_short(table, a.size // layer.groups) and not grid["periodic"]:
            kind, table = "short_table", by_power(table)
        return self.elementwise(kind, a, u, w=self.keep_alive(table), groups=layer.groups, silu=silu, **grid)

    def edges(self, layer: KANLinear, a: Value) -> Value:
        if not isinstance(layer.basis, Basis):
            raise NotServed("a KAN layer has an adaptive grid")
        if not all(is_plain_linear(child) for child in layer.children()):
            raise NotServed("a KAN layer has an adapter or another weight")
        weight = layer.plain_weight().float().unflatten(1, (-1, layer.in_features))  # [O, K, I]
        if layer.base is not None:
            weight = torch.cat((weight, layer.base.weight.unsqueeze(1)), dim=1)
        outputs, functions, inputs = weight.shape
        base = layer.base is not None
        if not isinstance(layer.basis, BSpline):
            tables = hermite_table(layer.basis, torch.eye(layer.num_functions))  # [K, cells, 4]
            computed = self.add(
                "features",
                self.new_vector(functions * inputs),
                a,
                w=self.keep_alive(tables),
                I=inputs,
                K=functions,
                silu=base,
                **grid_fields(layer.basis, tables),
            )
            return self.matrix(weight.flatten(1), computed)
        packed, scales = self.packed_edges(weight, base)
        pieces = torch.tensor(UNIFORM_PIECES[layer.basis.order]).flatten()
        if scales is not None:
            pieces = torch.cat((pieces, scales))
        scratch = self.new_vector(inputs * (layer.basis.order + 3))
        return self.add(
            "edge",
            self.new_vector(outputs),
            a,
            scratch,
            w=packed,
            s=self.keep_alive(pieces),
            I=inputs,
            O=outputs,
            K=functions,
            silu=base,
            int8=self.int8,
            order=layer.basis.order,
            cells=layer.basis.grid_size,
            lo=layer.basis.grid_min,
            inv_h=1 / layer.basis.step,
        )

    def polynorm(self, layer: PolyNorm, a: Value) -> Value:
        return self.elementwise(
            "polynorm", a, w=self.keep_alive(torch.cat((layer.weight, layer.bias))), eps=layer.eps
        )

    def xielu(self, layer: XIELU, a: Value) -> Value:
        positive, negative = F.softplus(layer.alpha_p), layer.beta + F.softplus(layer.alpha_n)
        numbers = torch.cat((positive, negative, positive.new_tensor([layer.beta])))
        return self.elementwise("xielu", a, w=self.keep_alive(numbers))

    def gelu(self, a: Value, approximate: str = "none") -> Value:
        if approximate != "none":
            raise NotServed(f"a block uses GELU approximated by {approximate}")
        return self.elementwise("gelu", a)


def grid_fields(basis: Basis, table: Tensor) -> dict[str, Any]:
    """The fields of an operation on a table [..., cells, k + 1] over the grid of `basis`."""
    cells, terms = table.shape[-2:]
    span = basis.grid_max - basis.grid_min
    return {
        "order": terms - 1,
        "cells": cells,
        "lo": basis.grid_min,
        "inv_h": cells / span,
        "periodic": isinstance(basis, Fourier),
    }


def is_short(table: Tensor, width: int) -> bool:
    """Whether tables [groups, cells, k + 1] fit registers, for groups so wide that loading them pays."""
    cells, terms = table.shape[-2:]
    return cells <= SHORT and terms <= CUBIC and width >= SHORT


def by_power(table: Tensor) -> Tensor:
    """A table [groups, cells, k + 1] as [groups, 4, 16], filled up with zeros."""
    cells, terms = table.shape[-2:]
    return F.pad(table, (0, CUBIC - terms, 0, SHORT - cells)).transpose(-1, -2)


def hermite_table(basis: Basis, coefficients: Tensor) -> Tensor:
    """sum_m c_m B_m as cubic pieces with the function's values and slopes at their ends: [groups, cells, 4].

    coefficients [groups, K]. A grid interval is halved until the error at the pieces' middles, computed in
    fp64, is below TABLE_ERROR.
    """
    c = coefficients.detach().double()
    for halvings in range(2, 9):
        cells = basis.grid_size << halvings
        points = torch.linspace(basis.grid_min, basis.grid_max, 2 * cells + 1, dtype=torch.float64)
        exact = c @ basis.values(points.unsqueeze(-1)).squeeze(-1).t()  # [groups, points]
        step = (basis.grid_max - basis.grid_min) / cells
        slopes = c @ basis.derivatives(points[::2].unsqueeze(-1)).squeeze(-1).t() * step
        f0, f1 = exact[:, :-2:2], exact[:, 2::2]
        d0, d1 = slopes[:, :-1], slopes[:, 1:]
        table = torch.stack((f0, d0, 3 * (f1 - f0) - 2 * d0 - d1, 2 * (f0 - f1) + d0 + d1), dim=-1)
        middles = table @ table.new_tensor([1, 0.5, 0.25, 0.125])
        if float((middles - exact[:, 1::2]).abs().max()) <= TABLE_ERROR * float(exact.abs().max()):
            return table
    raise NotServed(f"functions of the basis {type(basis).__name__} are too rough to tabulate")


class BlockTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return any(computes(module, kind) for kind in MODULES) or super().is_leaf_module(
            module, qualified_name
        )


def traced(block: nn.Module) -> fx.Graph:
    """The operations of the block's forward pass, its kernel put aside.

    Raises:
        NotServed: a forward pass that depends on the values.
    """
    kernel = block.__dict__.get("kernel")
    if kernel is not None:
        block.__dict__["kernel"] = None
    try:
        return BlockTracer().trace(block)
    except (fx.proxy.TraceError, TypeError) as error:
        raise NotServed(f"the forward pass of {type(block).__name__} cannot be traced: {error}") from None
    finally:
        if kernel is not None:
            block.__dict__["kernel"] = kernel


class Shape:
    """The shape of a value, of which blocks take the last dimension."""


def last_dimension(program: Program, shape: Any, index: Any) -> Shape:
    if not isinstance(shape, Shape) or index != slice(-1, None):
        raise NotServed("a block reads more of a shape than the last dimension")
    return shape


def shape_of(program: Program, value: Any, name: str) -> Shape:
    if name != "shape":
        raise NotServed(f"a block reads {name}")
    return Shape()


def rms_norm(program: Program, a: Value, shape: Any, weight: None = None, eps: float | None = None) -> Value:
    if not isinstance(shape, Shape) or weight is not None:
        raise NotServed("a block norms by other than the last dimension, or with weights")
    return program.rms_norm(a, eps)


MODULES: dict[type[nn.Module], Callable[..., Value]] = {
    nn.Linear: lambda program, layer, a: program.linear([layer], a),
    KANLinear: Program.edges,
    LearnedFunction: Program.function,
    PolyNorm: Program.polynorm,
    XIELU: Program.xielu,
    nn.GELU: lambda program, layer, a: program.gelu(a, layer.approximate),
    nn.SiLU: lambda program, layer, a: program.elementwise("silu", a),
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.rms_norm: rms_norm,
    getattr: shape_of,
    operator.getitem: last_dimension,
    operator.mul: Program.product,
    operator.add: Program.sum,
    F.silu: lambda program, a, inplace=False: program.elementwise("silu", a),
    F.gelu: Program.gelu,
    F.relu: lambda program, a, inplace=False: program.elementwise("relu", a),
    "square": lambda program, a: program.elementwise("square", a),
}
