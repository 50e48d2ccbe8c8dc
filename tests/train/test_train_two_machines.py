"""Two machines as two network namespaces with their own addresses: training, a cut link, resumption on one.

The launch is that of scripts/slurm-2x8.sh, by hand in each. Needs root and `ip netns`; skipped elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kanlm.runs import RunDir
from kanlm.train import heartbeat, loop
from kanlm.train.checkpoint import verify
from kanlm.train.heartbeat import Heartbeat

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines():
    """Names of two namespaces that a cable joins; each knows both names by its own hosts file."""
    names = tuple(f"kanlm{number}-{os.getpid()}" for number in (0, 1))
    made: list[str] = []
    etc = [Path("/etc/netns") / name for name in names]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            cables = [f"k{number}-{os.getpid()}" for number in (0, 1)]
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "link", "set", cable, "name", "eth0")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
            for folder in etc:
                folder.mkdir(parents=True)
                hosts = "127.0.0.1 localhost\n" + "".join(map("{} {}\n".format, ADDRESSES, names))
                (folder / "hosts").write_text(hosts)
        except (FileNotFoundError, PermissionError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)
        for folder in etc:
            shutil.rmtree(folder, ignore_errors=True)


def launched(machines: tuple[str, ...], rank: int, config: Path, log: Path) -> subprocess.Popen:
    """The launch line of scripts/slurm-2x8.sh on machine `rank`, for one CPU process a machine."""
    line = [sys.executable, "-m", "accelerate.commands.launch"]
    line += ["--config_file", str(ROOT / "configs/accelerate/2x8-gpus.yaml")]
    line += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    line += ["--main_process_ip", machines[0], "--main_process_port", "29500", "--rdzv_backend", "c10d"]
    line += ["-m", "kanlm", "train", str(config)]
    inside = f"hostname {machines[rank]} && exec " + " ".join(map(repr, line))
    with open(log, "w") as out:
        return subprocess.Popen(
            ["ip", "netns", "exec", machines[rank], "unshare", "--uts", "sh", "-c", inside],
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"},
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.long
def test_cut_link_is_told_on_both_machines_and_one_of_them_goes_on(
    machines, write_toml, run_config, tmp_path
):
    settings = ("train.max_tokens=2_560_000", "train.save_every=20", "train.zero_gradient_steps=0")
    path, config = write_toml(*settings), run_config(*settings)
    run = RunDir(config.run_dir)
    logs = [tmp_path / f"log-{rank}" for rank in (0, 1)]

    def told() -> str:
        return "\n".join(f"--- machine {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))

    def waited_for(happened, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, told()
            time.sleep(0.1)

    launchers = [launched(machines, rank, path, log) for rank, log in enumerate(logs)]
    try:
        waited_for(lambda: len(run.checkpoint_folders()) >= 2, 900)  # a busy machine takes long to import
        record = json.loads(run.record.read_text())
        assert (record["provenance"]["processes"], record["provenance"]["wrapper"]) == (2, "ddp")
        ip("-n", machines[1], "link", "set", "eth0", "down")
        waited_for(lambda: all("machine or the network is gone" in log.read_text() for log in logs), 60)
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    newest = run.checkpoint_folders()[-1]
    verify(newest)
    record = json.loads(run.record.read_text())
    assert record["state"] == "failed" and newest.name in record["failure"]

    shorter = run_config(*settings)  # goes on, on one machine; stopped soon, as the rest is like it
    step, seen = int(newest.name.removeprefix("step-")), []
    real = loop.one_step

    def stopping(session):
        seen.append(session.state.step)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(session)

    loop.one_step = stopping
    try:
        resumed = loop.train(shorter)
    finally:
        loop.one_step = real
    assert (resumed.state, seen) == ("interrupted", [step, step + 1, step + 2])


def test_process_that_falls_silent_is_named(monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.4)
    ends: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(heartbeat.os, "_exit", ends.append)
    store = torch.distributed.HashStore()
    store.set("heartbeat/1", "7")  # and never again
    with Heartbeat(store, 0, 2, lambda who: said.append(who) or who) as beats:
        deadline = time.monotonic() + 20
        while not ends and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ends[:1] == [1] and said[0] == "process 1 has not been heard of for 0 seconds"
    assert beats.silent() is not None


def test_processes_that_beat_are_left_in_peace(monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 5.0)
    ends: list[int] = []
    monkeypatch.setattr(heartbeat.os, "_exit", ends.append)
    store = torch.distributed.HashStore()
    with Heartbeat(store, 0, 2, str) as first, Heartbeat(store, 1, 2, str) as second:
        time.sleep(0.5)
        assert first.silent() is None and second.silent() is None
        assert len(first._heard) == len(second._heard) == 2
    assert ends == []
