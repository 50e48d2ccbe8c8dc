"""Rank processes on the CPU (gloo) for distributed tests; the source distribution leaves this file out."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function, args=(), nprocs: int = 2) -> None:
    """`function(rank, *args)` in `nprocs` processes; an error in one of them is raised here."""
    mp.spawn(function, args=args, nprocs=nprocs, join=True)


def _in_group(rank: int, world_size: int, port: int, function, args, kwargs) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    _set_rank_device(rank)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """A decorator: the call runs as function(rank, ...) in `world_size` processes of one process group."""

    def decorator(function):
        def call(*args, **kwargs):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            _start_rank_processes(_in_group, (world_size, port, function, args, kwargs), world_size)

        return call

    return decorator
