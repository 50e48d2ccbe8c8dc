"""What exported models cost on one core.

    python scripts/bench_edge.py runs/tiny-kan_glu/hf runs/tiny-swiglu/hf --data stdlib --out edge.json

Each MODEL is a folder with onnx/ in it (kanlm export RUN --onnx --int8); name KAN and MLP of equal size
together. `torch` is transformers' `generate` with the definition's operations, `native` the decoder of
`kanlm generate` on the same weights. `onnx tables` is there for models
exported with `--tables`. Measured in a process of its own each, in turns over rounds, medians
shown: bytes on disk, peak memory, time to the first token after a prompt of 32, tokens/s at batch 1; once,
with --data: bits per byte.
`of bound` is weight bytes x tokens/s over the rate at which this machine copies memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from kanlm.edge.runtime import OnnxModel, sampler

FILES = {"onnx": "model.onnx", "onnx tables": "model_tables.onnx", "onnx int8": "model_int8.onnx"}
KINDS = ("torch", "native", *FILES)
PROMPT, NEW = 32, 128


def file_of(model: Path, kind: str) -> Path:
    return model / "onnx" / FILES[kind] if kind in FILES else model / "model.safetensors"


def prompt_ids(vocabulary: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(1, vocabulary, PROMPT)]


def decoding(model: Path, kind: str) -> tuple[float, float]:
    """Seconds to the first token, and tokens/s of those after it; greedy, stops are ignored."""
    if kind not in FILES:
        return native_decoding(model) if kind == "native" else torch_decoding(model)
    session = OnnxModel(file_of(model, kind), threads=1)
    session.config["eos_token_id"] = None
    ids, greedy = prompt_ids(session.config["vocab_size"]), sampler(0.0, 0, 0)
    list(session.tokens(ids, 8, greedy))
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in session.tokens(ids, NEW, greedy)]
    return times[0], (NEW - 1) / (times[-1] - times[0])


def torch_decoding(model: Path) -> tuple[float, float]:
    """The same by transformers' `generate`."""
    import torch

    from kanlm.evaluation.loading import load_causal_lm

    torch.set_num_threads(1)
    network: Any = load_causal_lm(model, device="cpu")[0]
    ids = torch.tensor([prompt_ids(network.config.vocab_size)])
    times: list[float] = []
    streamer = SimpleNamespace(put=lambda token: times.append(time.perf_counter()), end=lambda: None)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        network.generate(ids, max_new_tokens=8, **settings)
        start = time.perf_counter()
        network.generate(ids, max_new_tokens=NEW, streamer=streamer, **settings)
    _, first, *_, last = times  # generate hands over the prompt before the first token
    return first - start, (NEW - 1) / (last - first)


def native_decoding(model: Path) -> tuple[float, float]:
    """The same by the native decoder."""
    import torch

    from kanlm import kernels
    from kanlm.evaluation.loading import load_causal_lm
    from kanlm.kernels.decode import NativeDecoder

    torch.set_num_threads(1)
    network: Any = load_causal_lm(model, device="cpu")[0]
    kernels.select(network)
    decoder = NativeDecoder(network)
    decoder.prefill(prompt_ids(network.config.vocab_size))
    start = time.perf_counter()
    logits, times = decoder.prefill(prompt_ids(network.config.vocab_size)), []
    for _ in range(NEW):
        token = int(logits.argmax())
        times.append(time.perf_counter())
        logits = decoder.step(token)
    return times[0] - start, (NEW - 1) / (times[-1] - times[0])


def bits_per_byte(model: Path, kind: str, data: str, documents: int, context: int) -> float:
    """Of the first `documents` held-out documents, with the metric of `kanlm eval`."""
    import torch

    from kanlm.evaluation.loading import load_causal_lm
    from kanlm.evaluation.perplexity import held_out_documents, score
    from kanlm.metrics import bits_per_byte as ratio

    torch.set_num_threads(1)
    network, tokenizer = load_causal_lm(model, device="cpu")
    if kind in FILES:
        session = OnnxModel(file_of(model, kind), threads=1)

        def logits(input_ids, attention_mask=None, use_cache=False):
            values, _ = session.step(input_ids.numpy(), session.empty_cache(len(input_ids)))
            return SimpleNamespace(logits=torch.from_numpy(values))

        network.forward = logits  # padding is on the right, where causal attention needs no mask
    texts, _, _ = held_out_documents(data)
    found = score(network, tokenizer, islice(texts, documents), context_length=context)
    return ratio(found.nll_nats, found.counts.bytes)


def child(settings: dict[str, Any]) -> dict[str, float]:
    """`measured` in a fresh process on one core."""
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{settings['model']}, {settings['kind']}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(settings: dict[str, Any]) -> dict[str, float]:
    """What one process finds: bits per byte where the settings have `data`, else speed and memory."""
    model, kind = Path(settings["model"]), settings["kind"]
    if settings.get("data"):
        value = bits_per_byte(model, kind, settings["data"], settings["documents"], settings["context"])
        return {"bits_per_byte": value}
    first, rate = decoding(model, kind)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first_token_seconds": first, "tokens_per_second": rate, "peak_bytes": peak}


def copy_rate(size: int = 256 * 2**20) -> float:
    """Bytes/s at which this machine copies memory, best of five."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


def benchmark(
    models: list[Path], rounds: int, data: str | None, documents: int, context: int
) -> dict[str, Any]:
    """All rows, with the machine's copy rate."""
    cases = [(model, kind) for model in models for kind in KINDS if file_of(model, kind).is_file()]
    found: dict[tuple[Path, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for model, kind in cases:
            found[model, kind].append(child({"model": str(model), "kind": kind}))
    rate, rows = copy_rate(), []
    for (model, kind), results in found.items():
        row: dict[str, Any] = {
            key: statistics.median(result[key] for result in results) for key in results[0]
        }
        size = file_of(model, kind).stat().st_size
        bound = size * row["tokens_per_second"] / rate
        if data is not None and kind != "native":  # whose weights are torch's
            text = {"data": data, "documents": documents, "context": context}
            row |= child({"model": str(model), "kind": kind, **text})
        rows.append({"model": str(model), "kind": kind, "bytes": size, "of_bound": bound, **row})
    return {"copy_bytes_per_second": rate, "rounds": rounds, "prompt": PROMPT, "new": NEW, "rows": rows}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| model | runs in | MB on disk | peak MB | first token, ms | tokens/s | of bound | bits per byte |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['model']} | {row['kind']} | {row['bytes'] / 1e6:.2f} | {row['peak_bytes'] / 1e6:.0f} | "
            f"{1000 * row['first_token_seconds']:.1f} | {row['tokens_per_second']:,.0f} | "
            f"{row['of_bound']:.2f} | "
            f"{format(row['bits_per_byte'], '.4f') if 'bits_per_byte' in row else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--data", help="text as in kanlm eval; without it no bits per byte")
    parser.add_argument("--documents", type=int, default=50, help="held-out documents that are scored")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child)))
        return
    missing = [model for model in options.models if not file_of(model, "onnx").is_file()]
    if missing or not options.models:
        parser.error(
            f"{missing[0] if missing else 'MODEL'}: no onnx/model.onnx; run kanlm export RUN --onnx --int8"
        )
    result = benchmark(options.models, options.rounds, options.data, options.documents, options.context)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
