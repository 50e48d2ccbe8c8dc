"""Speed of the data pipeline: packing a text against `tokenizers.encode_batch` alone, and batches per second.

    python scripts/bench_data.py                          Python's own library sources
    python scripts/bench_data.py texts.txt --separator '<|endoftext|>'

Both sides run in turn in one process, with the same tokenizer, threads and documents. The reference has the
documents in memory and drops the ids; the packed side reads the source, splits off held-out text, counts
bytes and words, writes the cache and syncs it to disk. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from kanlm.config import DataConfig, RunConfig, TokenizerConfig, TrainConfig
from kanlm.data import TokenLoader, documents, token_cache, tokenizer_for
from kanlm.data.tokenizer import packing_tokenizer
from kanlm.runs import provenance


def seconds(work) -> tuple[float, float]:
    """Wall-clock and CPU seconds of `work`; the second is the steadier on a busy machine."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", default="stdlib")
    parser.add_argument("--separator", help="line that separates documents of a text file")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    folder = tempfile.mkdtemp(prefix="kanlm-bench-")
    data = {"source": arguments.source, "document_separator": arguments.separator, "cache_dir": folder}
    config = RunConfig(
        name="bench",
        model={},
        tokenizer=TokenizerConfig(vocab_size=arguments.vocab_size),
        data=DataConfig(block_size=arguments.block_size, **data),
        train=TrainConfig(max_tokens=1, batch_size=arguments.batch_size),
    )
    training_seconds, _ = seconds(lambda: tokenizer_for(config))
    tokenizer = tokenizer_for(config)
    backend = packing_tokenizer(tokenizer)
    texts = list(documents(config.data, "train"))
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6

    def pack() -> None:
        shutil.rmtree(Path(folder) / "tokens", ignore_errors=True)
        token_cache(config, tokenizer, "train")

    alone, packed = [], []
    for _ in range(arguments.repeats):
        alone.append(seconds(lambda: backend.encode_batch(texts, add_special_tokens=False)))
        packed.append(seconds(pack))
    pairs = list(zip(alone, packed, strict=True))
    wall_ratios, cpu_ratios = ([reference[at] / ours[at] for reference, ours in pairs] for at in (0, 1))

    batches = 1000
    loader_ms = {}
    for name, streaming in (("cached", False), ("streaming", True)):
        settings = DataConfig(block_size=arguments.block_size, streaming=streaming, **data)
        loader = TokenLoader(config.model_copy(update={"data": settings}), tokenizer)
        elapsed, cpu = seconds(lambda source=loader: list(itertools.islice(source, batches)))
        loader_ms[name] = {"wall": round(elapsed / batches * 1e3, 3), "cpu": round(cpu / batches * 1e3, 3)}
    shutil.rmtree(folder)
    result = {
        "source": arguments.source,
        "documents": len(texts),
        "megabytes": round(megabytes, 2),
        "tokenizer_training_seconds": round(training_seconds, 2),
        "encode_batch_megabytes_per_second": round(
            megabytes / statistics.median(wall for wall, _ in alone), 2
        ),
        "packing_megabytes_per_second": round(megabytes / statistics.median(wall for wall, _ in packed), 2),
        "packing_over_encode_batch": [round(ratio, 3) for ratio in sorted(wall_ratios)],
        "packing_over_encode_batch_cpu": [round(ratio, 3) for ratio in sorted(cpu_ratios)],
        "milliseconds_per_batch": loader_ms,
        "batch": f"{arguments.batch_size} x {arguments.block_size}",
        "provenance": provenance(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
