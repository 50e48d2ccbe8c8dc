"""Tokens per second of kanlm's training loop beside a bare PyTorch loop and transformers' Trainer.

    python scripts/bench_training.py [CONFIG.toml] [section.key=value ...] [--steps 305] [--out FILE.json]

All three train the same model from the same seed on the same batches, with the same fused AdamW and
clipping, each in a process of its own. They take turns step by step: while one does a step, the other two
wait, so that a busy neighbour meets all of them. A ratio is kanlm's speed over the other's in a block of 10
steps, that is with everything that each does between steps in such a block (logging once), without
validation and checkpoints. What a checkpoint costs is shown apart.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import multiprocessing
from transformers import Trainer, TrainerCallback, TrainingArguments

from kanlm.config import RunConfig, load_run_config, parse_table, with_overrides
from kanlm.data import TokenLoader, tokenizer_for
from kanlm.model import KanLMForCausalLM
from kanlm.runs import hardware, versions, write_json
from kanlm.sizing import architecture
from kanlm.train import loop
from kanlm.train.build import Trainable, build
from kanlm.train.schedule import learning_rate_factor

WARMUP_STEPS = 5
BLOCK_STEPS = 10
DEFAULT = {
    "name": "bench",
    "model": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "ffn_type": "kan_glu",
    },
    "tokenizer": {"vocab_size": 2048},
    "data": {"source": "stories", "block_size": 128, "max_documents": 4000},
    "train": {"max_tokens": 1, "batch_size": 16, "learning_rate": 1e-3},
}


class Clock:
    """Seconds of each step of one contestant, from the moment its turn comes to the start of its next step.

    `turns` holds one semaphore for each contestant, `place` is this one's; `barrier` lets none begin before
    all are ready, and none go on after its last step before all have done theirs.
    """

    def __init__(self, device: torch.device, turns: list, place: int, barrier):
        self.device, self.turns, self.place, self.barrier = device, turns, place, barrier
        self.seconds: list[float] = []
        self.began: float | None = None

    def step_begins(self) -> None:
        if self.began is None:
            self.barrier.wait()
        else:
            self._pass_on()
        self.turns[self.place].acquire()
        self.began = time.perf_counter()

    def stop(self) -> None:
        self._pass_on()
        self.barrier.wait()

    def _pass_on(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.began)
        self.turns[(self.place + 1) % len(self.turns)].release()


class Bench:
    def __init__(self, config: RunConfig, device: torch.device):
        self.config, self.device = config, device
        self.tokenizer = tokenizer_for(config)
        self.steps = config.train.max_tokens // (config.train.batch_size * config.data.block_size)
        self.step_tokens = config.train.batch_size * config.data.block_size

    def model(self) -> KanLMForCausalLM:
        return self.built().model

    def built(self) -> Trainable:
        """What kanlm's loop trains, without accelerate."""
        config = self.config
        return build(architecture(config, len(self.tokenizer)), config.train, self.device, seed=config.seed)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(TokenLoader(self.config, self.tokenizer))

    def kanlm(self, folder: Path, clock: Clock) -> None:
        """kanlm.train.loop, as the command line runs it."""
        real = loop.one_step

        def timed(session):
            clock.step_begins()
            done = real(session)
            if len(clock.seconds) == self.steps - 1:
                clock.stop()
            return done

        loop.one_step = timed
        loop.train(self.config.model_copy(update={"output_dir": str(folder)}))

    def bare(self, folder: Path, clock: Clock) -> None:
        """The shortest loop that learns the same: no checks, no logs, no checkpoints."""
        settings, built = self.config.train, self.built()
        model, (optimizer,) = built.model, built.optimizers
        batches = self.batches()
        low_precision = self.device.type == "cuda"
        for step in range(self.steps):
            clock.step_begins()
            batch = {
                name: tensor.to(self.device, non_blocking=True) for name, tensor in next(batches).items()
            }
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_factor(step, self.steps, settings)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=low_precision):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        clock.stop()

    def trainer(self, folder: Path, clock: Clock) -> None:
        """transformers' Trainer on the same batches."""
        batches, settings = self.batches(), self.config.train

        class Rows(torch.utils.data.IterableDataset):
            def __iter__(self):
                for batch in batches:
                    for row in range(len(batch["input_ids"])):
                        yield {name: tensor[row] for name, tensor in batch.items()}

        class StepClock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                clock.step_begins()

        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=settings.batch_size,
            max_steps=self.steps,
            learning_rate=settings.learning_rate,
            optim="adamw_torch_fused",
            lr_scheduler_type="cosine",
            max_grad_norm=settings.max_grad_norm,
            weight_decay=settings.weight_decay,
            logging_steps=settings.log_every,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=self.device.type == "cuda",
            use_cpu=self.device.type == "cpu",
            dataloader_pin_memory=self.device.type == "cuda",
        )
        Trainer(model=self.model(), args=arguments, train_dataset=Rows(), callbacks=[StepClock()]).train()
        clock.stop()

    def checkpoint_seconds(self, asynchronous: bool) -> list[float]:
        """How long each checkpoint holds up the steps: a snapshot, or the whole write."""
        held, real = [], loop.save

        def timed(session):
            started = time.perf_counter()
            real(session)
            held.append(time.perf_counter() - started)

        settings = {"save_every": max(1, self.steps // 3), "async_checkpoint": asynchronous}
        train = self.config.train.model_copy(update=settings)
        loop.save = timed
        try:
            with tempfile.TemporaryDirectory() as folder:
                loop.train(self.config.model_copy(update={"output_dir": folder, "train": train}))
        finally:
            loop.save = real
        return held


CONTESTANTS = {"kanlm": Bench.kanlm, "bare PyTorch": Bench.bare, "transformers Trainer": Bench.trainer}


def contest(config: RunConfig, device: torch.device, name: str, turns: list, barrier, results) -> None:
    """One contestant's process: its steps, their seconds put into `results`."""
    clock = Clock(device, turns, list(CONTESTANTS).index(name), barrier)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere):
            CONTESTANTS[name](Bench(config, device), Path(folder), clock)
    results.put((name, clock.seconds))


def step_seconds(config: RunConfig, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step of every contestant; they take turns. SystemExit if one of them fails."""
    context = multiprocessing.get_context("spawn")
    turns = [context.Semaphore(int(place == 0)) for place in range(len(CONTESTANTS))]
    barrier, results = context.Barrier(len(CONTESTANTS)), context.Queue()
    processes = [
        context.Process(target=contest, args=(config, device, name, turns, barrier, results), daemon=True)
        for name in CONTESTANTS
    ]
    for process in processes:
        process.start()
    seconds: dict[str, list[float]] = {}
    while len(seconds) < len(processes):
        try:
            seconds |= [results.get(timeout=0.5)]
        except queue.Empty:
            if any(process.exitcode not in (None, 0) for process in processes):
                for process in processes:
                    process.kill()  # kanlm's own would finish its step first, for which it waits
                sys.exit("a contestant failed; its error stands above")
    return {name: seconds[name] for name in CONTESTANTS}


def block_ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Our speed over theirs in each whole block of BLOCK_STEPS steps after the warm-up."""
    starts = range(WARMUP_STEPS, len(ours) - BLOCK_STEPS + 1, BLOCK_STEPS)
    return [sum(theirs[at : at + BLOCK_STEPS]) / sum(ours[at : at + BLOCK_STEPS]) for at in starts]


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    quarter, _, three_quarters = statistics.quantiles(values, n=4)
    return {
        "median": statistics.median(values),
        "quarter": quarter,
        "three_quarters": three_quarters,
        "min": min(values),
        "max": max(values),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="default: 1M parameters of kan_glu on generated stories")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=WARMUP_STEPS + 30 * BLOCK_STEPS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.steps < WARMUP_STEPS + 2 * BLOCK_STEPS:
        parser.error(
            f"--steps: {given.steps} is below {WARMUP_STEPS + 2 * BLOCK_STEPS}: warm-up and 2 blocks"
        )
    if given.config and "=" in given.config:
        given.config, given.overrides = None, [given.config, *given.overrides]
    if given.config:
        config = load_run_config(given.config, given.overrides)
    else:
        config = parse_table(RunConfig, with_overrides(DEFAULT, given.overrides), "built-in configuration")
    tokens = given.steps * config.train.batch_size * config.data.block_size
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"max_tokens": tokens, "eval_tokens": 1024})}
    )

    bench = Bench(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    bench.batches()  # the token cache is built once, before the three start
    seconds = step_seconds(config, bench.device)
    ratios = {
        name: block_ratios(seconds["kanlm"], theirs) for name, theirs in seconds.items() if name != "kanlm"
    }
    print(f"{'':24}{'tokens/s, median':>18}{'kanlm / it':>12}{'quartiles':>16}{'extremes':>16}")
    for name, values in seconds.items():
        line = f"{name:24}{bench.step_tokens / statistics.median(values[WARMUP_STEPS:]):>18,.0f}"
        if name in ratios:
            of = spread(ratios[name])
            line += f"{of['median']:>12.3f}{of['quarter']:>10.3f}{of['three_quarters']:>6.3f}"
            line += f"{of['min']:>10.3f}{of['max']:>6.3f}"
        print(line)

    checkpoints = {
        "written beside the training": bench.checkpoint_seconds(asynchronous=True),
        "written at once": bench.checkpoint_seconds(asynchronous=False),
    }
    for name, held in checkpoints.items():
        print(f"checkpoint, {name}: steps held up for {statistics.median(held) * 1e3:.0f} ms (median)")
    if given.out:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config.model_dump(mode="json"),
            "steps": given.steps,
            "warmup_steps": WARMUP_STEPS,
            "threads": torch.get_num_threads(),
            "step_tokens": bench.step_tokens,
            "seconds_of_steps": {name: [round(one, 6) for one in all_] for name, all_ in seconds.items()},
            "ratios": {name: {"blocks": values} | spread(values) for name, values in ratios.items()},
            "checkpoint_holds_up_seconds": checkpoints,
            "hardware": hardware(),
            "versions": versions(),
        }
        write_json(given.out, result)


if __name__ == "__main__":
    main()
