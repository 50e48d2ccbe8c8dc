"""One optimiser step: forward and backward over the micro-batches, then the optimisers.

Read `one_step` first; what it calls stands below it in the order of the calls. The loss of a step is the sum
over the valid tokens of all processes and micro-batches divided by their number, so that it is the same
function of the batch however the batch is cut.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kanlm.initial import has_dropout
from kanlm.train.batches import Batch
from kanlm.train.faults import MAX_NONFINITE_STEPS, nonfinite_error
from kanlm.train.schedule import learning_rate_factor
from kanlm.train.session import Session


@dataclass
class Step:
    """One optimiser step as it was done; loss in nats/token over the global batch, z-loss not included."""

    loss: float
    grad_norm: float
    learning_rate: float
    reading_seconds: float
    """That reading batches has taken since the last step's were taken."""
    batch: Batch
    """The last micro-batch of this process."""
    stopping: bool
    """Whether some process has received a signal to stop."""
    save_due: bool
    """Whether the last checkpoint is `save_minutes` old."""


def one_step(session: Session) -> Step:
    """Forward and backward over the micro-batches, then the optimiser, unless a number is not finite."""
    settings, state = session.config.train, session.state
    accelerator, model = session.accelerator, session.model
    # The loader's place after these batches: a checkpoint of this step must not hold that of a read-ahead.
    micro_batches, state.loader, reading_seconds = session.batches.take()
    valid_tokens, stopping, save_due = agree_over_processes(session, micro_batches)
    if has_dropout(session.model_config):  # a function of the step, so that a resumed run repeats it
        torch.manual_seed(dropout_seed(session.config.seed, state.step, accelerator.process_index))
    learning_rate = set_learning_rates(session)

    loss_sum = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro_batches, 1):
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        # Gradients are exchanged once a step, in the backward pass of the last micro-batch.
        with nullcontext() if number == len(micro_batches) else no_sync(accelerator, model):
            with accelerator.autocast():
                # The model sums over its tokens and divides by those of the whole step.
                output = model(**batch, num_items_in_batch=valid_tokens, use_cache=False)
            loss = output.loss
            loss_sum += loss.detach()
            if settings.z_loss > 0:
                squares = squared_log_partition(output.logits, batch["labels"])
                loss = loss + settings.z_loss * squares / valid_tokens
            del output  # backward needs the logits' memory
            # DDP and FSDP2 average gradients over processes. The factor makes that a sum, and the division
            # by the global number of valid tokens, which the model has done, makes it exact for documents
            # and micro-batches of any length.
            accelerator.backward(loss * accelerator.num_processes)
    if accelerator.scaler is not None:  # fp16: clipping and the finite check need the true gradients
        accelerator.unscale_gradients()
    loss_tensor, norm_tensor = global_sum(loss_sum), gradient_norm(model)
    # A GPU is still at work on the gradients; the next batch is read before its numbers are waited for.
    if state.step + 1 < session.total_steps:
        session.batches.read_ahead()
    mean_loss, grad_norm = loss_tensor.item(), norm_tensor.item()

    if math.isfinite(mean_loss) and math.isfinite(grad_norm):
        clip_gradients(model, grad_norm, settings.max_grad_norm)
        session.watch.observe(model, state.step + 1)  # before the gradients are cleared
        for optimizer in session.optimizers:
            optimizer.step()
        state.nonfinite_in_a_row = 0
    else:
        leave_out_step(session, micro_batches, mean_loss, grad_norm)
    for optimizer in session.optimizers:
        optimizer.zero_grad()
    if accelerator.num_processes == 1:  # a signal during the step; several processes stop after the next
        stopping = session.stop_signal.received is not None
    return Step(mean_loss, grad_norm, learning_rate, reading_seconds, micro_batches[-1], stopping, save_due)


def agree_over_processes(session: Session, micro_batches: list[Batch]) -> tuple[int, bool, bool]:
    """Of the step over all processes: valid tokens, whether to stop after it, whether to save after it.

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


def global_sum(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all processes, in place."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def dropout_seed(seed: int, step: int, process: int) -> int:
    """64 bits, another for each step and process."""
    digest = hashlib.blake2b(f"{seed} {step} {process}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def set_learning_rates(session: Session) -> float:
    """Give every group of every optimiser its rate of this step; the one of the matrices is returned."""
    settings = session.config.train
    factor = learning_rate_factor(session.state.step, session.total_steps, settings)
    for optimizer in session.raw_optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return settings.learning_rate * factor


@contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Gradients stay local to the process: for every micro-batch of a step but the last."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)  # accelerate does not know of the sharding done here on a CPU
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def squared_log_partition(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over valid tokens of (ln Z)^2, Z the softmax denominator.

    logits [B, T, V]; labels [B, T], not yet shifted. The z-loss of Chowdhery et al. 2022, sec. 5
    (https://arxiv.org/abs/2204.02311).
    """
    log_partition = logits[:, :-1].float().logsumexp(dim=-1)  # [B, T - 1]
    return (log_partition.square() * (labels[:, 1:] != -100)).sum()


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """L2 norm of all gradients, over all shards; 0-dim, on the device."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(model: nn.Module, norm: float, max_norm: float) -> None:
    """Scale all gradients so that their norm, which is `norm`, is at most `max_norm`; 0 = no clipping.

    torch's own clipping multiplies every gradient in every step, by 1 where nothing is to do.
    """
    if max_norm > 0 and norm > max_norm:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, max_norm / norm)


def leave_out_step(session: Session, micro_batches: list[Batch], loss: float, grad_norm: float) -> None:
    """Count a step that is not finite and say so; `Diverged` after `MAX_NONFINITE_STEPS` in a row."""
    state = session.state
    state.skipped_steps += 1
    blamed = "the loss scale was too high, and is halved"
    if not lower_scale(session.accelerator.scaler) or not math.isfinite(loss):
        state.nonfinite_in_a_row += 1
        blamed = f"{state.nonfinite_in_a_row} in a row"
    session.progress.say(
        f"step {state.step + 1}: loss {loss}, gradient norm {grad_norm}; the step was left out ({blamed})"
    )
    if state.nonfinite_in_a_row == MAX_NONFINITE_STEPS:
        raise nonfinite_error(
            session.config, session.accelerator, session.model, micro_batches, state.step, loss, grad_norm
        )


def lower_scale(scaler: torch.amp.GradScaler | None) -> bool:
    """Halve fp16's loss scale; whether it was above 1, and so to blame for a gradient that is not finite.

    It starts at 2^16, so at most 16 steps can be left out without the model's fault.
    """
    if scaler is None:
        return False
    scale = scaler.get_scale()
    scaler.update(scale * scaler.get_backoff_factor())  # on all processes alike
    return scale > 1
