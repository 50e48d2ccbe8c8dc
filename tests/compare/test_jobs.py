"""Training processes of a comparison: several at once, stopped together, watched by one line."""

import os
import signal
import sys
import threading
import time

import pytest

from kanlm.compare.jobs import Progress, launch_command, run_all
from kanlm.config import UserError


def test_runs_at_once_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    for jobs, threads in ((1, "6"), (2, "3"), (8, "1")):
        command = launch_command((), "x.json", jobs)
        assert command[command.index("--num_cpu_threads_per_process") + 1] == threads


WAITS = (
    "import signal, time, sys\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
    "print('ready', flush=True)\ntime.sleep(60)"
)


def test_signals_reach_every_training_process_and_no_further_one_starts(tmp_path):
    logs = [tmp_path / f"{number}.log" for number in range(3)]

    def stop_when_ready():
        while not all(log.exists() and "ready" in log.read_text() for log in logs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)

    def work(processes, log):
        processes.run([sys.executable, "-c", WAITS], log)
        processes.raise_if_stopped()

    progress = Progress(lambda: 0.0)
    with pytest.raises(UserError, match="stopped by SIGTERM; run the same command again"):
        run_all(work, logs, 2, progress)
    assert [log.read_text() for log in logs[:2]] == ["ready\nsaved\n"] * 2
    assert not logs[2].exists() or not logs[2].read_text()
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_go_at_once_and_an_error_of_one_stops_the_others(tmp_path):
    ready = [threading.Event(), threading.Event()]

    def together(_processes, number):
        ready[number].set()
        assert ready[1 - number].wait(30), "the other one was not started"

    run_all(together, [0, 1], 2, Progress(lambda: 0.0))

    def work(processes, number):
        if number == 0:
            while not (tmp_path / "1.log").exists() or "ready" not in (tmp_path / "1.log").read_text():
                time.sleep(0.02)
            raise UserError("a mistake")
        processes.run([sys.executable, "-c", WAITS], tmp_path / f"{number}.log")

    with pytest.raises(UserError, match="a mistake"):
        run_all(work, [0, 1, 2], 2, Progress(lambda: 0.0))
    assert (tmp_path / "1.log").read_text() == "ready\nsaved\n"


def test_progress_is_a_line_at_each_tenth_where_there_is_no_terminal(capsys, monkeypatch):
    now, clock = [0.25], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(lambda: now[0])
    for now[0], clock[0] in ((0.25, 5.0), (0.29, 8.0), (0.35, 10.0), (0.36, 11.0), (0.75, 50.0)):
        progress.show()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all runs")]
    assert lines == ["all runs: 35%, 0:01:05 left", "all runs: 75%, 0:00:25 left"]
