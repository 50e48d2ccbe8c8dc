"""`kanlm bench decode`: cached decoding, batch 1, of the models that `kanlm bench train` compares.

Every arm runs on several paths: `native` (one call a token, what `kanlm generate` uses), `int8` (the same
with int8 weights), `eager` (the model's own forward pass), `onnx` (ONNX Runtime on the exported graph, where
it is installed) and `llama` (the SwiGLU arm's weights in transformers' Llama, the reference from outside).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kanlm import kernels
from kanlm.bench.measure import PARITY, Arm, relative_error, report, require_device
from kanlm.bench.train import ARMS, VOCAB_SIZE, build_arm, parity_case
from kanlm.config import UserError
from kanlm.kernels.decode import NativeDecoder, NotServed
from kanlm.kernels.native import NativeUnavailable
from kanlm.model.modeling_kanlm import CACHE, KanLMForCausalLM
from kanlm.sizing import parameter_counts

PROMPT, NEW = 32, 32
"""Tokens read before the measured ones, and measured."""
PATHS = ("native", "eager", "int8", "onnx", "llama")


@dataclass
class Way:
    """One way to decode a model: `start(ids)` reads a prompt, `step(token)` the next token; both give [V]."""

    start: Callable[[Tensor], Tensor]
    step: Callable[[int], Tensor]
    rewind: Callable[[], None]
    """Back to where `start` ended."""
    weight_bytes: float
    details: dict[str, Any]


def native_path(model: KanLMForCausalLM, weights: Any = "float32") -> Way:
    decoder = NativeDecoder(model, weights=weights)
    read = [0]

    def start(ids: Tensor) -> Tensor:
        read[0] = len(ids)
        return decoder.prefill(ids)

    def rewind() -> None:
        decoder.length = read[0]

    details: dict[str, Any] = {"threads": decoder.threads}
    if weights == "int8":
        details["weight_error"] = decoder.weight_error
    return Way(start, decoder.step, rewind, decoder.weight_bytes, details)


def eager_path(model: Any) -> Way:
    """Any model of transformers, one forward pass a token over a growing cache."""
    cache: list[DynamicCache] = []
    read = [0]

    @torch.inference_mode()
    def start(ids: Tensor) -> Tensor:
        cache[:] = [DynamicCache(config=model.config)]
        read[0] = len(ids)
        return model(input_ids=ids[None].to(model.device), **{CACHE: cache[0]}).logits[0, -1]

    @torch.inference_mode()
    def step(token: int) -> Tensor:
        ids = torch.tensor([[token]], device=model.device)
        return model(input_ids=ids, **{CACHE: cache[0]}).logits[0, -1]

    def rewind() -> None:
        cache[0].crop(read[0] - cache[0].get_seq_length())  # by a negative number: so many tokens

    return Way(start, step, rewind, 4.0 * sum(p.numel() for p in model.parameters()), {})


def onnx_path(model: KanLMForCausalLM) -> Way:
    """ONNX Runtime with as many threads as torch."""
    import onnxruntime

    from kanlm.edge.onnx_export import graph

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        graph(model).model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    past = [given.name for given in session.get_inputs() if given.name.startswith("past")]
    outputs = [output.name for output in session.get_outputs()]
    config = model.config
    empty = torch.zeros(1, cast(int, config.num_key_value_heads), 0, cast(int, config.head_dim))
    after: dict[str, list[Any]] = {}

    def run_ids(ids: Tensor, cache: list[Any]) -> Tensor:
        mask = torch.ones(1, cache[0].shape()[2] + ids.shape[1], dtype=torch.int64)
        given = {"input_ids": value(ids.numpy()), "attention_mask": value(mask.numpy())}
        logits, *after["now"] = session.run_with_ort_values(
            outputs, given | dict(zip(past, cache, strict=True))
        )
        return torch.from_numpy(logits.numpy())[0, -1]

    def start(ids: Tensor) -> Tensor:
        logits = run_ids(ids[None], [value(empty.numpy()) for _ in past])
        after["start"] = after["now"]
        return logits

    def rewind() -> None:
        after["now"] = after["start"]

    return Way(
        start,
        lambda token: run_ids(torch.tensor([[token]]), after["now"]),
        rewind,
        4.0 * parameter_counts(config).total,
        {"threads": torch.get_num_threads()},
    )


def llama(model: KanLMForCausalLM) -> LlamaForCausalLM:
    """The SwiGLU arm's weights in transformers' own Llama, whose architecture is the same."""
    config = model.config
    same: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    same += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
    same += ("rope_parameters", "tie_word_embeddings")
    other: Any = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in same}))
    other.load_state_dict(model.state_dict())
    return other.to(model.device).eval()


def open_path(model: KanLMForCausalLM, path: str) -> Way:
    makers: dict[str, Callable[[KanLMForCausalLM], Way]] = {
        "native": native_path,
        "int8": lambda made: native_path(made, "int8"),
        "eager": eager_path,
        "onnx": onnx_path,
        "llama": lambda made: eager_path(llama(made)),
    }
    return makers[path](model)


def arm_name(name: str, path: str) -> str:
    return name if path == "native" else f"{name} {path}"


def decoding_arm(name: str, path: str, size: str, backend: str, device: str = "cpu", error: float = 0) -> Arm:
    """Decoding of NEW tokens, one at a time and the likeliest, after a prompt of PROMPT tokens."""
    made, chosen = build_arm(name, size, backend, device)
    model = cast(KanLMForCausalLM, made.model).eval()
    prompt = torch.randint(0, VOCAB_SIZE, (PROMPT,), generator=torch.Generator().manual_seed(1))
    way = open_path(model, path)
    first = int(way.start(prompt).argmax())

    def step() -> None:
        way.rewind()
        token = first
        for _ in range(NEW):
            token = int(way.step(token).argmax())

    counts = parameter_counts(model.config)
    # An outside reference is measured against the best path of the same weights.
    against = name if path in ("llama", "onnx", "int8") else arm_name(ARMS[name][0], path)
    return Arm(
        arm_name(name, path),
        step,
        NEW,
        counts.non_embedding,
        flops=2.0 * counts.total * NEW,
        least_bytes=way.weight_bytes * NEW,
        baseline=against,
        kernels=chosen if path == "eager" else path,
        details={
            "intermediate_size": model.config.intermediate_size,
            "path": path,
            "logits_error": error,
            **way.details,
        },
    )


@torch.no_grad()
def decoding_parity(name: str, size: str, backend: str, device: str = "cpu", path: str = "eager") -> float:
    """Worst relative error of the logits of cached decoding against the fp64 reference's, read at once."""
    model, ids = parity_case(name, size, backend, device)
    model.eval()
    reference = copy.deepcopy(model).double()
    kernels.select(reference, "reference")
    expected = reference(input_ids=ids[:1], use_cache=False).logits[0, 15:]
    way = open_path(model, path)
    logits = [way.start(ids[0, :16])] + [way.step(int(token)) for token in ids[0, 16:]]
    return relative_error(torch.stack(logits), expected)


def wanted(names: list[str], paths: tuple[str, ...], device: str) -> tuple[list[tuple[str, str]], dict]:
    """Arms with their paths, and why others are left out."""
    chosen, skipped = [], {}
    for path in paths:
        if path not in PATHS:
            raise UserError(f"--path: unknown path {path!r}; choose from {', '.join(PATHS)}")
        for name in names:
            if path == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
                skipped["onnx"] = "onnxruntime is not installed (pip install 'kanlm[onnx]')"
            elif path != "eager" and path != "llama" and device != "cpu":
                skipped[arm_name(name, path)] = "runs on a CPU only"
            elif path != "llama" or ARMS[name][1] == "swiglu" and not ARMS[name][2]:
                chosen.append((name, path))
    return chosen, skipped


def run(
    size: str = "1m",
    arms: tuple[str, ...] = (),
    backend: str = "auto",
    device: str = "cpu",
    seconds: float = 40.0,
    memory: bool = False,
    paths: tuple[str, ...] = (),
    out: str | None = None,
    echo: Callable[[str], Any] = print,
) -> list[dict]:
    """Compare decoding of `arms` (default: all) on `paths` (default: all but onnx and int8 of most arms).

    Prints a table, writes JSON, returns the records. Peak memory is not measured.

    Raises:
        UserError: an unknown size, arm, backend or path, or a device that is not there.
    """
    require_device(device)
    names = list(arms or ARMS)
    chosen, skipped = wanted(names, paths or PATHS, device)
    if not paths and not arms:
        chosen = [(name, path) for name, path in chosen if path in ("native", "eager") or name in BOTH]
    built_arms = []
    for name, path in chosen:
        try:
            error = decoding_parity(name, size, backend, device, path)
            if path != "int8" and error >= PARITY[torch.float32]:
                skipped[arm_name(name, path)] = (
                    f"parity is red: relative error {error:.2g} >= {PARITY[torch.float32]}"
                )
            else:
                built_arms.append(decoding_arm(name, path, size, backend, device, error))
        except (NotServed, NativeUnavailable) as reason:
            skipped[arm_name(name, path)] = str(reason)
        except ValueError as fault:
            raise UserError(str(fault)) from None
    settings = {
        "size": size,
        "backend": backend,
        "device": device,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "batch": 1,
    }
    return report(
        f"decode-{size}",
        settings,
        built_arms,
        {},
        skipped,
        seconds=seconds,
        device=device,
        out=out,
        echo=echo,
    )


BOTH = ("swiglu", "kan_glu")
"""The arms that all paths are shown for where nothing is asked for."""
