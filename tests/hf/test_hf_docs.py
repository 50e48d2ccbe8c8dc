"""The table in docs/hf.md names tests that exist, for each of its 40 items."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "hf.md").read_text(encoding="utf-8")


def test_every_item_has_a_test_that_exists():
    rows = re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", TEXT, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 41))
    for number, cell in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cell)
        assert named or "make test-hf" in cell, f"item {number} names no test"
        for path, name in named:
            functions = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
            assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, (
                f"{path}::{name}"
            )
