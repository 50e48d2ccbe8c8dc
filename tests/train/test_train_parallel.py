"""What the loop asks of the process it runs in: threads, and memory that a step's end keeps for the next."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from kanlm.train import parallel

FAULTS = """
import resource, sys, torch
from kanlm.train.parallel import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**22)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()  # the heap grows once
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc")
def test_freed_memory_is_used_again():
    """Twenty tensors of 4,096 pages: without the setting their pages are fetched anew each time."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment
    )
    before, after = map(int, done.stdout.split())
    assert before > 1000
    assert after < 100


def test_threads_are_set_only_where_they_change(monkeypatch):
    """`torch.set_num_threads` costs a step some percent, even when it sets what already is."""
    calls = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)

    class One:
        num_processes = 1

    parallel.set_threads(One(), torch.get_num_threads())
    assert calls == []
    parallel.set_threads(One(), torch.get_num_threads() + 1)
    assert calls == [torch.get_num_threads() + 1]
