"""A signal to the launcher, as a scheduler sends it, saves the run, and no process stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kanlm.runs import RunDir
from kanlm.train import loop
from kanlm.train.launcher import is_launcher
from kanlm.train.lock import is_locked

ROOT = Path(__file__).parents[2]
SETTINGS = ("train.max_tokens=102_400", "train.zero_gradient_steps=0")  # 800 steps


def waited_for(happened, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < deadline and process.poll() in (None, -9, -15), log.read_text()
        time.sleep(0.02)


slow = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"),
    [
        (1, signal.SIGTERM),
        (2, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=slow),
        pytest.param(2, signal.SIGINT, marks=slow),
        pytest.param(1, signal.SIGKILL, marks=slow),
        pytest.param(2, signal.SIGKILL, marks=slow),
    ],
)
def test_signal_to_the_launcher_saves_the_run(
    processes, number, write_toml, run_config, tmp_path, losses, free_port
):
    path, config, log = write_toml(*SETTINGS), run_config(*SETTINGS), tmp_path / "log"
    run = RunDir(config.run_dir)
    how = ["--num_processes", "1"]
    if processes == 2:
        how = ["--config_file", str(ROOT / "configs/accelerate/2-cpus-ddp.yaml")]
        how += ["--main_process_port", str(free_port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "-m", "kanlm", "train", str(path)]
    with open(log, "w") as out:
        # Where the tests run in the background, SIGINT is ignored, and a child would inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            launcher = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        finally:
            signal.signal(signal.SIGINT, before)
    waited_for(lambda: run.metrics.exists() and run.metrics.read_text().count("\n") > 3, launcher, log)
    launcher.send_signal(number)
    assert launcher.wait(timeout=120) != 0  # a launcher's own status after a signal, of the run says nothing
    deadline = time.monotonic() + 60
    while is_locked(run):  # the launcher of one process does not wait for it
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)

    record = json.loads(run.record.read_text())
    assert record["state"] == "interrupted" and 3 < record["step"] < 800, log.read_text()
    assert "run the same command again to go on" in log.read_text()
    used = {name: record["provenance"][name] for name in ("processes", "wrapper")}
    assert used == {"processes": processes, "wrapper": "ddp" if processes == 2 else "none"}
    trainer = json.loads((run.checkpoint(record["step"]) / "trainer.json").read_text())
    assert trainer["loader"]["consumed"] == 4 * record["step"] and trainer["world_size"] == processes
    assert loop.train(config).state == "finished"
    if processes == 1:
        alone = run_config("name=alone", *SETTINGS)
        loop.train(alone)
        assert losses(config) == losses(alone)
    else:
        assert list(losses(config)) == list(range(1, 801))


@slow
def test_two_launchers_that_meet_train_one_run(write_toml, run_config, tmp_path, free_port):
    """The launch of two machines, on one: one process for each launcher."""
    config = ROOT / "configs" / "accelerate" / "2x8-gpus.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [
        "--num_processes",
        "2",
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        str(free_port),
    ]
    command += ["--rdzv_backend", "c10d"]
    log, launchers = tmp_path / "log", []

    def first_listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", free_port)) == 0

    try:
        for machine in (0, 1):
            rest = ["--machine_rank", str(machine), "-m", "kanlm", "train", str(write_toml())]
            with open(log, "a") as out:
                environment = os.environ | {"PYTHONPATH": str(ROOT)}
                launchers.append(subprocess.Popen(command + rest, stdout=out, stderr=out, env=environment))
            waited_for(first_listens, launchers[0], log)
        deadline = time.monotonic() + 240
        while any(launcher.poll() is None for launcher in launchers):
            failed = [launcher.poll() for launcher in launchers if launcher.poll() not in (None, 0)]
            assert not failed and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert [launcher.returncode for launcher in launchers] == [0, 0], log.read_text()
    finally:
        for launcher in launchers:
            launcher.kill()
    record = json.loads((run_config().run_dir / "run.json").read_text())
    assert (record["state"], record["step"]) == ("finished", 12)
    assert (record["provenance"]["processes"], record["provenance"]["wrapper"]) == (2, "ddp")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/v/bin/python /v/bin/accelerate launch -m kanlm train c.toml", True),
        ("/v/bin/python -u -m accelerate.commands.launch --cpu -m kanlm train c.toml", True),
        ("/v/bin/python /v/bin/torchrun --nproc-per-node 2 -m kanlm train c.toml", True),
        ("python -m torch.distributed.run -m kanlm train c.toml", True),
        ("-bash", False),
        ("python -m kanlm compare accelerate.toml", False),
        ("", False),
    ],
)
def test_launchers_are_told_from_shells(line, expected):
    assert is_launcher(line.split(" ")) is expected
