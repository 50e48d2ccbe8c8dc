"""The command line: help with an example, exit status 2 and one line for a user's mistake, no traceback."""

import errno
import subprocess
import sys
import time

import click
import pytest

from kanlm.cli import SECONDS_FOR_RANK_0, cli, complaint
from kanlm.config import UserError


def kanlm(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    import os

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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "nowhere.toml"], ["nowhere.toml", "no such config file"]),
        (["train", "configs/tiny-kan.toml", "train.max_tokens=2e8"], ["train.max_tokens", "200000000.0"]),
        (["report", "nowhere"], ["nowhere"]),
        (["export", "nowhere"], ["nowhere"]),
        (["status", "nowhere"], ["nowhere"]),
        (["eval", "nowhere", "--data", "stories"], ["nowhere"]),
        (["bench", "train", "--size", "3m"], ["--size", "'3m'", "1m"]),
        (["eval", "x", "--data", "y", "--stride", "0"], ["--stride"]),
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


def test_of_several_processes_the_first_speaks_and_another_only_where_it_alone_fails():
    """The launcher ends the others soon after the first; one that it leaves alive failed on its own."""
    started = time.monotonic()
    alone = kanlm("plan", "nowhere.toml", RANK="1")
    assert time.monotonic() - started > SECONDS_FOR_RANK_0
    assert alone.returncode == 2 and alone.stderr.startswith("kanlm: error: process 1: nowhere.toml")


def test_what_is_our_own_fault_is_not_blamed_on_the_user():
    assert complaint(OSError(errno.ENOSPC, "No space left on device", "x")).endswith("choose another folder")
    assert complaint(UserError("a\n b")) == "a b"
    assert complaint(BrokenPipeError(errno.EPIPE, "pipe")) is None
    assert complaint(KeyError("x")) is None
