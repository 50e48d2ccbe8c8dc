"""What one process holds while it trains, built once and complete: text, model, optimisers, and reporters."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from kanlm.config import WORKING_DIRECTORY, RunConfig, UserError
from kanlm.data import TokenCache, TokenLoader
from kanlm.initial import kan_coefficient_names
from kanlm.runs import (
    RunDir,
    RunRecord,
    provenance,
    read_json,
    save_tokenizer,
    step_of,
    write_json,
    write_text,
)
from kanlm.sizing import Counts, parameter_counts, training_flops_per_token
from kanlm.train import checkpoint, parallel
from kanlm.train.batches import StepBatches, Text
from kanlm.train.build import Trainable
from kanlm.train.checkpoint import CheckpointWriter
from kanlm.train.faults import StopSignal, ZeroGradientWatch, failure_kind
from kanlm.train.progress import BusyNotice, Progress, RecordKeeper, peak_flops_per_second
from kanlm.train.resume import TrainerState
from kanlm.train.tracking import start_trackers


@dataclass
class Session:
    """Everything that one process holds while it trains."""

    config: RunConfig
    run: RunDir
    accelerator: Accelerator
    stop_signal: StopSignal
    model_config: Any
    """KanLMConfig, or that of a converted family."""
    model: nn.Module
    """As accelerate or FSDP2 wrapped it."""
    optimizers: list[Any]
    """As accelerate wrapped them; they know the loss scale of fp16."""
    batches: StepBatches
    validation: TokenCache
    micro_batch_size: int
    total_steps: int
    state: TrainerState
    record: RunRecord
    flops_per_token: float
    peak_flops: float
    """Of all processes, per second."""
    watch: ZeroGradientWatch
    progress: Progress
    keep_record: RecordKeeper
    writer: CheckpointWriter
    busy: BusyNotice
    saved_at: float = field(default_factory=time.monotonic)
    """When the last checkpoint was taken, or the run begun."""

    @property
    def raw_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer.optimizer for optimizer in self.optimizers]


@contextmanager
def opening_recorded(run: RunDir, accelerator: Accelerator) -> Iterator[None]:
    """A mistake that keeps a run from going on is told in the record of the part that was trained before."""
    try:
        yield
    except UserError as error:
        if accelerator.is_main_process and run.record.exists():
            before = RunRecord.model_validate(read_json(run.record))
            failed = {"state": "failed", "failure": str(error), "failure_kind": failure_kind(error)}
            write_json(run.record, before.model_copy(update=failed))
        raise


def open_session(
    config: RunConfig,
    run: RunDir,
    accelerator: Accelerator,
    stop_signal: StopSignal,
    text: Text,
    trainable: Trainable,
) -> Session:
    """The session of a run at its newest intact checkpoint, or at its beginning; the caller holds the lock.

    UserError, which run.json then names, where the checkpoint is that of other text or every one is damaged.
    """
    model_config = accelerator.unwrap_model(trainable.model).config
    wrapper = parallel.wrapper(accelerator)
    state = TrainerState(world_size=accelerator.num_processes)
    said: list[str] = []  # `progress` says it, which begins at the step to go on from
    loader = text.batches.loader
    optimizers = [optimizer.optimizer for optimizer in trainable.optimizers]
    folder = resume(run, state, trainable.model, optimizers, loader, accelerator, say=said.append)
    start_trackers(accelerator, config, run.root)
    counts = parameter_counts(model_config)
    flops_per_token = training_flops_per_token(model_config, config.data.block_size)
    peak_flops, peak_source = peak_flops_per_second(accelerator.device, accelerator.mixed_precision != "no")
    if accelerator.is_main_process:
        write_json(run.config, config)
        write_text(run.root / WORKING_DIRECTORY, f"{Path.cwd()}\n")
        save_tokenizer(text.tokenizer, run.tokenizer)
    record = RunRecord(
        state="running",
        step=state.step,
        total_steps=config.total_steps,
        tokens=state.tokens,
        seconds=state.seconds,
        parameters=counts.total,
        non_embedding_parameters=counts.non_embedding,
        provenance=provenance(
            data=loader.manifest,
            validation_data=text.validation.manifest,
            processes=accelerator.num_processes,
            wrapper=wrapper,
            device=str(accelerator.device),
            mixed_precision=accelerator.mixed_precision,
            threads=torch.get_num_threads(),
            kernels=sorted(set(trainable.kernels.values())),
            training_flops_per_token=flops_per_token,
            peak_flops_per_second=peak_flops,
            peak_flops_source=peak_source,
        ),
        process_id=os.getpid(),
    )
    goes_on = config.train.on_checkpoint_error == "continue"
    progress = Progress(accelerator, run.metrics, record.total_steps, state.step, goes_on)
    session = Session(
        config=config,
        run=run,
        accelerator=accelerator,
        stop_signal=stop_signal,
        model_config=model_config,
        model=trainable.model,
        optimizers=trainable.optimizers,
        batches=text.batches,
        validation=text.validation,
        micro_batch_size=loader.micro_batch_size,
        total_steps=record.total_steps,
        state=state,
        record=record,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops * accelerator.num_processes,
        progress=progress,
        keep_record=RecordKeeper(run, record, accelerator, progress),
        watch=ZeroGradientWatch(trainable.model, config.train.zero_gradient_steps, state.silent),
        writer=CheckpointWriter(
            run,
            keep_last=config.train.keep_last,
            keep_every=config.train.keep_every,
            asynchronous=config.train.async_checkpoint,
            on_error=config.train.on_checkpoint_error,
            say=progress.say,
        ),
        busy=BusyNotice(accelerator),
    )
    said.append(opening_line(session, counts, wrapper))
    if wrapper == "fsdp2" and kan_coefficient_names(accelerator.unwrap_model(trainable.model)):
        said.append("kan_health is left out: it cannot read sharded parameters (FSDP2)")
    if folder is not None:
        said.append(f"resumed at step {state.step} from {folder}")
    for line in said:
        progress.say(line)
    session.keep_record(state)
    return session


def opening_line(session: Session, counts: Counts, wrapper: str) -> str:
    """What is trained, and on what."""
    config, accelerator = session.config, session.accelerator
    device = accelerator.device.type
    if device == "cpu":
        device += f" ({torch.get_num_threads()} thread(s) each)"
    return (
        f"{config.name}: {counts.total:,} parameters ({counts.non_embedding:,} without embeddings), "
        f"{session.total_steps:,} steps of {config.train.batch_size} x {config.data.block_size} tokens, "
        f"{accelerator.num_processes} process(es) on {device}, "
        f"wrapper {wrapper}, precision {accelerator.mixed_precision}"
    )


def resume(
    run: RunDir,
    state: TrainerState,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loader: TokenLoader,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> Path | None:
    """Load the newest intact checkpoint into all of these; its folder, or None for a new run.

    UserError where the checkpoint is that of another text or tokenizer, or where every checkpoint of the run
    is damaged.
    """
    damaged: list[str] = []
    choice: list[Any] = [None, False]  # made once, so that all processes load the same
    if accelerator.is_main_process:
        choice = [checkpoint.newest_good(run, damaged.append), bool(damaged)]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(choice)
    folder, any_damaged = choice
    for line in damaged:
        say(line)
    if folder is None and any_damaged:
        raise UserError(
            f"{run.checkpoints}: every checkpoint is damaged; delete the folder to start the run anew"
        )
    if accelerator.is_main_process:
        checkpoint.remove_leftovers(run, after_step=step_of(folder) if folder else 0)
    if folder is None:
        return None
    saved = read_json(folder / "trainer.json")
    loader.load_state_dict(saved["loader"])  # first: it refuses other text before anything is loaded
    checkpoint.restore(folder, model, optimizers)
    for item in fields(state):
        if item.name in saved and item.name != "world_size":
            setattr(state, item.name, saved[item.name])
    if state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    return folder
