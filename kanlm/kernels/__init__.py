"""Implementations of what kanlm.model defines; `select` chooses, and the reference stays the definition.

    native.cpp, native.py   C++ with OpenMP, compiled once for this machine; exponential.h beside it
    cpu.py                  autograd functions over it
    triton_ops.py           the same for GPUs
    operators.py            both as operators of torch, for its compiler
    recompute.py            the reference in chunks, computed again in backward, where no fused kernel is
    support.py              which layers have one

The choice is an attribute `kernel` of a module, never part of a config or checkpoint. Select after the
model is on its device and has its dtype and its adapters: a kernel refuses what it was not chosen for.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kanlm.kernels import cpu, recompute
from kanlm.kernels.native import NativeUnavailable, library
from kanlm.kernels.support import is_plain_function, supports_edge, supports_learned
from kanlm.model.ffn import MLP
from kanlm.model.ffn_kan import ChannelKAN, EdgeKAN, ProductKAN
from kanlm.model.kan import KANLinear, LearnedFunction

BACKENDS = ("auto", "reference", "recompute", "cpu", "triton")
log = logging.getLogger(__name__)
_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        log.info(message)


def select(model: nn.Module, backend: str = "auto", *, compiled: bool = False) -> dict[str, str]:
    """Set the implementation of every KAN layer, learned function and MLP activation of `model`.

    `reference` is plain PyTorch; `recompute` the same with little memory; `cpu` and `triton` are fused
    kernels; `auto` is `triton` on a CUDA device, `cpu` where a C++ compiler is at hand, else `recompute`, and
    says once what it chose. KAN layers without a kernel of the backend (e.g. of a Chebyshev basis) recompute,
    activations keep the reference.

    `compiled` says that torch compiles the model's layers. It decides by itself what to compute again, so the
    reference then stands where recomputation would.

    Returns:
        What each module that has a choice now uses, by its name: "reference", "recompute", "cpu" or "triton".

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"kernels: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    device = next((p.device.type for p in model.parameters()), "cpu")
    if backend == "auto":
        backend = _automatic(device)
    elif backend == "cpu":
        _require_cpu(device)
    elif backend == "triton":
        if reason := _triton_lacks(device):
            raise ValueError(f"kernels: 'triton' cannot run here: {reason}; choose 'auto'")
    chosen = {}
    for name, module in model.named_modules():
        if not hasattr(module, "kernel"):
            continue
        module.__dict__.pop("_packed", None)
        implementation, module.kernel = _implementation(module, backend, compiled)
        if not isinstance(module, ChannelKAN | EdgeKAN):  # what is listed are their layers and functions
            chosen[name] = implementation
    return chosen


@contextmanager
def functions_called(model: nn.Module) -> Iterator[None]:
    """Within, every learned function is a call of its own, so that hooks see what it is given: where a kernel
    norms its input on the way, the reference stands in.
    """
    blocks = {module: module.kernel for module in model.modules() if isinstance(module, ChannelKAN)}
    for block in blocks:
        block.kernel = None
    try:
        yield
    finally:
        for block, kernel in blocks.items():
            block.kernel = kernel


def _automatic(device: str) -> str:
    if device == "cuda":
        if reason := _triton_lacks(device):
            _log_once(f"kernels: recompute on {device} ({reason})")
            return "recompute"
        _log_once(f"kernels: triton on {device}")
        return "triton"
    if device != "cpu":
        _log_once(f"kernels: recompute on {device}")
        return "recompute"
    try:
        library()
    except NativeUnavailable as reason:
        _log_once(f"kernels: recompute on cpu ({reason})")
        return "recompute"
    _log_once("kernels: native library on cpu")
    return "cpu"


def _triton_lacks(device: str) -> str | None:
    """Why Triton kernels cannot run on `device`, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the model is on {device}, not on a GPU, and TRITON_INTERPRET=1 is not set"
    return None


def _require_cpu(device: str) -> None:
    if device != "cpu":
        raise ValueError(f"kernels: 'cpu' was asked for a model on {device}; choose 'auto' or 'triton'")
    try:
        library()
    except NativeUnavailable as reason:
        raise ValueError(f"kernels: 'cpu' cannot run here: {reason}; or choose 'auto'") from reason


def _implementation(module: nn.Module, backend: str, compiled: bool) -> tuple[str, Callable | None]:
    """What the module uses under `backend`, and the function that then stands in for its reference."""
    if backend in ("cpu", "triton"):
        ops: Any = cpu if backend == "cpu" else importlib.import_module("kanlm.kernels.triton_ops")
        if (fused := _fused(module, ops)) is not None:
            return backend, fused
    if backend != "reference" and not compiled:
        if isinstance(module, KANLinear):
            return "recompute", recompute.edge
        if isinstance(module, LearnedFunction):
            return "recompute", recompute.learned
    return "reference", None


def _fused(module: nn.Module, ops: Any) -> Callable | None:
    """The kernel of a backend for the module, or None where it has none."""
    if isinstance(module, KANLinear):
        return ops.edge if supports_edge(module) else None
    if isinstance(module, LearnedFunction):
        return ops.learned if supports_learned(module, ops.FUNCTION_ORDER) else None
    if isinstance(module, MLP):
        return ops.activation(module.activation)
    if isinstance(module, ProductKAN) or (isinstance(module, ChannelKAN) and module.hidden_norm):
        served = all(
            is_plain_function(function) and supports_learned(function, ops.FUNCTION_ORDER)
            for function in (getattr(module, name) for name in module.functions)
        )
        fused = ops.learned_product if isinstance(module, ProductKAN) else ops.apply_normed
        return fused if served else None
    if isinstance(module, EdgeKAN):
        served = all(parameter.dtype != torch.float64 for parameter in module.parameters())
        return ops.norm if served else None
    return None
