"""Run directories: paths, artifact schemas, atomic writes and provenance.

runs/NAME/
  config.json             the resolved RunConfig
  working_directory       where it was trained, which relative paths start from
  run.json                RunRecord: state, tokens, provenance, final metrics
  metrics.jsonl           one JSON object a log line
  tokenizer/              the tokenizer that the run was trained with
  checkpoints/step-00001000/   manifest.json, model.safetensors, ...
  hf/                     the exported model
  eval/DATASET.json       EvalReport
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from kanlm import __version__

_STEP = re.compile(r"step-(\d{8,})")


class RunDir:
    """The paths of one run; creates nothing."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.json"
        self.record = self.root / "run.json"
        self.metrics = self.root / "metrics.jsonl"
        self.tokenizer = self.root / "tokenizer"
        self.checkpoints = self.root / "checkpoints"
        self.hf = self.root / "hf"
        self.eval = self.root / "eval"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_folders(self) -> list[Path]:
        """All complete-looking checkpoint folders, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(
            path for path in self.checkpoints.iterdir() if path.is_dir() and _STEP.fullmatch(path.name)
        )


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


class EvalReport(BaseModel):
    """The perplexity report of one model on one held-out text. Sums are stored; ratios are derived from them.

    nll_nats is the sum over `tokens` scored tokens; loss = nll_nats / tokens (nats/token);
    perplexity = exp(loss); word_perplexity = exp(nll_nats / words); bits_per_byte = nll_nats / ln 2 / bytes.
    Bytes and words are those of the original text.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str
    dataset: str
    split: str
    tokens: int
    bytes: int
    words: int
    lines: int = 0
    documents: int
    nll_nats: float
    loss: float
    perplexity: float
    word_perplexity: float
    bits_per_byte: float
    context_length: int
    stride: int
    parameters: int
    non_embedding_parameters: int
    seconds: float
    tokens_per_second: float
    data_sha256: str
    dtype: str
    device: str
    kanlm_version: str
    versions: dict[str, str]
    parts: list[tuple[int, float]] = []
    """(tokens, nll_nats) of up to 100 consecutive parts of the text, for its sampling error."""


FailureKind = Literal["diverged", "user_error", "crashed"]


class RunRecord(BaseModel):
    """run.json: where a run stands and how it came about."""

    model_config = ConfigDict(extra="allow")

    state: str
    """`running`, `interrupted`, `finished` or `failed`."""
    step: int
    total_steps: int
    tokens: int
    seconds: float
    """Training time in all, over all resumptions, without evaluation and checkpoints."""
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    final_validation: dict[str, float] | None = None
    parameters: int
    non_embedding_parameters: int
    process_id: int | None = None
    """Of the main process, while it runs."""
    skipped_steps: int = 0
    """Steps left out because of a NaN or Inf."""
    failure: str | None = None
    failure_kind: FailureKind | None = None
    """Of a `failed` run: its numbers were no longer finite, its user can mend it, or anything else."""
    provenance: dict[str, Any]


@contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Give the name of `path` to the error of a call that knows only a descriptor: a write, read or fsync."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with named_errors(path), os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_one(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON; a pydantic model is dumped first."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True) + "\n")


def read_json(path: str | Path) -> Any:
    """The JSON in a file; ValueError names the file where it is damaged."""
    with named_errors(path):
        text = Path(path).read_bytes()
    try:
        return json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from None


def metrics_rows(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """Those of a metrics.jsonl; one that is being written, torn or damaged is left out."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def last_metrics(run: RunDir) -> dict[str, float]:
    """The newest value of every metric of a run."""
    values: dict[str, float] = {}
    if run.metrics.exists():
        for row in metrics_rows(run.metrics.read_bytes().split(b"\n")):
            values |= row
    return values


@contextmanager
def system_errors(path: str | Path) -> Iterator[None]:
    """OSError where tokenizers or safetensors tell the system's error only by its number in a text.

    Its file is the one that the text names, else `path`.
    """
    try:
        yield
    except Exception as error:
        known = re.search(r"\(os error (\d+)\)|unable to open file <(.+)> .*\((\d+)\)", str(error))
        if type(error) not in (Exception, RuntimeError) or not known:
            raise
        number = int(known[1] or known[3])
        raise OSError(number, os.strerror(number), known[2] or str(path)) from None


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """`tokenizer.save_pretrained(folder)` that raises OSError where the disk gives an error."""
    with system_errors(folder / "tokenizer.json"):
        tokenizer.save_pretrained(folder)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any, sort_keys: bool = False) -> str:
    """sha256 of `value` as JSON: the identity of data, of a tokenizer, of a recipe."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys).encode("utf-8")).hexdigest()


def leaves(table: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; a list is one value."""
    if not isinstance(table, Mapping):
        return {prefix: table}
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= leaves(value, f"{prefix}.{key}" if prefix else key)
    return flat


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`section.key: old, now new` of every value that differs between two runs' dumps."""
    old, new = leaves(before), leaves(after)
    differing = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)}, now {new.get(key)}" for key in differing]


def fsync_one(path: Path) -> None:
    """fsync one file, or the list of names of a folder, which a rename changes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """fsync every file below `folder`, then the folders themselves; nobody else may write in it."""
    for path in [*folder.rglob("*"), folder]:
        fsync_one(path)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` in one rename if the block ends well, else vanishes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        fsync_folder(temporary)
        os.rename(temporary, path)
        made = path  # an error from here on must not leave what the same command would find there
        fsync_one(path.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def remove_leftovers(*paths: Path) -> None:
    """Delete what a killed `write_text` or `new_folder` of these paths left beside them.

    The caller holds the lock that keeps others from writing them.
    """
    for path in paths:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def versions() -> dict[str, str]:
    """Python's and the main libraries' versions."""
    names = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy", "triton")
    found = {"python": platform.python_version(), "kanlm": __version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """Commit and dirtiness of the checkout that holds kanlm; both None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (subprocess.CalledProcessError, FileNotFoundError, subprocess.TimeoutExpired):
        return {"commit": None, "dirty": None}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerators of this machine."""
    import psutil
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "platform": platform.platform(terse=True),
    }


def provenance(**more: Any) -> dict[str, Any]:
    """Date (UTC), versions, git state and hardware, with `more` added."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware(),
        **more,
    }
