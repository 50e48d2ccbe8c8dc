"""Training: one run from its configuration to a finished checkpoint, resumable at any step.

`train(config)` is called in every process that `accelerate launch` starts. A step takes `batch_size`
sequences over all processes and micro-batches; its loss is the sum over valid tokens divided by their global
number, so that it is the same function of the batch however the batch is cut.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from kanlm import kernels
from kanlm.config import RunConfig, UserError
from kanlm.data import TokenCache, TokenLoader, token_cache, tokenizer_for
from kanlm.evaluation.perplexity import validation_loss
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.health import kan_health
from kanlm.model.kan import kan_coefficient_names
from kanlm.runs import RunDir, RunRecord, provenance, read_json, write_json
from kanlm.sizing import (
    architecture,
    parameter_counts,
    planned_vocab_size,
    training_flops_per_token,
)
from kanlm.train import checkpoint
from kanlm.train.faults import (
    THE_LOSS,
    Diverged,
    Stopped,
    StopSignal,
    ZeroGradientWatch,
    failure_kind,
    first_nonfinite_layer,
)
from kanlm.train.optimizer import optimizers
from kanlm.train.parallel import (
    clip_gradients,
    global_sum,
    gradient_norm,
    keep_freed_memory,
    new_accelerator,
    no_sync,
    prepared,
    set_threads,
)
from kanlm.train.progress import Progress, RecordKeeper, peak_flops_per_second
from kanlm.train.resume import (
    TrainerState,
    check_same_run,
    finished_record,
    held_by_this_process,
    resume,
    tokenizer_sha256,
)
from kanlm.train.schedule import learning_rate_factor
from kanlm.train.tracking import start_trackers

MAX_NONFINITE_STEPS = 3
"""Steps in a row with a NaN or Inf that stop a run."""


def train(config: RunConfig) -> RunRecord:
    """Train the run that `config` describes, or go on where its folder's last intact checkpoint stands.

    Returns the record of run.json: state "finished", or "interrupted" after SIGTERM or SIGINT. UserError for
    mistakes of configuration, data or environment and for a full disk; `Diverged` after three non-finite
    steps.
    """
    run = RunDir(config.run_dir)
    check_same_run(config, run)
    if (done := finished_record(run)) is not None:
        if os.environ.get("RANK", "0") == "0":
            print(f"{run.root}: finished before, {done.step:,} steps; nothing is left to do", flush=True)
        return done
    with new_accelerator(config) as accelerator, StopSignal() as stop_signal:
        stop_signal.at_once = True
        try:
            session = prepare(config, run, accelerator)
        except Stopped:
            if accelerator.is_main_process:
                print(
                    f"{config.name}: stopped by a signal before the first step; what is tokenised is kept; "
                    "run the same command again to go on",
                    flush=True,
                )
            raise
        stop_signal.at_once = False
        session.stop_signal = stop_signal
        with held_by_this_process(run, accelerator):
            try:
                start(session)
            except UserError as error:
                if accelerator.is_main_process and run.record.exists():  # of the part that was trained before
                    before = RunRecord.model_validate(read_json(run.record))
                    failed = {"state": "failed", "failure": str(error), "failure_kind": failure_kind(error)}
                    write_json(run.record, before.model_copy(update=failed))
                raise
            try:
                run_steps(session)
                finish(session)
                session.keep_record(session.state)
            except BaseException as error:
                session.record.state = "failed"
                session.record.failure = f"{type(error).__name__}: {error}"
                session.record.failure_kind = failure_kind(error)
                raise
            finally:
                session.writer.wait()
                try:
                    session.keep_record(session.state)
                except UserError as error:  # must not take the place of what ended the run
                    session.progress.say(str(error))
                session.progress.close()
    return session.record


@dataclass
class Session:
    """Everything that one process holds while it trains."""

    config: RunConfig
    run: RunDir
    accelerator: Accelerator
    model_config: KanLMConfig
    model: nn.Module
    optimizers: list[Any]
    loader: TokenLoader
    validation: TokenCache
    tokenizer: Any
    micro_batch_size: int
    accumulation_steps: int
    total_steps: int
    state: TrainerState
    record: RunRecord
    flops_per_token: float
    peak_flops: float
    fetched: tuple[list[dict[str, torch.Tensor]], dict[str, Any]] | None = None
    """Micro-batches of the next step, and the loader's state after them."""
    saved_at: float = field(default_factory=time.monotonic)
    """When the last checkpoint was taken, or the run begun."""
    stop_signal: StopSignal = field(init=False)
    # made by start(), once the state to go on from is known
    watch: ZeroGradientWatch = field(init=False)
    progress: Progress = field(init=False)
    keep_record: RecordKeeper = field(init=False)
    writer: checkpoint.CheckpointWriter = field(init=False)

    @property
    def raw_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer.optimizer for optimizer in self.optimizers]

    @property
    def step_tokens(self) -> int:
        return self.config.train.batch_size * self.config.data.block_size


def prepare(config: RunConfig, run: RunDir, accelerator: Accelerator) -> Session:
    """Data, model and optimisers; writes nothing into the run's folder, so that a mistake leaves none
    behind.
    """
    settings = config.train
    # Mistakes in sizes are told before any text is read; the tokenizer may turn out smaller than planned.
    architecture(config, planned_vocab_size(config))
    micro_batch_size, accumulation_steps, total_steps = step_shape(config, accelerator.num_processes)
    set_threads(accelerator, settings.num_threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with accelerator.main_process_first():
        tokenizer = tokenizer_for(config)
        loader = TokenLoader(
            config,
            tokenizer,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            micro_batch_size=micro_batch_size,
        )
        validation = token_cache(config, tokenizer, "validation")
    model_config = architecture(
        config, len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(config.seed)
    built = KanLMForCausalLM(model_config)
    if settings.gradient_checkpointing:
        with warnings.catch_warnings():  # the new name came after the oldest transformers that is supported
            warnings.simplefilter("ignore", FutureWarning)
            built.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        for layer in built.model.layers:
            layer.compile()
    model, wrapped_optimizers, wrapper = prepared(
        accelerator, built, lambda module: optimizers(module, settings, accelerator.device)
    )
    chosen_kernels = kernels.select(accelerator.unwrap_model(model), settings.kernels)
    counts = parameter_counts(model_config)
    flops_per_token = training_flops_per_token(model_config, config.data.block_size)
    peak_flops, peak_source = peak_flops_per_second(accelerator.device, accelerator.mixed_precision != "no")
    record = RunRecord(
        state="running",
        step=0,
        total_steps=total_steps,
        tokens=0,
        seconds=0.0,
        parameters=counts.total,
        non_embedding_parameters=counts.non_embedding,
        provenance=provenance(
            data=loader.manifest,
            validation_data=validation.manifest,
            processes=accelerator.num_processes,
            wrapper=wrapper,
            device=str(accelerator.device),
            mixed_precision=accelerator.mixed_precision,
            threads=torch.get_num_threads(),
            kernels=sorted(set(chosen_kernels.values())),
            training_flops_per_token=flops_per_token,
            peak_flops_per_second=peak_flops,
            peak_flops_source=peak_source,
        ),
        process_id=os.getpid(),
    )
    return Session(
        config=config,
        run=run,
        accelerator=accelerator,
        model_config=model_config,
        model=model,
        optimizers=wrapped_optimizers,
        loader=loader,
        validation=validation,
        tokenizer=tokenizer,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        total_steps=total_steps,
        state=TrainerState(
            data_sha256=loader.manifest["sha256"],
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            world_size=accelerator.num_processes,
        ),
        record=record,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops,
    )


def step_shape(config: RunConfig, processes: int) -> tuple[int, int, int]:
    """Sequences in a micro-batch of one process, micro-batches in a step, and steps in all."""
    settings = config.train
    if settings.batch_size % processes:
        raise UserError(
            f"train.batch_size: {settings.batch_size} sequences do not divide among {processes} processes; "
            f"choose a multiple of {processes}"
        )
    micro_batch_size = settings.micro_batch_size or settings.batch_size // processes
    if settings.batch_size % (micro_batch_size * processes):
        raise UserError(
            f"train.micro_batch_size: {micro_batch_size} sequences in each of {processes} processes do not "
            f"divide "
            f"train.batch_size = {settings.batch_size}"
        )
    step_tokens = settings.batch_size * config.data.block_size
    if settings.max_tokens < step_tokens:
        raise UserError(
            f"train.max_tokens: {settings.max_tokens} is less than one step of batch_size x block_size = "
            f"{settings.batch_size} x {config.data.block_size} = {step_tokens} tokens"
        )
    return (
        micro_batch_size,
        settings.batch_size // (micro_batch_size * processes),
        settings.max_tokens // step_tokens,
    )


def start(session: Session) -> None:
    """Go on from the newest intact checkpoint, if there is one, and begin to report."""
    config, run, accelerator, record = session.config, session.run, session.accelerator, session.record
    found: list[str] = []
    folder = resume(run, session.state, session.model, session.raw_optimizers, accelerator, say=found.append)
    state = session.state
    if state.loader:
        session.loader.load_state_dict(state.loader)
    if state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    start_trackers(accelerator, config, run.root)
    if accelerator.is_main_process:
        write_json(run.config, config)
        session.tokenizer.save_pretrained(run.tokenizer)
    session.watch = ZeroGradientWatch(session.model, config.train.zero_gradient_steps, state.silent)
    goes_on = config.train.on_checkpoint_error == "continue"
    session.progress = Progress(accelerator, run.metrics, session.total_steps, state.step, goes_on)
    session.keep_record = RecordKeeper(run, record, accelerator, session.progress)
    session.writer = checkpoint.CheckpointWriter(
        run,
        keep_last=config.train.keep_last,
        keep_every=config.train.keep_every,
        asynchronous=config.train.async_checkpoint,
        on_error=config.train.on_checkpoint_error,
        say=session.progress.say,
    )
    for line in found:
        session.progress.say(line)
    device = accelerator.device.type
    if device == "cpu":
        device += f" ({torch.get_num_threads()} thread(s) each)"
    session.progress.say(
        f"{config.name}: {record.parameters:,} parameters ({record.non_embedding_parameters:,} without "
        f"embeddings), "
        f"{session.total_steps:,} steps of {config.train.batch_size} x {config.data.block_size} tokens, "
        f"{accelerator.num_processes} process(es) on {device}, "
        f"wrapper {record.provenance['wrapper']}, precision {accelerator.mixed_precision}"
    )
    sharded = record.provenance["wrapper"] == "fsdp2"
    if sharded and kan_coefficient_names(accelerator.unwrap_model(session.model)):
        session.progress.say("kan_health is left out: it cannot read sharded parameters (FSDP2)")
    if folder is not None:
        session.progress.say(f"resumed at step {state.step} from {folder}")
    session.keep_record(state)


@dataclass
class Step:
    """One optimiser step as it was done; loss in nats/token over the global batch, z-loss not included."""

    loss: float
    grad_norm: float
    learning_rate: float
    batch: dict[str, torch.Tensor]
    """The last micro-batch of this process."""
    stopping: bool
    """Whether some process has received a signal to stop."""
    save_due: bool
    """Whether the last checkpoint is `save_minutes` old."""


def run_steps(session: Session) -> None:
    """Steps until the token budget is spent or a signal asks to stop; logs, validations, checkpoints."""
    settings, state, accelerator = session.config.train, session.state, session.accelerator
    batches = iter(session.loader)
    session.model.train()
    saved_step = state.step if state.loader else None
    logged_tokens, logged_seconds = state.tokens, state.seconds
    stopping = False
    while state.step < session.total_steps and not stopping:
        started = time.perf_counter()
        done = one_step(session, batches)
        state.step += 1
        state.tokens += session.step_tokens
        state.seconds += time.perf_counter() - started
        stopping = done.stopping
        session.progress.step_done()

        last = state.step == session.total_steps
        validate = settings.eval_every > 0 and (last or state.step % settings.eval_every == 0)
        if last and settings.eval_tokens is None:
            validate = False  # finish() is about to do the same
        health = state.step % settings.health_every == 0 if settings.health_every else validate or last
        if state.step % settings.log_every == 0 or state.step == 1 or last or validate or health:
            speed = (state.tokens - logged_tokens) / (state.seconds - logged_seconds)
            logged_tokens, logged_seconds = state.tokens, state.seconds
            values = {
                "step": state.step,
                "tokens": state.tokens,
                "loss": done.loss,
                "lr": done.learning_rate,
                "grad_norm": done.grad_norm,
                "tokens_per_second": speed,
                "mfu": speed * session.flops_per_token / (session.peak_flops * accelerator.num_processes),
                "seconds": state.seconds,
                "seconds_left": (session.total_steps - state.step) * session.step_tokens / speed,
                "skipped_steps": state.skipped_steps,
            }
            if validate:
                values |= validation_metrics(session, settings.eval_tokens)
            if health:
                values |= health_metrics(session, done.batch)
            session.progress.log(values)
        session.writer.check()
        session.keep_record(state, at_most_every_seconds=10.0)
        due = done.save_due or (settings.save_every > 0 and state.step % settings.save_every == 0)
        if due and not last and not stopping:
            save(session)
            saved_step = state.step
    if saved_step != state.step:
        save(session)
    session.writer.finish()
    session.accelerator.wait_for_everyone()  # a launcher ends all processes when the first one has ended


def one_step(session: Session, batches: Any) -> Step:
    """Forward and backward over the micro-batches, then the optimiser, unless a number is not finite."""
    config, state, accelerator = session.config, session.state, session.accelerator
    micro_batches, state.loader = session.fetched or fetch(session, batches)
    valid_tokens, stopping, save_due = agreed(session, micro_batches)

    factor = learning_rate_factor(state.step, session.total_steps, config.train)
    for optimizer in session.raw_optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    if session.model_config.attention_dropout > 0:  # a function of the step, so that a resumed run repeats it
        torch.manual_seed(dropout_seed(config.seed, state.step, accelerator.process_index))

    loss_tensor = accumulate_gradients(session, micro_batches, valid_tokens)
    norm_tensor = gradient_norm(accelerator, session.model)
    # A GPU is still at work on the gradients; the next batch is read before its numbers are waited for.
    session.fetched = fetch(session, batches) if state.step + 1 < session.total_steps else None
    loss, grad_norm = loss_tensor.item(), norm_tensor.item()
    if math.isfinite(loss) and math.isfinite(grad_norm):
        session.watch.observe(session.model, state.step + 1)
        clip_gradients(session.model, grad_norm, config.train.max_grad_norm)
        for optimizer in session.optimizers:
            optimizer.step()
        state.nonfinite_in_a_row = 0
    else:
        state.skipped_steps += 1
        blamed = "the loss scale was too high, and is halved"
        if not lowered_scale(accelerator.scaler) or not math.isfinite(loss):
            state.nonfinite_in_a_row += 1
            blamed = f"{state.nonfinite_in_a_row} in a row"
        session.progress.say(
            f"step {state.step + 1}: loss {loss}, gradient norm {grad_norm}; the step was left out ({blamed})"
        )
        if state.nonfinite_in_a_row == MAX_NONFINITE_STEPS:
            raise diverged(session, micro_batches, loss, grad_norm)
    for optimizer in session.optimizers:
        optimizer.zero_grad()
    if accelerator.num_processes == 1:
        stopping = session.stop_signal.received is not None
    return Step(loss, grad_norm, config.train.learning_rate * factor, micro_batches[-1], stopping, save_due)


def dropout_seed(seed: int, step: int, process: int) -> int:
    """64 bits, another for each step and process."""
    digest = hashlib.blake2b(f"{seed} {step} {process}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def lowered_scale(scaler: torch.amp.GradScaler | None) -> bool:
    """Whether fp16's loss scale was above 1, and so to blame for a gradient that is not finite; it is halved.

    From 2^16, where it starts, that are at most 16 steps without the model's fault.
    """
    if scaler is None:
        return False
    scale = scaler.get_scale()
    scaler.update(scale * scaler.get_backoff_factor())  # on all processes alike
    return scale > 1


def fetch(session: Session, batches: Any) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """The micro-batches of a step, and the state that gives the batches after them."""
    return [next(batches) for _ in range(session.accumulation_steps)], session.loader.state_dict()


def agreed(session: Session, micro_batches: list[dict[str, torch.Tensor]]) -> tuple[int, bool, bool]:
    """Valid tokens of the step over all processes, whether any was asked to stop, and whether `save_minutes`
    are over for any.

    All processes learn of a signal before the same step, and all stop after it.
    """
    # The model shifts the labels, so the first of each row is never a target.
    valid = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
    stop = session.stop_signal.received is not None
    minutes = session.config.train.save_minutes
    due = minutes > 0 and time.monotonic() - session.saved_at >= minutes * 60
    if session.accelerator.num_processes > 1:
        counts = torch.tensor([valid, stop, due], dtype=torch.int64, device=session.accelerator.device)
        valid, stop, due = global_sum(counts).tolist()
    return valid, bool(stop), bool(due)


def accumulate_gradients(
    session: Session, micro_batches: list[dict[str, torch.Tensor]], valid_tokens: int
) -> torch.Tensor:
    """Gradients of the global mean loss into the parameters; the loss (nats/token, over all processes) back.

    DDP and FSDP2 average gradients over processes; the factor `num_processes` turns that into the sum, which
    the division by the global number of valid tokens makes exact for documents and micro-batches of any
    length.
    """
    accelerator, z_loss = session.accelerator, session.config.train.z_loss
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        last = index == len(micro_batches) - 1
        with nullcontext() if last else no_sync(accelerator, session.model):
            with accelerator.autocast():
                output = session.model(**batch, num_items_in_batch=valid_tokens, use_cache=False)
            loss = output.loss
            total += loss.detach()
            if z_loss > 0:
                loss = loss + z_loss * squared_log_partition(output.logits, batch["labels"]) / valid_tokens
            del output  # backward needs the logits' memory
            accelerator.backward(loss * accelerator.num_processes)
    return global_sum(total)


def squared_log_partition(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over valid tokens of (ln Z)^2, Z the softmax denominator.

    logits [B, T, V]; labels [B, T], not yet shifted. The z-loss of Chowdhery et al. 2022, sec. 5
    (https://arxiv.org/abs/2204.02311).
    """
    log_partition = logits[:, :-1].float().logsumexp(dim=-1)  # [B, T - 1]
    return (log_partition.square() * (labels[:, 1:] != -100)).sum()


def validation_metrics(session: Session, max_tokens: int | None) -> dict[str, float]:
    with session.accelerator.autocast():
        values = validation_loss(
            session.model,
            session.validation,
            block_size=session.config.data.block_size,
            batch_size=session.micro_batch_size,
            max_tokens=max_tokens,
            cross_document_attention=session.config.data.cross_document_attention,
        )
    return {f"validation_{name}": value for name, value in values.items()}


def health_metrics(session: Session, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every measurement of `kan_health` on `batch`, and the largest of each kind as `kan_...`.

    Nothing for sharded parameters, which the measurement cannot read, and for models without KAN layers.
    """
    model = session.accelerator.unwrap_model(session.model)
    if session.record.provenance["wrapper"] == "fsdp2" or not kan_coefficient_names(model):
        return {}
    batch = {name: tensor.to(session.accelerator.device) for name, tensor in batch.items()}
    with session.accelerator.autocast():
        health = kan_health(model, batch | {"use_cache": False})
    worst: dict[str, float] = {}
    for layer in health.values():
        for kind, value in layer.items():
            worst[f"kan_{kind}"] = max(worst.get(f"kan_{kind}", value), value)
    return worst | {"kan_health": health}


def save(session: Session) -> None:
    state, accelerator = session.state, session.accelerator
    state.silent = sorted(session.watch.silent)
    state.scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    session.saved_at = time.monotonic()
    taken = checkpoint.snapshot(
        state.step, session.model, session.raw_optimizers, session.model_config, asdict(state)
    )
    if accelerator.is_main_process:
        session.writer.save(taken)
        session.progress.sync()


def finish(session: Session) -> None:
    """The last validation and record of a run that has spent its budget, or how to go on with an interrupted
    one.
    """
    state, record = session.state, session.record
    if state.step < session.total_steps:
        record.state = "interrupted"
        session.progress.say(
            f"stopped by a signal after step {state.step} of {session.total_steps}; checkpoint: "
            f"{session.run.checkpoint(state.step)}; run the same command again to go on"
        )
        return
    values = validation_metrics(session, None)
    session.progress.log(
        {"step": state.step, "tokens": state.tokens, "seconds": state.seconds, "final": True} | values
    )
    record.final_validation = {name.removeprefix("validation_"): value for name, value in values.items()}
    record.state = "finished"


def diverged(
    session: Session, micro_batches: list[dict[str, torch.Tensor]], loss: float, grad_norm: float
) -> Diverged:
    """Write what is known of the last non-finite step to nonfinite.json; the error to raise."""
    config, state = session.config, session.state
    first = state.step * config.train.batch_size
    device = session.accelerator.device
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in micro_batches]
    with session.accelerator.autocast():
        found = first_nonfinite_layer(session.model, batches)
    by_process = gather_object([found])
    layer = next((each for each in by_process if each != THE_LOSS), THE_LOSS)
    path = session.run.root / "nonfinite.json"
    if session.accelerator.is_main_process:
        write_json(
            path,
            {
                "step": state.step + 1,
                "loss": repr(loss),
                "grad_norm": repr(grad_norm),
                "first_nonfinite": layer,
                "first_nonfinite_by_process": by_process,
                "sequences": {
                    f"step {state.step + 1 - back}": [
                        first - back * config.train.batch_size,
                        first - (back - 1) * config.train.batch_size,
                    ]
                    for back in reversed(range(MAX_NONFINITE_STEPS))
                },
                "sequences_meaning": "first and one past the last place in the run's order (data.data_seed)",
            },
        )
    return Diverged(
        f"{config.name}: loss or gradient not finite in {MAX_NONFINITE_STEPS} steps in a row, up to step "
        f"{state.step + 1}; first in {layer}; see {path}; lower train.learning_rate (now "
        f"{config.train.learning_rate:g}) or train in fp32"
    )
