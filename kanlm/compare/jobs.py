"""Training a comparison's trials: processes that are launched, stopped together, and watched by one line."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from kanlm.compare.artifacts import state_of
from kanlm.compare.plan import Study
from kanlm.compare.schema import Trial
from kanlm.config import UserError
from kanlm.runs import write_json
from kanlm.train.lock import is_locked, wait_until_unlocked
from kanlm.train.status import fraction_done

FAILURE_LINES = 40
"""Last lines of a dead training process that are kept; the launcher adds a traceback of its own to them."""
POLL_SECONDS = 1.0
T = TypeVar("T")


def run_trials(
    study: Study,
    trials: Sequence[Trial],
    finished: Callable[[Trial, Callable[[str], None]], None] | None = None,
) -> None:
    """Train what is not finished, `jobs` at once; `finished` gets each finished run, one at a time."""
    work = {trial.name: trial for trial in trials}  # trials that train the same have one run
    flops = {arm.key: arm.flops_per_token for arm in study.arms}
    cost = {name: trial.max_tokens * flops[trial.key] for name, trial in work.items()}

    one_at_a_time = threading.Lock()  # loading a model changes what all threads share

    def fraction() -> float:
        done = [cost[name] * fraction_done(study.directory.run(name)) for name in work]
        return math.fsum(done) / math.fsum(cost.values())

    def train_one(processes: Processes, numbered: tuple[int, Trial]) -> None:
        number, trial = numbered
        if train_trial(study, processes, trial, f"{trial.kind} {number}/{len(work)}") and finished:
            with one_at_a_time:
                finished(trial, say)

    progress = Progress(fraction)
    try:
        run_all(train_one, list(enumerate(work.values(), 1)), study.config.jobs, progress)
    finally:
        progress.close()


def train_trial(study: Study, processes: Processes, trial: Trial, place: str) -> bool:
    """Train `trial` unless it is finished; whether there is a finished run afterwards.

    UserError for a mistake that the run's record tells, where no record was begun, and after a signal.
    """
    run, path = study.directory.run(trial.name), study.directory.config(trial.name)
    if is_locked(run):  # of a comparison that was killed, a training process can be left
        say(f"{place}: {trial.name} is being trained by another process; waiting for it")
        wait_until_unlocked(run)
    state, reason = state_of(run)
    if state == "diverged":
        say(f"{place}: {trial.name} diverged before: {reason}")
    if state in ("finished", "diverged"):
        return state == "finished"
    run.failure.unlink(missing_ok=True)
    say(f"{place}: {trial.name}, learning rate {trial.learning_rate:g}, {trial.max_tokens:,} tokens")
    command = launch_command(study.config.launch, path, study.config.jobs)
    returncode, tail = processes.run(command, run.log)
    state, reason = state_of(run)
    if state == "finished":
        return True
    processes.raise_if_stopped()
    if state == "mistaken":
        raise UserError(f"{trial.name}: {reason}")
    if state == "interrupted" and returncode == 0:
        raise UserError(f"{trial.name}: interrupted; run the same command again to go on")
    if state != "diverged":
        message = said_last(tail)
        write_json(run.failure, {"returncode": returncode, "message": message, "lines": tail})
        if returncode > 0 and not run.record.is_file():
            raise UserError(f"{trial.name}: training did not begin: {message} (see {run.log})")
        reason = f"exit status {returncode}: {message}"
    say(f"{place}: {trial.name} FAILED: {reason} (see {run.log})")
    return False


def say(line: str) -> None:
    """A line above the progress bar, if there is one."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(line, flush=True)


def threads_each(jobs: int) -> int:
    """Threads of one of `jobs` processes: OMP_NUM_THREADS, else its share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS")
    return int(given) if given and given.isdigit() else max(1, len(os.sched_getaffinity(0)) // jobs)


def launch_command(launch: Sequence[str], path: Path, jobs: int = 1) -> list[str]:
    """`accelerate launch` of a training process; without the user's arguments, one process on one device."""
    if not launch:
        launch = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
        launch = (*launch, "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(threads_each(jobs)))
        if not torch.cuda.is_available():
            launch = ("--cpu", *launch)
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "kanlm", "train", str(path)]


class Processes:
    """The training processes of one `with` block; SIGINT and SIGTERM are passed on to each of them.

    They then finish their step and write a checkpoint. The launcher dies of the signal, so its status says
    nothing, and what it prints from then on goes to the log alone.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Processes:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, lambda received, _frame: self.stop(received))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self, number: int) -> None:
        """Let no further process start, and pass the signal to those that run."""
        self.received = self.received or signal.Signals(number)
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, number)

    def run(self, command: list[str], log: Path) -> tuple[int, list[str]]:
        """Run `command` to its end, its output into `log`; (exit status, last lines)."""
        log.parent.mkdir(parents=True, exist_ok=True)
        tail: list[str] = []
        with open(log, "a", encoding="utf-8") as file:
            with self._lock:
                self.raise_if_stopped()
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
                self._running.add(process)
            if self.received is not None:  # a signal that came while it started
                self.stop(self.received)
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                if line.strip():
                    tail = [*tail, line.rstrip()][-FAILURE_LINES:]
            returncode = process.wait()
            self._running.discard(process)
        return returncode, tail

    def raise_if_stopped(self) -> None:
        """UserError after a signal."""
        if self.received is not None:
            raise UserError(f"stopped by {self.received.name}; run the same command again to go on")


def said_last(tail: Sequence[str]) -> str:
    """The training process' own last line; the launcher puts a traceback below it."""
    own = itertools.takewhile(lambda line: not line.startswith("Traceback (most recent call last)"), tail)
    return next(iter(reversed(list(own))), tail[-1] if tail else "no output")


def run_all(
    work: Callable[[Processes, T], None],
    items: Sequence[T],
    jobs: int,
    progress: Progress,
) -> None:
    """`work` on every item, `jobs` at once, in their order; the first error stops the rest and is raised."""
    errors: list[BaseException] = []

    with Processes() as processes, ThreadPoolExecutor(jobs) as pool:

        def guarded(item: T) -> None:
            if processes.received is None:
                try:
                    work(processes, item)
                except BaseException as error:  # of every kind: it is raised below, in the main thread
                    errors.append(error)
                    processes.stop(signal.SIGTERM)

        waiting: set[Future[None]] = {pool.submit(guarded, item) for item in items}
        while waiting:
            _, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            progress.show()
    if errors:
        raise errors[0]
    processes.raise_if_stopped()


class Progress:
    """One line over all runs, with the time left: a bar on a terminal, a line at each tenth elsewhere.

    `fraction` gives the part of all work that is done; the time left is by what this call has done itself.
    """

    def __init__(self, fraction: Callable[[], float]):
        self._fraction = fraction
        self._start, self._at_start = time.monotonic(), fraction()
        self._shown = int(10 * self._at_start)
        self._bar = tqdm(
            total=1.0, initial=self._at_start, file=sys.stdout, disable=None, desc="all runs", leave=False
        )
        self._bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {postfix}"

    def show(self) -> None:
        """Read how far the runs are and say so."""
        now = self._fraction()
        left = self._left(now)
        if not self._bar.disable:
            self._bar.n = now
            self._bar.set_postfix_str(left)
        elif int(10 * now) > self._shown and now < 1:
            self._shown = int(10 * now)
            say(f"all runs: {now:.0%}, {left}")

    def _left(self, now: float) -> str:
        done, seconds = now - self._at_start, time.monotonic() - self._start
        if done <= 0:
            return "time left not known yet"
        return f"{timedelta(seconds=round(seconds / done * (1 - now)))} left"

    def close(self) -> None:
        self._bar.close()
