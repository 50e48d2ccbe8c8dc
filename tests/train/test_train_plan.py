"""The plan of a billion parameters fits a laptop: processor time and memory of the whole command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_plan_of_a_billion_parameters_takes_seconds_and_little_memory(tmp_path):
    out = tmp_path / "plan.txt"
    with open(out, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "kanlm", "plan", str(ROOT / "configs" / "plan-1b.toml")],
            stdout=file,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 20  # seconds
    assert used.ru_maxrss * 1024 < 2 * 2**30  # bytes
    text = out.read_text()
    assert all(word in text for word in ("64", "fsdp2", "ddp", "days")), text
