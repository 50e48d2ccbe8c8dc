"""Faults injected into a full life of a tiny run: each write, rename, fsync, read and open fails in turn.

    python tests/faults/life.py                     every fault: hours
    python tests/faults/life.py --sample 200        so many, drawn with --seed
    python tests/faults/life.py --journal FILE      every fault in a drawn order, a line of FILE each; stopped
                                                    and started again it leaves out those that were well
    python tests/faults/life.py --flips 200         byte flips and truncations of every artifact instead

The life: tokenise, train, resume, export, evaluate, report. A fault is one call on a file below the run's
folders that fails (shim.c). Afterwards the command has to have ended well, or with one line and status 2;
and the same command, run again, has to end with the same tokens, weights, losses and reports as a life
without faults. A forked process does each command, so that Python and torch are loaded once. Exit status 1
where one did not.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CLASSES = ("write", "rename", "fsync", "read", "open")
PLAIN, HALF, FROM_HERE = 0, 1, 2
KINDS: dict[str, list[tuple[str, int, int]]] = {
    "write": [
        ("ENOSPC", errno.ENOSPC, PLAIN),
        ("EIO", errno.EIO, PLAIN),
        ("EINTR", errno.EINTR, PLAIN),
        ("short", 0, HALF),
        ("full disk", errno.ENOSPC, FROM_HERE),
    ],
    "rename": [("ENOSPC", errno.ENOSPC, PLAIN), ("EIO", errno.EIO, PLAIN), ("EACCES", errno.EACCES, PLAIN)],
    "fsync": [("EIO", errno.EIO, PLAIN), ("ENOSPC", errno.ENOSPC, PLAIN), ("EINTR", errno.EINTR, PLAIN)],
    "read": [("EIO", errno.EIO, PLAIN), ("EINTR", errno.EINTR, PLAIN), ("short", 0, HALF)],
    "open": [("EACCES", errno.EACCES, PLAIN), ("EIO", errno.EIO, PLAIN)],
}
CONFIG = """
name = "run"
output_dir = "{folder}"
[model]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 1
num_attention_heads = 2
ffn_type = "kan_glu"
[tokenizer]
vocab_size = 280
[data]
source = "{folder}/texts.jsonl"
block_size = 16
validation_fraction = 0.2
cache_dir = "{folder}/cache"
[train]
max_tokens = 256
batch_size = 4
learning_rate = 0.01
log_every = 1
save_every = 2
keep_last = 2
kernels = "reference"
num_threads = 1
"""
WELL = ("finished", "told")
WORDS = "the moth of copper and river bright lantern slow".split()


@dataclass(frozen=True)
class Stage:
    """One command of the life, from the state that the ones before it leave."""

    name: str
    command: tuple[str, ...]
    base: Path
    """What the folder holds before it."""


@dataclass(frozen=True)
class Fault:
    stage: Stage
    kind: str
    number: int
    name: str
    error: int
    mode: int

    def __str__(self) -> str:
        return f"{self.stage.name}: {self.name} in {self.kind} number {self.number}"


class Life:
    """The folders of a life; `close` deletes them."""

    def __init__(self, with_report: bool = True):
        self.root = Path(tempfile.mkdtemp(prefix="kanlm-faults-")).resolve()
        self.work = self.root / "work"
        self.log = self.root / "log"
        self.stages: list[Stage] = []
        self.expected: dict[str, dict] = {}
        self.calls: dict[str, list[int]] = {}
        self.work.mkdir()
        rng = random.Random(0)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 20))) + "." for _ in range(120)]
        (self.work / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (self.work / "run.toml").write_text(CONFIG.format(folder=self.work))
        run = str(self.work / "run")
        self._stage("tokenize", "tokenize", f"{self.work}/run.toml")
        self._stage("train", "train", f"{self.work}/run.toml")
        finished = self._kept("finished")
        self._restored(self.stages[-1].base)
        assert self.ran(("train", f"{self.work}/run.toml"), interrupt_at=3)[0] == 0, self.log.read_text()
        self._stage("resume", "train", f"{self.work}/run.toml")
        assert self.expected["resume"] == self.expected["train"]
        self._restored(finished)
        self._stage("export", "export", run)
        self._stage("eval", "eval", f"{run}/hf", "--data", run, "--out", f"{run}/eval/run.json")
        if with_report:
            sys.path.insert(0, str(HERE.parent / "compare"))
            import synthetic

            losses = {("kan", 0): 4.1, ("kan_glu", 0): 3.8, ("swiglu", 0): 3.9}
            synthetic.write(self.work / "study", losses, seeds=[0])
            self._stage("report", "report", f"{self.work}/study")

    def close(self) -> None:
        shutil.rmtree(self.root)

    def _stage(self, name: str, *command: str) -> None:
        self.stages.append(Stage(name, command, self._kept(name)))
        status, told = self.ran(command, count=True)
        assert status == 0, told
        self.calls[name] = json.loads((self.root / "counts").read_text())
        self.expected[name] = self.result(name)

    def _kept(self, name: str) -> Path:
        there = self.root / f"before-{name}"
        shutil.copytree(self.work, there)
        return there

    def _restored(self, base: Path) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(base, self.work)

    def result(self, stage: str) -> dict:
        """What a stage is for, read without kanlm."""
        run = self.work / "run"
        if stage == "tokenize":
            folders = [path for path in (self.work / "cache" / "tokens").iterdir() if path.suffix == ""]
            return {
                path.name: [
                    json.loads((path / "manifest.json").read_text())["sha256"],
                    *(sha256(file) for file in sorted(path.glob("*.bin"))),
                ]
                for path in sorted(folders)
            }
        if stage in ("train", "resume"):
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            record = json.loads((run / "run.json").read_text())
            last = max((run / "checkpoints").glob("step-*"))
            return {
                "state": record["state"],
                "validation": record["final_validation"],
                "losses": [(line.get("step"), line.get("loss")) for line in lines],
                "step": last.name,
                "weights": sha256(last / "model.safetensors"),
                "optimizer": sha256(last / "optimizer.safetensors"),
            }
        if stage == "export":
            return {
                path.name: sha256(path)
                for path in sorted((run / "hf").iterdir())
                if path.is_file() and path.name not in ("README.md",)
            }
        if stage == "eval":
            report = json.loads((run / "eval" / "run.json").read_text())
            return {name: report[name] for name in ("nll_nats", "tokens", "bytes", "words", "data_sha256")}
        return {path.name: sha256(path) for path in (self.work / "study").glob("report.[jm]*")}  # .json, .md

    def ran(
        self, command: tuple[str, ...], fault: Fault | None = None, interrupt_at: int = 0, count: bool = False
    ) -> tuple[int, str]:
        """(exit status, what it said) of one command in a process of its own; 99 = a traceback."""
        child = os.fork()
        if child == 0:
            status = 99
            try:
                out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                sys.argv = ["kanlm", *command]
                if interrupt_at:
                    interrupt(interrupt_at)
                shim = ctypes.CDLL(None)
                if fault is not None or count:
                    where = f"{self.work}/".encode()
                    chosen = (CLASSES.index(fault.kind), fault.number) if fault else (-1, 0)
                    shim.fault_arm(where, *chosen, *((fault.error, fault.mode) if fault else (0, 0)))
                from kanlm.cli import main

                try:
                    main()
                except SystemExit as end:
                    status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
                if count:
                    numbers = [shim.fault_count(number) for number in range(len(CLASSES))]
                    (self.root / "counts").write_text(json.dumps(numbers))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        deadline = time.monotonic() + 500
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace")
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 98, "did not end within 500 seconds"
            time.sleep(0.005)

    def faults(self) -> list[Fault]:
        """Every fault there is, by the calls of a life without one."""
        return [
            Fault(stage, kind, number, *each)
            for stage in self.stages
            for kind, calls in zip(CLASSES, self.calls[stage.name], strict=True)
            for number in range(calls)
            for each in KINDS[kind]
        ]

    def outcome(self, fault: Fault) -> tuple[str, str]:
        """(what became of it, what was said): "finished", "told", or what went wrong."""
        self._restored(fault.stage.base)
        status, told = self.ran(fault.stage.command, fault)
        verdict = "finished" if status == 0 else "told"
        errors = [line for line in told.splitlines() if line.startswith("kanlm: error: ")]
        if status == 0 and self.result(fault.stage.name) != self.expected[fault.stage.name]:
            return "FINISHED WITH ANOTHER RESULT", told
        if status != 0 and (status != 2 or len(errors) != 1 or "Traceback" in told):
            return f"NOT ONE LINE (status {status})", told
        if verdict == "finished":
            return verdict, told
        again, said = self.ran(fault.stage.command)
        if again != 0:
            return "NEXT RUN FAILED", f"{told}\n--- next run:\n{said}"
        if self.result(fault.stage.name) != self.expected[fault.stage.name]:
            return "NEXT RUN HAS ANOTHER RESULT", f"{told}\n--- next run:\n{said}"
        return verdict, told


def interrupt(step: int) -> None:
    """Ask this process to stop while it does a step."""
    from kanlm.train import loop

    real = loop.one_step

    def stopping(session):
        if session.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(session)

    loop.one_step = stopping


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def built_shim(folder: Path) -> Path:
    """shim.c as a library; CalledProcessError or FileNotFoundError where there is no compiler."""
    library = folder / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def loaded() -> None:
    """Import once what the commands need, in the process that they are forked from."""
    import torch

    torch.set_num_threads(1)
    import datasets
    import matplotlib.pyplot

    import kanlm.cli
    import kanlm.compare.report
    import kanlm.data.prepare
    import kanlm.evaluation.perplexity
    import kanlm.export
    import kanlm.train.loop

    assert datasets and matplotlib and kanlm


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="so many faults instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--journal", type=Path, help="file of outcomes, to go on from")
    parser.add_argument("--no-report", action="store_true", help="leave out the last stage, the slowest")
    parser.add_argument("--flips", type=int, help="so many flips and truncations of artifacts instead")
    arguments = parser.parse_args()
    if "fault_arm" not in dir(ctypes.CDLL(None)) and not hasattr(ctypes.CDLL(None), "fault_arm"):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LD_PRELOAD"] = str(built_shim(Path(folder)))
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            return subprocess.run([sys.executable, *sys.argv], check=False).returncode
    loaded()
    life = Life(with_report=not arguments.no_report)
    try:
        if arguments.flips:
            import flips

            return flips.run(life, arguments.flips, arguments.seed)
        faults = [fault for fault in life.faults() if arguments.stage in (None, fault.stage.name)]
        total = collections.Counter(fault.stage.name for fault in faults)
        print(f"{len(faults):,} faults: " + ", ".join(f"{name} {number:,}" for name, number in total.items()))
        if arguments.sample and arguments.sample < len(faults):
            faults = random.Random(arguments.seed).sample(faults, arguments.sample)
        outcomes: collections.Counter[str] = collections.Counter()
        if arguments.journal:
            outcomes, faults = gone_on(arguments.journal, faults, arguments.seed)
        for number, fault in enumerate(faults, 1):
            verdict, told = life.outcome(fault)
            outcomes[verdict] += 1
            if arguments.journal:
                with open(arguments.journal, "a") as file:
                    file.write(f"{verdict}\t{fault}\n")
            if verdict[0].isupper():
                print(f"{verdict}: {fault}\n{told.strip()[-1500:]}\n", flush=True)
            if number % 100 == 0:
                print(f"{number}: {dict(outcomes)}", flush=True)
        print(f"{sum(outcomes.values()):,} faults injected: {dict(outcomes)}")
        return int(any(verdict not in WELL for verdict in outcomes))
    finally:
        life.close()


def gone_on(journal: Path, faults: list[Fault], seed: int) -> tuple[collections.Counter[str], list[Fault]]:
    """What became well by `journal`, counted, and the faults left: those that failed, then a drawn order."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    verdicts = dict(reversed(line.split("\t")) for line in lines)
    well = {fault: verdict for fault, verdict in verdicts.items() if verdict in WELL}
    left = [fault for fault in faults if str(fault) not in well]
    random.Random(seed).shuffle(left)
    left.sort(key=lambda fault: str(fault) not in verdicts)
    return collections.Counter(well.values()), left


if __name__ == "__main__":
    sys.exit(main())
