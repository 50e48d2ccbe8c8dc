"""kill -9 at any moment: the run goes on, and ends with the weights of a run that was left in peace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kanlm.runs import RunDir
from kanlm.train import loop
from kanlm.train.checkpoint import load_model


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_run_always_goes_on_and_loses_or_doubles_no_batch(
    kills, run_config, run_table, tmp_path, losses
):
    settings = (
        f"train.max_tokens={kills * 25 * 4 * 32}",
        "train.save_every=1",
        "tracking.tracker=none",
        "train.warmup_fraction=0.1",
    )
    peaceful, killed = (
        run_config("name=peaceful", *settings, "train.save_every=0"),
        run_config("name=killed", *settings),
    )
    loop.train(peaceful)
    table = tmp_path / "table.json"
    table.write_text(json.dumps(run_table("name=killed", *settings)))
    worker = Path(__file__).with_name("kill_loop.py")
    command = [sys.executable, str(worker), str(table), str(kills)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    lives = json.loads(ran.stdout)
    assert [life["signal"] for life in lives] == [9] * kills
    newest = [max(life["checkpoints"], default=0) for life in lives]
    assert newest[0] == 0  # killed before its first checkpoint
    assert newest == sorted(newest) and newest[0] < newest[-1] < kills * 25
    assert (
        sum(life["half_written"] for life in lives) >= kills // 4
    )  # kills that hit a checkpoint being written

    assert json.loads(RunDir(killed.run_dir).record.read_text())["state"] == "finished"
    assert losses(killed) == losses(peaceful)
    expected = load_model(peaceful.run_dir)[1]
    for name, weight in load_model(killed.run_dir)[1].items():
        assert torch.equal(weight, expected[name]), name
    assert not list(RunDir(killed.run_dir).checkpoints.glob(".step-*"))


@pytest.mark.slow
def test_soak_keeps_memory_and_file_descriptors_flat(run_config, monkeypatch):
    """2,000 steps with logs, validations and checkpoints: under 20 MiB more resident memory after warm-up."""
    import psutil

    process = psutil.Process()
    seen: list[tuple[int, int]] = []
    real = loop.one_step

    def observed(session):
        if session.state.step in (500, 1000, 1500, 1999):
            seen.append((process.memory_info().rss, process.num_fds()))
        return real(session)

    monkeypatch.setattr(loop, "one_step", observed)
    config = run_config(
        f"train.max_tokens={2000 * 4 * 32}",
        "train.save_every=50",
        "train.eval_every=100",
        "train.log_every=10",
    )
    assert loop.train(config).step == 2000
    memory, descriptors = zip(*seen, strict=True)
    assert max(memory) - memory[0] < 20 * 2**20, memory
    assert max(descriptors) - min(descriptors) <= 1, (
        descriptors
    )  # one more while a checkpoint is being written
