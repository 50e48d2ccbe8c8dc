"""Training: one run from its configuration to a finished checkpoint, resumable at any step.

`train(config)` is called in every process that `accelerate launch` starts. Read from the top: `train`,
`run_steps`, then `one_step` in step.py.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

from kanlm.config import RunConfig, UserError
from kanlm.evaluation.perplexity import validation_loss
from kanlm.runs import RunDir, RunRecord
from kanlm.sizing import architecture
from kanlm.train import checkpoint
from kanlm.train.batches import read_text
from kanlm.train.build import build
from kanlm.train.faults import Diverged, StopSignal, failure_kind
from kanlm.train.health import health_metrics
from kanlm.train.heartbeat import watched_machines
from kanlm.train.lock import locked
from kanlm.train.parallel import new_accelerator, place
from kanlm.train.resume import finished_record
from kanlm.train.session import Session, open_session, opening_recorded
from kanlm.train.step import Step, one_step

HIGH_LOSS, MAX_HIGH_STEPS = 1.5, 20
"""A loss above so many times ln(vocabulary), in so many steps in a row, stops a run."""


def train(config: RunConfig) -> RunRecord:
    """Train the run that `config` describes, or go on where its folder's last intact checkpoint stands.

    Returns the record of run.json: state "finished", or "interrupted" after SIGTERM or SIGINT. UserError for
    mistakes of configuration, data or environment and for a full disk; `Diverged` after three steps in a row
    that are not finite, or after `MAX_HIGH_STEPS` with a loss far above that of a blind guess.
    """
    run = RunDir(config.run_dir)
    if (done := finished_record(config, run)) is not None:
        if os.environ.get("RANK", "0") == "0":
            print(f"{run.root}: finished before, {done.step:,} steps; nothing is left to do", flush=True)
        return done
    with (
        new_accelerator(config) as accelerator,
        watched_machines(accelerator, run),
        StopSignal() as stop_signal,
    ):
        with stop_signal.acting_at_once(config.name, say=accelerator.print):
            # Mistakes in sizes are told before any text is read; its tokenizer may be smaller than planned.
            micro_batch_size, accumulation_steps = config.train.micro_batches(accelerator.num_processes)
            _ = config.total_steps  # an error where the budget is less than one step
            architecture(config)
            text = read_text(config, accelerator, micro_batch_size, accumulation_steps)
            special = {name: getattr(text.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
            trainable = build(
                architecture(config, len(text.tokenizer), **special),
                config.train,
                accelerator.device,
                seed=config.seed,
                init_from=config.init_from,
                placement=partial(place, accelerator),
            )
        # So far nothing is written into the run's folder, so that a mistake leaves none behind.
        with locked(run, accelerator):
            with opening_recorded(run, accelerator):
                session = open_session(config, run, accelerator, stop_signal, text, trainable)
            with end_recorded(session):
                run_steps(session)
                finish(session)
    return session.record


@contextmanager
def end_recorded(session: Session) -> Iterator[None]:
    """However the steps end, run.json says so, the checkpoint under way is written, the files are closed."""
    well = False
    try:
        yield
        well = True
    except BaseException as error:
        session.record.state = "failed"
        session.record.failure = f"{type(error).__name__}: {error}"
        session.record.failure_kind = failure_kind(error)
        raise
    finally:
        session.writer.wait()
        try:
            session.keep_record(session.state)
        except UserError as error:
            if well:  # else it must not take the place of what ended the run
                raise
            session.progress.say(str(error))
        finally:
            session.progress.close()


def run_steps(session: Session) -> None:
    """Steps until the token budget is spent or a signal asks to stop; logs, validations, checkpoints."""
    settings, state = session.config.train, session.state
    logged_tokens, logged_seconds, reading_seconds = state.tokens, state.seconds, 0.0
    stopping = False
    while state.step < session.total_steps and not stopping:
        started, thread_started = time.perf_counter(), time.thread_time()
        done = one_step(session)
        seconds = time.perf_counter() - started
        state.step += 1
        state.tokens += session.config.step_tokens
        state.seconds += seconds
        reading_seconds += done.reading_seconds
        stopping = done.stopping  # on all processes, or a collective operation would wait for ever
        session.progress.step_done()
        if notice := session.busy.step_done(seconds, time.thread_time() - thread_started):
            session.progress.say(notice)
        stop_where_the_loss_stays_high(session, done.loss)

        last = state.step == session.total_steps
        every = settings.eval_every
        validate = every > 0 and (last or state.step % every == 0)
        # With all of the held-out text the last step's validation is the run's final one.
        validate |= last and settings.eval_tokens is None
        health = state.step % settings.health_every == 0 if settings.health_every else validate or last
        if state.step % settings.log_every == 0 or state.step == 1 or last or validate or health:
            passed = state.seconds - logged_seconds
            values = step_metrics(session, done, (state.tokens - logged_tokens) / passed)
            values["data_share"] = reading_seconds / passed
            logged_tokens, logged_seconds, reading_seconds = state.tokens, state.seconds, 0.0
            if validate:
                values |= validation_metrics(session, settings.eval_tokens)
            if health:
                values |= health_metrics(session.accelerator, session.model, done.batch)
            session.progress.log(values)
        session.writer.check()  # a checkpoint that could not be written ends the run now, not at its end
        session.keep_record(state, at_most_every_seconds=10.0)
        due = done.save_due or (settings.save_every > 0 and state.step % settings.save_every == 0)
        if due or last or stopping:
            save(session)
    session.writer.finish()
    session.accelerator.wait_for_everyone()  # a launcher ends all processes when the first one has ended


def stop_where_the_loss_stays_high(session: Session, loss: float) -> None:
    """`Diverged` after `MAX_HIGH_STEPS` in a row above `HIGH_LOSS` times a blind guess's, ln(vocabulary).

    A run starts at about that loss, so one that stays far above it has unlearned more than it could know.
    """
    state, guess = session.state, math.log(session.model_config.vocab_size)
    if math.isfinite(loss):
        state.high_in_a_row = state.high_in_a_row + 1 if loss > HIGH_LOSS * guess else 0
    if state.high_in_a_row == MAX_HIGH_STEPS:
        raise Diverged(
            f"{session.config.name}: loss {loss:.2f} at step {state.step}, and for {MAX_HIGH_STEPS} steps "
            f"above {HIGH_LOSS} times ln(vocabulary) = {guess:.2f}, which a model that knows nothing has; "
            f"lower train.learning_rate (now {session.config.train.learning_rate:g})"
        )


def step_metrics(session: Session, done: Step, tokens_per_second: float) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    state = session.state
    tokens_left = (session.total_steps - state.step) * session.config.step_tokens
    return {
        "step": state.step,
        "tokens": state.tokens,
        "loss": done.loss,
        "lr": done.learning_rate,
        "grad_norm": done.grad_norm,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * session.flops_per_token / session.peak_flops,
        "seconds": state.seconds,
        "seconds_left": tokens_left / tokens_per_second,
        "skipped_steps": state.skipped_steps,
    }


def validation_metrics(session: Session, max_tokens: int | None) -> dict[str, float]:
    """`validation_loss` and its relatives on the first `max_tokens` of the held-out text, or on all of it."""
    with session.accelerator.autocast():
        values = validation_loss(
            session.model,
            session.validation,
            block_size=session.config.data.block_size,
            batch_size=session.micro_batch_size,
            max_tokens=max_tokens,
            cross_document_attention=session.config.data.cross_document_attention,
        )
    if max_tokens is None and session.state.step == session.total_steps:
        session.record.final_validation = values
    return {f"validation_{name}": value for name, value in values.items()}


def save(session: Session) -> None:
    """A checkpoint of the step that is done; its files are written while training goes on."""
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
    """The final validation and the closing line of a run that has spent its budget, or how to go on."""
    state, record, run = session.state, session.record, session.run
    if state.step < session.total_steps:
        record.state = "interrupted"
        session.progress.say(
            f"stopped by a signal after step {state.step} of {session.total_steps}; checkpoint: "
            f"{run.checkpoint(state.step)}; run the same command again to go on"
        )
        return
    if record.final_validation is None:  # judged on a part so far, or resumed after the last step
        session.progress.track({"step": state.step} | validation_metrics(session, None))
    record.state = "finished"
    assert record.final_validation is not None
    if notice := blind_notice(record.final_validation["loss"], session.model_config.vocab_size):
        session.progress.say(notice)
    bits_per_byte = record.final_validation["bits_per_byte"]
    manifest, beyond = session.validation.manifest, ""
    if known := manifest.get("known_bits"):  # a text whose entropy is known: no model is expected below it
        beyond = f", {bits_per_byte - known / manifest['bytes']:.4f} above the text's entropy"
    session.progress.say(
        f"finished: {state.tokens:,} tokens in {timedelta(seconds=round(state.seconds))}, validation "
        f"{bits_per_byte:.4f} bits/byte{beyond}; next: kanlm export {run.root}"
    )


def blind_notice(loss: float, vocab_size: int) -> str | None:
    """What to say of a run that finished with a held-out `loss` [nats/token] above that of a blind guess."""
    guess = math.log(vocab_size)
    if loss <= guess:
        return None
    return (
        f"held-out loss {loss:.2f} is above ln(vocabulary) = {guess:.2f}, which a model that knows nothing "
        "has: this run has learned nothing; lower train.learning_rate or train longer"
    )
