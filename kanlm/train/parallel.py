"""Placement: one process, DDP or FSDP2, as accelerate was launched; and which of them is in use.

accelerate's own FSDP2 serves GPUs. On CPU it ignores its FSDP setting and trains with DDP without a word;
there torch's `fully_shard` is applied here, so that the same launch command shards on both.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from accelerate.utils.environment import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from kanlm.config import RunConfig, TrainConfig, UserError
from kanlm.data.exchange import Exchange
from kanlm.initial import decoder_layers
from kanlm.train import tracking
from kanlm.train.build import MakeOptimizers

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
COLLECTIVE_TIMEOUT = timedelta(hours=3)
"""How long the others wait while one process tokenises a corpus. The launcher sees a process that dies."""


def fsdp_requested() -> bool:
    """Whether accelerate's launch configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def place(
    accelerator: Accelerator, model: PreTrainedModel, make_optimizers: MakeOptimizers
) -> tuple[nn.Module, list[AcceleratedOptimizer]]:
    """The model and its optimisers as this launch runs them; UserError where it asks for what cannot be."""
    if fsdp_requested() and accelerator.num_processes == 1:
        raise UserError(
            "accelerate: FSDP was asked for, but one process was launched; set num_processes to 2 or more"
        )
    placed: nn.Module = model
    if fsdp_requested() and not accelerator.is_fsdp2:
        if accelerator.device.type != "cpu":
            raise UserError("accelerate: fsdp_config.fsdp_version: expected 2; FSDP1 is not supported")
        for layer in decoder_layers(model):
            fully_shard(layer)
        fully_shard(model)
        optimizers = [accelerator.prepare(optimizer) for optimizer in make_optimizers(model)]
    else:
        placed, *optimizers = accelerator.prepare(model, *make_optimizers(model))
    # accelerate makes the model turn its logits to fp32, a copy as large as they are. That is undone here,
    # and the loop opens autocast itself.
    if not isinstance(placed, FSDPModule):
        accelerator.unwrap_model(placed, keep_fp32_wrapper=False)
    expected = {"none": PreTrainedModel, "ddp": DistributedDataParallel, "fsdp2": FSDPModule}[
        wrapper(accelerator)
    ]
    assert isinstance(placed, expected), f"{wrapper(accelerator)}: got a {type(placed).__name__}"
    return placed, optimizers


def wrapper(accelerator: Accelerator) -> str:
    """What wraps the model in this launch: none, ddp or fsdp2."""
    if accelerator.num_processes == 1:
        return "none"
    return "fsdp2" if fsdp_requested() else "ddp"


@contextmanager
def new_accelerator(config: RunConfig) -> Iterator[Accelerator]:
    """accelerate's view of this launch, for one run; UserError where the device lacks the precision."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    # Without `cpu` accelerate starts so many runs of one process each on a machine without GPUs, in silence.
    state = PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or _cpu_processes(processes),
        timeout=COLLECTIVE_TIMEOUT,
    )
    if state.num_processes != processes:
        raise UserError(
            f"accelerate: {processes} processes were launched, but {state.num_processes} train together; "
            "use a launch file that `kanlm configs` lists, or one like it"
        )
    precision = mixed_precision(config.train, state.device)
    set_threads(state, config.train.num_threads)
    if state.device.type == "cpu":
        keep_freed_memory()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=tracking.log_with(config),
        project_config=ProjectConfiguration(project_dir=str(config.run_dir), logging_dir=str(config.run_dir)),
    )
    try:
        yield accelerator
    finally:
        tracking.finish(accelerator)
        if accelerator.device.type == "cuda":
            accelerator.free_memory()  # for the next run of this process; on a CPU that can wait
        AcceleratorState._reset_state()  # the next run of this process may choose another precision


def mixed_precision(settings: TrainConfig, device: torch.device) -> str:
    """no, bf16 or fp16: what `settings` mean on `device`; UserError where it cannot do that."""
    wanted, on_gpu = settings.mixed_precision, device.type == "cuda"
    # torch emulates bf16 on GPUs that lack it, slower than fp32.
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if has_bf16 else "no"
    if wanted == "bf16" and on_gpu and not has_bf16:
        raise UserError("train.mixed_precision: this GPU has no bf16; use 'fp16', 'no' or 'auto'")
    if wanted == "fp16" and not on_gpu:
        raise UserError(
            f"train.mixed_precision: 'fp16' needs a GPU, and this run is on {device.type}; "
            "use 'no', 'bf16' or 'auto'"
        )
    if wanted == "fp16":  # its loss scale serves one optimiser
        for key in ("optimizer", "kan_optimizer"):
            if getattr(settings, key) == "muon":
                raise UserError(
                    f"train.mixed_precision: 'fp16' does not go with train.{key} = 'muon'; use 'bf16'"
                )
    return wanted


def _cpu_processes(processes: int) -> bool:
    return processes > 1 and not torch.cuda.is_available()


def new_exchange(accelerator: Accelerator) -> Exchange | None:
    """Of token ids between all processes; None of a lone one."""
    if accelerator.num_processes == 1:
        return None
    return Exchange(shared_store(accelerator), accelerator.process_index, accelerator.num_processes)


def shared_store(accelerator: Accelerator) -> torch.distributed.Store:
    """A new key-value store in the main process; all processes call it at the same time."""
    host, rank = os.environ["MASTER_ADDR"], accelerator.process_index

    def opened(port: int) -> torch.distributed.TCPStore:
        return torch.distributed.TCPStore(
            host, port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=20)
        )

    store = opened(0) if rank == 0 else None
    port = [store.port if store is not None else 0]
    torch.distributed.broadcast_object_list(port)
    return store if store is not None else opened(port[0])


def set_threads(state: PartialState, num_threads: int | None) -> None:
    """torch threads of this process: as configured, else a lone process's OMP_NUM_THREADS, else its share
    of the cores.

    Of several processes OMP_NUM_THREADS says nothing: accelerate and torchrun set it to 1 themselves.
    """
    if num_threads is None and state.num_processes == 1 and "OMP_NUM_THREADS" in os.environ:
        return
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    wanted = num_threads or max(1, len(os.sched_getaffinity(0)) // local_processes)
    if wanted != torch.get_num_threads():  # setting them, even to what they are, slows a step by some percent
        torch.set_num_threads(wanted)


def keep_freed_memory() -> None:
    """Let glibc keep what a step on the CPU frees for the next one, which otherwise pays for fresh pages.

    Tensors of up to 32 MiB, the most that glibc allows here, come from the heap, and the heap is not given
    back; resident memory stays at its peak, which the next step reaches again. Does nothing elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return
    mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
