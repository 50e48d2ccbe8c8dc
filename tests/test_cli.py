"""The command line: help with an example, exit status 2 and one line for a user's mistake, no traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kanlm.cli import cli, complaint
from kanlm.config import UserError


def kanlm(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kanlm", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def commands(group: click.Group, prefix: str = "") -> list[tuple[str, click.Command]]:
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, f"{prefix}{name} ")
        else:
            found.append((prefix + name, command))
    return found


@pytest.mark.parametrize(("name", "command"), commands(cli), ids=[name for name, _ in commands(cli)])
def test_every_verb_has_help_with_an_example(name, command):
    text = command.get_help(click.Context(command, info_name=name))
    assert "Example:" in text and f"kanlm {name}" in text.replace("\n", " ")


def test_the_list_of_verbs_is_whole_on_a_small_terminal():
    """A sentence that is too long is cut by click."""
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
    verbs = shown.partition("Commands:")[2]
    assert len(verbs.splitlines()) > len(cli.commands) and "..." not in verbs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "nowhere.toml"], ["nowhere.toml", "no such config file"]),
        (["train", "configs/tiny-kan.toml", "train.max_tokens=1.5"], ["train.max_tokens", "1.5"]),
        (["report", "nowhere"], ["nowhere"]),
        (["export", "nowhere"], ["nowhere"]),
        (["status", "nowhere"], ["nowhere"]),
        (["eval", "nowhere", "--data", "stories"], ["nowhere"]),
        (["bench", "train", "--size", "3m"], ["--size", "'3m'", "1m"]),
        (["eval", "x", "--data", "y", "--stride", "0"], ["--stride"]),
        (["export", "x", "--dry-run"], ["--dry-run belongs to --push-to-hub"]),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_is_named_with_status_2_and_no_traceback(arguments, words):
    done = kanlm(*arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_debugging_shows_the_traceback():
    done = kanlm("plan", "nowhere.toml", KANLM_DEBUG="1")
    assert done.returncode != 0 and "Traceback" in done.stderr


FAILS_IN = """
import os, sys
from kanlm.cli import main
if os.environ["RANK"] in sys.argv.pop(1):
    main()
import time
time.sleep(100)
"""


@pytest.mark.parametrize(
    "ranks",
    ["012", "12", "2"],
)
def test_one_process_speaks_whichever_fail(ranks, tmp_path):
    """Three processes under torchrun fail alike, or some of them while the others are busy."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS_IN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*torchrun, str(script), ranks, "plan", "nowhere.toml"]
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | path)
    said = [text for text in done.stderr.splitlines() if text.startswith("kanlm: error: ")]
    assert done.returncode != 0 and len(said) == 1, done.stderr
    signed = {f"process {rank}: " if rank != "0" else "" for rank in ranks}
    assert said[0].removeprefix("kanlm: error: ").partition("nowhere.toml")[0] in signed


def test_what_is_our_own_fault_is_not_blamed_on_the_user():
    assert complaint(OSError(errno.ENOSPC, "No space left on device", "x")).endswith("choose another folder")
    assert complaint(UserError("a\n b")) == "a b"
    assert complaint(BrokenPipeError(errno.EPIPE, "pipe")) is None
    assert complaint(KeyError("x")) is None
