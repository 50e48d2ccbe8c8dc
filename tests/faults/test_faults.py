"""A sample of the injected faults and of the damages (life.py); the whole takes hours: `python
tests/faults/life.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIFE = Path(__file__).with_name("life.py")
ROOT = LIFE.parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


def ran(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(LIFE), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_sampled_faults_end_in_one_line_and_lose_nothing():
    assert "6 faults injected: " in ran("--no-report", "--sample", "6", "--seed", "3")


@pytest.mark.slow
@pytest.mark.long
def test_more_faults_end_in_one_line_and_lose_nothing():
    assert "300 faults injected: " in ran("--sample", "300")
