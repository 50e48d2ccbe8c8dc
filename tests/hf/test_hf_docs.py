"""The table in docs/hf.md names tests that exist, for each of its 40 items."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "hf.md").read_text(encoding="utf-8")


def functions(path: str) -> set[str]:
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_item_names_a_test():
    rows = re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", TEXT, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 41))
    for number, cell in rows:
        assert "::test_" in cell or "make test-hf" in cell, f"item {number} names no test"


def test_the_named_tests_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) == TEXT.count("::test_") > 60
    for path, name in named:
        assert name in functions(path), f"{path}::{name}"
