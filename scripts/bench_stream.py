"""Processor time that each of two processes spends on a stream, alone and with the work divided.

    python scripts/bench_stream.py --batches 2000

Both read the same batches of the Python library's sources; nothing is trained. Processor time is that of a
whole process between the first batch and the last, all threads. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import tempfile
import time

from torch.distributed import TCPStore

from kanlm.config import DataConfig, RunConfig, TokenizerConfig, TrainConfig
from kanlm.data import TokenLoader, tokenizer_for
from kanlm.data.exchange import Exchange
from kanlm.runs import provenance


def config(cache_dir: str) -> RunConfig:
    return RunConfig(
        name="bench",
        model={},
        tokenizer=TokenizerConfig(vocab_size=4096),
        data=DataConfig(streaming=True, cache_dir=cache_dir),
        train=TrainConfig(max_tokens=1, batch_size=16),
    )


def part(rank: int, processes: int, cache_dir: str, port: int, batches: int, shared: bool, results) -> None:
    settings = config(cache_dir)
    exchange = None
    if shared:
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        exchange = Exchange(store, rank, processes)
    loader = iter(
        TokenLoader(settings, tokenizer_for(settings), rank=rank, world_size=processes, exchange=exchange)
    )
    next(loader)
    started = time.process_time()
    for _ in itertools.islice(loader, batches):
        pass
    results.put(time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=2000, help="of 16 x 256 tokens over all processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {"alone": [], "divided": []}
    with tempfile.TemporaryDirectory(prefix="kanlm-stream-") as cache_dir:
        tokenizer_for(config(cache_dir))
        for _ in range(arguments.repeats):
            for name in seconds:
                store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                results = context.Queue()
                shared = (arguments.batches, name == "divided", results)
                workers = [
                    context.Process(
                        target=part, args=(rank, arguments.processes, cache_dir, store.port, *shared)
                    )
                    for rank in range(arguments.processes)
                ]
                for worker in workers:
                    worker.start()
                seconds[name] += [results.get() for _ in workers]
                for worker in workers:
                    worker.join()
    mean = {name: sum(values) / len(values) for name, values in seconds.items()}
    result = {
        "processes": arguments.processes,
        "batches": arguments.batches,
        "processor_seconds_per_process": {
            name: [round(value, 2) for value in values] for name, values in seconds.items()
        },
        "divided_over_alone": round(mean["divided"] / mean["alone"], 3),
        "provenance": provenance(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
