"""int8 weights: each block of a matrix's input column is 8-bit numbers with one fp32 scale.

`MatMulNBits` of ONNX Runtime multiplies them without unpacking the matrix; activations are rounded to int8
too, block by block, inside it. A tied embedding shares the head's numbers. Norms and attention stay fp32;
learned functions are the sampled ones of `functions`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

BLOCK = 32
"""Numbers that share a scale: 9 bits a weight in all."""
ZERO = 128
INT8_ACTIVATIONS = 4
"""`accuracy_level` of MatMulNBits."""


def quantised(weight: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, blocks, block] and fp32 scales [N, blocks] of weight [N, K]: weight = (uint8 - 128) scale.

    K is padded with zeros. The error is at most half a scale, max |weight| of the block / 254.
    """
    rows, columns = weight.shape
    padded = np.pad(weight.astype(np.float32), ((0, 0), (0, -columns % block)))
    blocks = padded.reshape(rows, -1, block)
    scales = np.abs(blocks).max(axis=-1) / 127
    numbers = np.rint(blocks / np.where(scales == 0, 1, scales)[..., None]) + ZERO
    return numbers.astype(np.uint8), scales.astype(np.float32)


def with_int8_weights(proto: Any) -> Any:
    """A copy of the ONNX model `proto` whose constant matrices and embedding are int8."""
    from onnx import helper, numpy_helper

    proto = copy.deepcopy(proto)
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    transposed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in constants
    }
    packed: dict[str, tuple[str, str]] = {}

    def pack(name: str, weight: np.ndarray) -> tuple[str, str]:
        """Names of numbers and scales of weight [N, K], added once."""
        if name not in packed:
            numbers, scales = quantised(weight)
            packed[name] = f"{name}_int8", f"{name}_scales"
            for key, array in zip(packed[name], (numbers, scales), strict=True):
                graph.initializer.append(numpy_helper.from_array(array, key))
        return packed[name]

    nodes: list[Any] = []
    for node in graph.node:
        matrix = matrix_of(node, constants, transposed)
        if matrix is None:
            nodes.append(node)
            continue
        name, weight = matrix
        numbers, scales = pack(name, weight)
        if node.op_type == "MatMul":
            product = helper.make_node(
                "MatMulNBits",
                [node.input[0], numbers, scales],
                list(node.output),
                domain="com.microsoft",
                K=weight.shape[1],
                N=weight.shape[0],
                bits=8,
                block_size=BLOCK,
                accuracy_level=INT8_ACTIVATIONS,
            )
            nodes.append(product)
        else:
            nodes.extend(embedding(graph, node, numbers, scales, weight.shape[1]))
    del graph.node[:]
    graph.node.extend(nodes)
    without_unused(graph)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


def matrix_of(node: Any, constants: dict[str, Any], transposed: dict[str, str]) -> Any:
    """(name, weight [N, K]) of a product with a constant matrix or of an embedding of more than a block."""
    from onnx import numpy_helper

    if node.op_type == "MatMul" and node.input[1] in transposed:
        name = transposed[node.input[1]]
        weight = numpy_helper.to_array(constants[name])
    elif node.op_type == "MatMul" and node.input[1] in constants:
        name = node.input[1]
        weight = numpy_helper.to_array(constants[name]).T
    elif node.op_type == "Gather" and node.input[0] in constants and "embed" in node.input[0]:
        name = node.input[0]
        weight = numpy_helper.to_array(constants[name])
    else:
        return None
    return (name, weight) if weight.ndim == 2 and weight.dtype == np.float32 else None


def embedding(graph: Any, node: Any, numbers: str, scales: str, width: int) -> list[Any]:
    """Nodes that read rows of `numbers`, as `node` did of the matrix [V, width] that they stand for."""
    from onnx import TensorProto, helper, numpy_helper

    ids, out = node.input[1], node.output[0]
    shape = numpy_helper.from_array(np.array([0, 0, -1], dtype=np.int64), f"{out}_shape")
    zero = numpy_helper.from_array(np.array(ZERO, dtype=np.float32), f"{out}_zero")
    last = numpy_helper.from_array(np.array([-1], dtype=np.int64), f"{out}_last")
    bounds = [
        numpy_helper.from_array(np.array([value], dtype=np.int64), f"{out}_{key}")
        for key, value in (("start", 0), ("end", width))
    ]
    graph.initializer.extend([shape, zero, last, *bounds])
    make = helper.make_node
    return [
        make("Gather", [numbers, ids], [f"{out}_rows"]),  # [B, T, blocks, block]
        make("Cast", [f"{out}_rows"], [f"{out}_cast"], to=TensorProto.FLOAT),
        make("Sub", [f"{out}_cast", zero.name], [f"{out}_signed"]),
        make("Gather", [scales, ids], [f"{out}_row_scales"]),
        make("Unsqueeze", [f"{out}_row_scales", last.name], [f"{out}_wide"]),
        make("Mul", [f"{out}_signed", f"{out}_wide"], [f"{out}_blocks"]),
        make("Reshape", [f"{out}_blocks", shape.name], [f"{out}_padded"]),
        make("Slice", [f"{out}_padded", *(bound.name for bound in bounds), last.name], [out]),
    ]


def without_unused(graph: Any) -> None:
    """Drop nodes and constants that nothing reads any more."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    tensors = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
