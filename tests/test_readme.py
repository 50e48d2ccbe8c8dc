"""The README's commands: every one names what exists, and the ones for one's own text run as they stand."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

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
    layers, load = blocks("python")
    for words in [*commands, [sys.executable, "-c", f"{layers}\n{load}\nprint(model.num_parameters())"]]:
        if "train" in words:
            words = [*words, *small]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    card = (tmp_path / "runs/mine/hf/README.md").read_text(encoding="utf-8")
    assert "perplexity" in card.lower()
    assert (tmp_path / "runs/mine/functions/inspect.html").is_file()


NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?![\w.]*\w)")
FACTORS = (1, 100, Decimal("1e-6"), Decimal(1) / 2**20, 1000)
"""A table may show a JSON's value as it is, in percent, in millions, in MiB, in thousandths."""


def table_numbers(markdown: str) -> list[str]:
    """The numbers in the cells of Markdown tables, as they stand there, without those inside `code`."""
    rows = [line for line in markdown.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    cells = [
        re.sub(r"`[^`]*`|\([^)]*\.(?:md|json|html)\)", " ", cell) for row in rows for cell in row.split("|")
    ]
    return [found for cell in cells for found in NUMBER.findall(cell.replace("−", "-"))]


def json_numbers(value: Any) -> Iterator[float]:
    """Every number in a parsed JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from json_numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def committed_numbers(
    folders: Iterable[Path] = (ROOT / "docs/results", ROOT / "docs/benchmarks"),
) -> set[float]:
    """Every number in the committed JSON of results and benchmarks."""
    found: set[float] = set()
    for folder in folders:
        for path in folder.rglob("*.json"):
            found.update(json_numbers(json.loads(path.read_text(encoding="utf-8"))))
        for path in folder.rglob("*.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines()
            found.update(number for line in lines if line for number in json_numbers(json.loads(line)))
    return found


def unbacked(markdown: str, numbers: Iterable[float]) -> list[str]:
    """The numbers of the tables that no JSON number gives when it is rounded to the digits that are shown.

    Whole numbers up to 20 are counts of seeds and the like, and need no JSON.
    """
    values = [Decimal(repr(number)) for number in numbers if abs(number) < 1e18]
    by_digits: dict[int, set[Decimal]] = {}
    missing = []
    for shown in table_numbers(markdown):
        number = Decimal(shown.replace(",", ""))
        digits = -int(number.as_tuple().exponent)
        if digits == 0 and abs(number) <= 20:
            continue
        if digits not in by_digits:
            step = Decimal(1).scaleb(-digits)
            scaled = {
                value * factor for value in values for factor in FACTORS if abs(value * factor) < 10**15
            }
            by_digits[digits] = {abs(value).quantize(step, ROUND_HALF_EVEN) for value in scaled}
        if abs(number) not in by_digits[digits]:
            missing.append(shown)
    return missing


def test_a_number_of_a_table_that_no_json_has_is_found():
    table = "| arm 1 | bits 7.5 |\n|---|--:|\n| `kan8` | 1.6787 (98.3%) | 318,624 | 647 MiB | +0.29% | 3 |\n"
    assert table_numbers(table) == ["1", "7.5", "1.6787", "98.3", "318,624", "647", "+0.29", "3"]
    backed = list(json_numbers({"a": [1.67871, {"b": 0.983}], "c": 318624, "d": 647 * 2**20, "e": 0.00288}))
    assert unbacked(table, [*backed, 7.5]) == []
    assert unbacked(table, backed) == ["7.5"]
    assert unbacked("| x | 1.6788 |", backed) == ["1.6788"]


def test_every_number_of_readmes_tables_is_in_committed_json():
    assert not unbacked(README, committed_numbers())
