"""Checkpoints: complete, checksummed, replaced in one rename, the same whatever the number of processes.

    checkpoints/step-00001000/
      manifest.json           size and sha256 of every other file; written last
      model.json              KanLMConfig, or that of a converted family
      model.safetensors       full (unsharded) parameters; a tied head is not stored twice
      optimizer.safetensors   full optimiser state, `PARAMETER/exp_avg` and so on
      trainer.json            step, tokens, loader state, and what else an exact resume needs

Nothing goes through pickle. Sharded (FSDP2) and replicated (DDP) runs are gathered by
torch.distributed.checkpoint.state_dict into the same files, so a checkpoint resumes on any number of
processes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from transformers import PreTrainedTokenizerFast

from kanlm.checksums import must_be_readable
from kanlm.config import UserError
from kanlm.initial import config_of, tied_weights
from kanlm.runs import RunDir, file_sha256, new_folder, read_json, step_of, write_json

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FILES = {"model.safetensors", "optimizer.safetensors", "model.json", "trainer.json"}
DISK_ERRORS = (errno.EIO, errno.EINTR, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENFILE)
"""What says nothing of a file's content."""


class CorruptCheckpoint(UserError):
    """A checkpoint folder whose files are not those of its manifest."""


class UnreadableCheckpoint(CorruptCheckpoint):
    """One that the disk does not give now; it may be whole."""


@dataclass(frozen=True)
class Snapshot:
    """A training state in CPU memory that no later step changes."""

    step: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    model_config: dict[str, Any]
    trainer: dict[str, Any]

    def write(self, folder: Path) -> None:
        """The checkpoint `folder`, which is there as soon as it is complete; the manifest is written last."""
        with new_folder(folder) as new:
            save_file(self.model, new / "model.safetensors", metadata={"format": "pt"})
            save_file(self.optimizer, new / "optimizer.safetensors", metadata={"format": "pt"})
            write_json(new / "model.json", self.model_config)
            write_json(new / "trainer.json", self.trainer)
            files = {
                path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(new.iterdir())
            }
            write_json(new / "manifest.json", {"step": self.step, "files": files})


def gather_states(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Full state dicts of the model and of the optimisers, by parameter name."""
    return cast(tuple[dict[str, Any], dict[str, Any]], get_state_dict(model, optimizers, options=FULL))


def snapshot(
    step: int,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    config: Any,
    trainer: dict[str, Any],
) -> Snapshot:
    """The state of `model` and `optimizers` in CPU memory. All processes call it; the main one has it."""
    weights, states = gather_states(model, optimizers)
    tied = tied_weights(config)
    # On a CPU the state dict may still share memory with the model.
    on_cpu = next(model.parameters()).device.type == "cpu"

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone() if on_cpu else tensor.detach().contiguous()

    return Snapshot(
        step=step,
        model={name: copied(tensor) for name, tensor in weights.items() if name not in tied},
        optimizer={
            f"{name}/{key}": copied(tensor)
            for name, state in states.get("state", {}).items()
            for key, tensor in state.items()
        },
        model_config=config.to_dict(),
        trainer=trainer,
    )


def restore(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load the weights and optimiser states in `folder` into `model` and `optimizers`, sharded or not.

    Hyperparameters stay those of the optimisers passed in: a run's configuration decides them, not its
    checkpoint.
    """
    config = config_of(read_json(folder / "model.json"))
    weights: dict[str, Any] = with_tied(read_tensors(folder / "model.safetensors"), config)
    _, states = gather_states(model, optimizers)  # for the structure: groups and parameter names
    state: dict[str, Any] = {}
    for name, tensor in read_tensors(folder / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(parameter, {})[key] = tensor
    if torch.distributed.is_initialized():  # only the main process holds the gathered structure
        structure = [states.get("param_groups")]
        torch.distributed.broadcast_object_list(structure)
        states["param_groups"] = structure[0]
    set_state_dict(
        model,
        optimizers,
        model_state_dict=weights,
        optim_state_dict={"state": state, "param_groups": states["param_groups"]},
        options=FULL,
    )


def with_tied(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """`weights` with the tied head pointing at the embedding, as a strict load expects it."""
    return weights | {name: weights[source] for name, source in tied_weights(config).items()}


def verify(folder: Path) -> None:
    """Raise `CorruptCheckpoint` where `folder` is not exactly what its manifest lists."""
    try:
        listed = read_json(folder / "manifest.json")["files"]
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise UnreadableCheckpoint(f"{folder}/manifest.json: cannot be read ({error.strerror})") from None
        raise CorruptCheckpoint(
            f"{folder}/manifest.json: cannot be read ({error.strerror}); the checkpoint is not complete"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CorruptCheckpoint(f"{folder}/manifest.json: damaged; the checkpoint is not whole") from None
    if unlisted := FILES - files.keys():
        raise CorruptCheckpoint(f"{folder}/manifest.json: does not list {', '.join(sorted(unlisted))}")
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            found_size, found_digest = path.stat().st_size, file_sha256(path)
        except FileNotFoundError:
            raise CorruptCheckpoint(f"{path}: missing, but listed in manifest.json") from None
        except OSError as error:
            kind = UnreadableCheckpoint if error.errno in DISK_ERRORS else CorruptCheckpoint
            raise kind(f"{path}: cannot be read ({error.strerror})") from None
        if found_size != size:
            raise CorruptCheckpoint(f"{path}: {found_size} bytes where manifest.json says {size}")
        if found_digest != digest:
            raise CorruptCheckpoint(f"{path}: content differs from its sha256 in manifest.json")


def newest_good(
    run: RunDir, say: Callable[[str], None] = print, *, pass_unreadable: bool = True
) -> Path | None:
    """The newest intact checkpoint of `run`, or None where it has none.

    Each damaged one that is passed over is named. `UnreadableCheckpoint` without `pass_unreadable`, where the
    disk does not give one.
    """
    for folder in reversed(run.checkpoint_folders()):
        try:
            verify(folder)
        except CorruptCheckpoint as error:
            if isinstance(error, UnreadableCheckpoint) and not pass_unreadable:
                raise
            say(f"damaged checkpoint passed over: {error}")
        else:
            return folder
    return None


def remove_leftovers(run: RunDir, after_step: int) -> None:
    """Delete unfinished folders of a killed writer, and set aside what claims to be later than `after_step`.

    A folder later than the newest intact one is damaged; it is renamed to `damaged-...`, so that the run can
    write that step again and a person can still look at it.
    """
    if not run.checkpoints.is_dir():
        return
    for path in run.checkpoints.glob(".step-*"):
        shutil.rmtree(path)
    for path in run.checkpoint_folders():
        if step_of(path) > after_step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


class CheckpointWriter:
    """Writes snapshots, by default in a thread while training goes on; at most one write is under way.

    A failed write (no space left, a read-only folder) raises UserError from `check`, `save` or `finish`,
    whichever comes first, or is printed there when `on_error` is "continue"; older checkpoints are untouched
    either way. Whatever else goes wrong in the thread is raised there as it is.
    """

    def __init__(
        self,
        run: RunDir,
        keep_last: int,
        keep_every: int,
        asynchronous: bool,
        on_error: str,
        say: Callable[[str], None],
    ):
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every
        self.asynchronous, self.on_error, self.say = asynchronous, on_error, say
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.asked_step: int | None = None
        self.written_step: int | None = None

    def save(self, state: Snapshot) -> None:
        """Begin to write `state`, also where the write before it has failed; that is told now."""
        self.wait()
        earlier, self.error = self.error, None
        self.asked_step = state.step
        if self.asynchronous:
            self.thread = threading.Thread(target=self._write, args=(state,), name="checkpoint")
            self.thread.start()
        else:
            self._write(state)
        self._report(earlier)
        self.check()

    def check(self) -> None:
        """Report a failure if the write under way has ended in one; costs next to nothing."""
        if self.thread is None or not self.thread.is_alive():
            self.wait()
            error, self.error = self.error, None
            self._report(error)

    def wait(self) -> None:
        """Until nothing is being written; says nothing of how it went."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def finish(self) -> None:
        """Wait for a run's last checkpoint, without which the run has not finished."""
        self.wait()
        if self.error is not None:
            raise self.error
        if self.written_step != self.asked_step:
            raise UserError(
                f"{self.run.checkpoint(self.asked_step or 0)}: the last checkpoint was not written; run again"
            )

    def _report(self, error: BaseException | None) -> None:
        if error is None:
            return
        if not isinstance(error, UserError) or self.on_error == "stop":
            raise error
        self.say(f"{error}; training goes on without it (train.on_checkpoint_error = continue)")

    def _write(self, state: Snapshot) -> None:
        folder = self.run.checkpoint(state.step)
        try:
            state.write(folder)
            self.written_step = state.step
            self._prune()
        except (OSError, SafetensorError) as error:
            good = newest_good(self.run, say=lambda _: None)
            kept = f"{good.name} is intact" if good else "no earlier checkpoint exists"
            self.error = UserError(
                f"{folder}: the checkpoint could not be written ({error}); {kept}; "
                "free some space and run again"
            )
        except BaseException as error:  # of a thread, where it would be lost; `check` raises it
            self.error = error

    def _prune(self) -> None:
        folders = self.run.checkpoint_folders()
        for folder in folders[: -self.keep_last]:
            if not (self.keep_every and step_of(folder) % self.keep_every == 0):
                shutil.rmtree(folder)


def load_model(run_dir: str | Path, step: int | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """Architecture and weights of the newest intact checkpoint below `run_dir`, or of `step`.

    The state dict fits a strict `load_state_dict`. Raises UserError where there is no such checkpoint,
    CorruptCheckpoint where the `step` asked for is damaged.
    """
    run = RunDir(run_dir)
    if step is None:
        folder = newest_good(run, pass_unreadable=False)  # training goes on from an older one, nothing else
        if folder is None:
            raise UserError(
                f"{run.root}: holds no intact checkpoint; train it first: kanlm train CONFIG.toml"
            )
    else:
        folder = run.checkpoint(step)
        if not folder.is_dir():
            found = ", ".join(str(step_of(path)) for path in run.checkpoint_folders()) or "none"
            raise UserError(f"{run.root}: no checkpoint of step {step}; steps that it holds: {found}")
        verify(folder)
    config = config_of(read_json(folder / "model.json"))
    return config, with_tied(read_tensors(folder / "model.safetensors"), config)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file; OSError where it cannot be read, for which torch has RuntimeError."""
    try:
        return load_file(path)
    except RuntimeError as error:
        if (found := re.search(r"unable to (?:open|mmap).*\((\d+)\)$", str(error), re.S)) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None


def load_tokenizer(run_dir: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer that the run was trained with."""
    folder = RunDir(run_dir).tokenizer
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json; {run_dir} is not the folder of a run that has started")
    must_be_readable(folder)
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The tokenizers library has no class of its own for a file that it cannot read.
        file = folder / "tokenizer.json"
        raise UserError(f"{file}: cannot be read ({error}); run the same command again") from None
