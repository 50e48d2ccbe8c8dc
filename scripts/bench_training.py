"""Tokens per second of kanlm's training loop beside a bare PyTorch loop and transformers' Trainer.

    python scripts/bench_training.py [CONFIG.toml] [section.key=value ...] [--rounds 5] [--steps 40]
        [--out FILE.json]

All three train the same model from the same seed on the same batches, with the same fused AdamW and
clipping, in one process. They take turns, round after round, so that a busy neighbour meets all of them;
the ratio of a round is kanlm's speed over the other's in that round. Time is wall-clock from the start of
step 5 to the end of the last step, with whatever each does between steps (logging every 10 steps), without
validation and checkpoints. What a checkpoint costs is shown apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from kanlm import kernels
from kanlm.config import RunConfig, load_run_config, parsed, with_overrides
from kanlm.data import TokenLoader, tokenizer_for
from kanlm.model import KanLMForCausalLM
from kanlm.runs import hardware, versions, write_json
from kanlm.sizing import architecture
from kanlm.train import loop
from kanlm.train.optimizer import optimizers
from kanlm.train.schedule import learning_rate_factor

WARMUP_STEPS = 5
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
    """Wall-clock time from the start of step WARMUP_STEPS to `stop()`, the device waited for."""

    def __init__(self, device: torch.device):
        self.device, self.steps, self.started = device, 0, 0.0

    def step_begins(self) -> None:
        if self.steps == WARMUP_STEPS:
            self.started = self._now()
        self.steps += 1

    def stop(self, step_tokens: int) -> float:
        """Tokens per second."""
        return (self.steps - WARMUP_STEPS) * step_tokens / (self._now() - self.started)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Bench:
    def __init__(self, config: RunConfig, device: torch.device):
        self.config, self.device = config, device
        self.tokenizer = tokenizer_for(config)
        self.steps = config.train.max_tokens // (config.train.batch_size * config.data.block_size)
        self.step_tokens = config.train.batch_size * config.data.block_size

    def model(self) -> KanLMForCausalLM:
        torch.manual_seed(self.config.seed)
        model = KanLMForCausalLM(architecture(self.config, len(self.tokenizer))).to(self.device)
        kernels.select(model, self.config.train.kernels)
        return model.train()

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(TokenLoader(self.config, self.tokenizer))

    def kanlm(self, folder: Path) -> float:
        """kanlm.train.loop, as the command line runs it."""
        clock, real = Clock(self.device), loop.one_step

        def timed(session, batches):
            clock.step_begins()
            done = real(session, batches)
            if clock.steps == self.steps:
                self.speed = clock.stop(self.step_tokens)
            return done

        loop.one_step = timed
        try:
            loop.train(self.config.model_copy(update={"output_dir": str(folder)}))
        finally:
            loop.one_step = real
        return self.speed

    def bare(self, folder: Path) -> float:
        """The shortest loop that learns the same: no checks, no logs, no checkpoints."""
        model, settings = self.model(), self.config.train
        (optimizer,) = optimizers(model, settings, self.device)
        clock, batches = Clock(self.device), self.batches()
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
        return clock.stop(self.step_tokens)

    def trainer(self, folder: Path) -> float:
        """transformers' Trainer on the same batches."""
        clock, batches, settings = Clock(self.device), self.batches(), self.config.train

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
        return clock.stop(self.step_tokens)

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


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="default: 1M parameters of kan_glu on generated stories")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.config and "=" in given.config:
        given.config, given.overrides = None, [given.config, *given.overrides]
    if given.config:
        config = load_run_config(given.config, given.overrides)
    else:
        config = parsed(RunConfig, with_overrides(DEFAULT, given.overrides), "built-in configuration")
    tokens = given.steps * config.train.batch_size * config.data.block_size
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"max_tokens": tokens, "eval_tokens": 1024})}
    )

    bench = Bench(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    contestants: dict[str, Callable[[Path], float]] = {
        "kanlm": bench.kanlm,
        "bare PyTorch": bench.bare,
        "transformers Trainer": bench.trainer,
    }
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(given.rounds):
        order = list(contestants)[round_number % 3 :] + list(contestants)[: round_number % 3]
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                speeds[name].append(contestants[name](Path(folder)))
            print(f"round {round_number + 1}: {name}: {speeds[name][-1]:,.0f} tokens/s", file=sys.stderr)

    ratios = {
        name: [ours / theirs for ours, theirs in zip(speeds["kanlm"], values, strict=True)]
        for name, values in speeds.items()
        if name != "kanlm"
    }
    print(f"{'':24}{'tokens/s, median':>18}{'kanlm / it':>12}{'min':>8}{'max':>8}")
    for name, values in speeds.items():
        line = f"{name:24}{statistics.median(values):>18,.0f}"
        if name in ratios:
            line += "".join(
                f"{value:>{width}.3f}"
                for value, width in zip(spread(ratios[name]).values(), (12, 8, 8), strict=True)
            )
        print(line)
    checkpoints = {
        "written beside the training": bench.checkpoint_seconds(asynchronous=True),
        "written at once": bench.checkpoint_seconds(asynchronous=False),
    }
    for name, seconds in checkpoints.items():
        print(f"checkpoint, {name}: steps held up for {statistics.median(seconds) * 1e3:.0f} ms (median)")
    if given.out:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config.model_dump(mode="json"),
            "steps": given.steps,
            "warmup_steps": WARMUP_STEPS,
            "threads": torch.get_num_threads(),
            "tokens_per_second": speeds,
            "ratios": {name: {"rounds": values} | spread(values) for name, values in ratios.items()},
            "checkpoint_holds_up_seconds": checkpoints,
            "hardware": hardware(),
            "versions": versions(),
        }
        write_json(given.out, result)


if __name__ == "__main__":
    main()
