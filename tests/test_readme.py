"""The README's commands: every one names what exists, and the ones for one's own text run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from kanlm.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def shell_commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def own_text_block() -> list[list[str]]:
    (block,) = (block for block in blocks("bash") if "data.source=my.txt" in block)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def kanlm_arguments(words: list[str]) -> list[str] | None:
    if words[0] == "kanlm":
        return words[1:]
    return words[words.index("kanlm") + 1 :] if "-m" in words and "kanlm" in words else None


@pytest.mark.parametrize("words", shell_commands(), ids=" ".join)
def test_a_command_names_what_exists(words):
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        assert set(words[1:]) <= set(targets)
        return
    for word in words:
        if re.match(r"(configs|scripts)/", word):
            assert (ROOT / word).is_file(), word
    arguments = kanlm_arguments(words)
    if arguments is not None:
        command: click.Command = cli
        while isinstance(command, click.Group):
            name, *arguments = arguments
            assert name in command.commands
            command = command.commands[name]
        command.make_context(name, arguments)  # parses, runs nothing


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name
)
def test_a_page_names_files_that_exist(page):
    named = set(
        re.findall(r"\b(?:configs|scripts|docs|tests)/[\w./-]+\.[a-z]+\b", page.read_text(encoding="utf-8"))
    )
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.slow
def test_the_commands_for_own_text_run_in_their_order(tmp_path):
    """As written; only the training is made small by further overrides, as a reader may."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "docs/architecture.md").read_text(
        encoding="utf-8"
    )
    (tmp_path / "my.txt").write_text(text * 3, encoding="utf-8")
    small = (
        "model.hidden_size=32 model.num_hidden_layers=1 model.num_attention_heads=2 "
        "model.intermediate_size=64 tokenizer.vocab_size=300 data.block_size=128 train.max_tokens=4096 "
        "train.batch_size=4 train.eval_every=0"
    ).split()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    activate, *commands = own_text_block()
    assert activate == [".", ".venv/bin/activate"]  # done by PATH here
    (load,) = blocks("python")
    for words in [*commands, [sys.executable, "-c", load + "\nprint(model.num_parameters())"]]:
        if "train" in words:
            words = [*words, *small]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    card = (tmp_path / "runs/mine/hf/README.md").read_text(encoding="utf-8")
    assert "perplexity" in card.lower()
    assert list((tmp_path / "runs/mine/functions").glob("*.svg"))
