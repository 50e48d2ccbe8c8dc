"""What can go wrong in a step: signals, NaN and Inf, parameters that never learn."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from kanlm.config import RunConfig, UserError
from kanlm.kernels import functions_called
from kanlm.runs import FailureKind, write_json

THE_LOSS = "the loss"
"""Where a number that is not finite first appears if no layer, parameter or gradient holds one."""
MAX_NONFINITE_STEPS = 3
"""Steps in a row with a NaN or Inf that stop a run."""


class Diverged(UserError):
    """Training stopped because its numbers were not finite, or its loss ran away."""


def failure_kind(error: BaseException) -> FailureKind:
    """What run.json says of a run that `error` ended."""
    if isinstance(error, Diverged):
        return "diverged"
    return "user_error" if isinstance(error, UserError) else "crashed"


class Stopped(SystemExit):
    """A signal to stop that came before the first step; the process ends with status 0."""


class StopSignal:
    """Remembers SIGTERM and SIGINT for the duration of a `with` block, so that a step can be finished first.

    Within `acting_at_once` they raise `Stopped` instead. A second SIGINT acts at once. Outside the main
    thread no handler can be set; the signals then act as before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        except ValueError:  # not the main thread
            self._previous.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def acting_at_once(self, run_name: str, say: Callable[..., None]) -> Iterator[None]:
        """Before the first step there is nothing to save: a signal ends the process, with a line."""
        self._at_once = True
        try:
            yield
        except Stopped:
            say(
                f"{run_name}: stopped by a signal before the first step; what is tokenised is kept; run the "
                "same command again to go on",
                flush=True,
            )
            raise
        finally:
            self._at_once = False

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self._at_once:
            raise Stopped(0)
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt


class ZeroGradientWatch:
    """Finds trainable parameters whose gradient was exactly zero in each of the first `steps` steps.

    Such a parameter is dead by construction (a zero factor in front of it, a branch that is not used), not
    slow. `silent` names those not seen moving yet; it is part of the trainer state, so that a resumed run
    goes on watching.
    """

    def __init__(self, model: nn.Module, steps: int, silent: Iterable[str] | None = None):
        self.steps = steps
        names = {_plain(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.silent = set(names if silent is None else silent)

    def observe(self, model: nn.Module, steps_done: int) -> None:
        """Look at a step's gradients, before they are cleared; UserError at the last of the steps."""
        if steps_done > self.steps or not self.silent:
            return
        watched = [(name, p) for name, p in model.named_parameters() if _plain(name) in self.silent]
        moved = torch.zeros(len(watched), device=watched[0][1].device)
        for index, (_, parameter) in enumerate(watched):
            if parameter.grad is not None:
                moved[index] = _local(parameter.grad).count_nonzero() > 0
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(moved)
        self.silent -= {_plain(name) for (name, _), seen in zip(watched, moved.tolist(), strict=True) if seen}
        if steps_done == self.steps and self.silent:
            raise UserError(
                f"train.zero_gradient_steps: in all of the first {self.steps} steps the gradient was exactly "
                f"zero for {', '.join(sorted(self.silent))}; this parameter cannot learn: check its "
                "initialisation, or set train.zero_gradient_steps=0 to train anyway"
            )


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_nonfinite_layer(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> str:
    """Where NaN or Inf first appears when `batches` go through `model`: a module's output, else a gradient.

    Runs forward passes without gradients, as many in each process; gradients of the failed step must still be
    in place.
    """
    found: list[str] = []

    def hook(name: str):
        def check(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, torch.Tensor) and not first.isfinite().all():
                found.append(f"output of {name} ({type(module).__name__})")

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), functions_called(model):
            for batch in batches:
                model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    for name, parameter in model.named_parameters():
        if not _local(parameter).isfinite().all():
            return f"parameter {_plain(name)}"
    for name, parameter in reversed(list(model.named_parameters())):  # nearest to the loss first
        if parameter.grad is not None and not _local(parameter.grad).isfinite().all():
            return f"gradient of {_plain(name)}"
    return THE_LOSS


def nonfinite_error(
    config: RunConfig,
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: list[dict[str, torch.Tensor]],
    step: int,
    loss: float,
    grad_norm: float,
) -> Diverged:
    """The error to raise; what is known of the last step (0-based `step`) is written to nonfinite.json."""
    batches = [{name: value.to(accelerator.device) for name, value in each.items()} for each in micro_batches]
    with accelerator.autocast():
        found = first_nonfinite_layer(model, batches)
    by_process = gather_object([found])
    layer = next((each for each in by_process if each != THE_LOSS), THE_LOSS)
    path, size = config.run_dir / "nonfinite.json", config.train.batch_size
    if accelerator.is_main_process:
        sequences = {
            f"step {back + 1}": [back * size, (back + 1) * size]
            for back in range(step - MAX_NONFINITE_STEPS + 1, step + 1)
        }
        write_json(
            path,
            {
                "step": step + 1,
                "loss": repr(loss),
                "grad_norm": repr(grad_norm),
                "first_nonfinite": layer,
                "first_nonfinite_by_process": by_process,
                "sequences": sequences,
                "sequences_meaning": "first and one past the last place in the run's order (data.data_seed)",
            },
        )
    return Diverged(
        f"{config.name}: loss or gradient not finite in {MAX_NONFINITE_STEPS} steps in a row, up to step "
        f"{step + 1}; first in {layer}; see {path}; lower train.learning_rate (now "
        f"{config.train.learning_rate:g}) or train in fp32"
    )
