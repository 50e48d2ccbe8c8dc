"""Two comparisons side by side, from their report.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kanlm.compare.artifacts import CompareDir
from kanlm.config import UserError
from kanlm.runs import changed_keys, read_json


def side_by_side(first: str | Path, second: str | Path) -> str:
    """A Markdown table of all arms of both, then the verdicts, then every setting that differs."""
    reports = [read_report(folder) for folder in (first, second)]
    names = [str(first), str(second)]
    rows = [arm_numbers(report) for report in reports]
    lines = [
        f"| arm | bits per byte, {names[0]} | {names[1]} | difference | parameters, {names[0]} | "
        f"{names[1]} |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for key in dict.fromkeys([*rows[0], *rows[1]]):
        bits = [own.get(key, {}).get("bits_per_byte") for own in rows]
        sizes = [own.get(key, {}).get("non_embedding_parameters") for own in rows]
        known = [value for value in bits if value is not None]
        apart = f"{known[1] - known[0]:+.4f}" if len(known) == 2 else "–"
        cells = [", ".join(key), *(cell_text(value, ".4f") for value in bits), apart]
        lines.append(f"| {' | '.join([*cells, *(cell_text(value, ',') for value in sizes)])} |")
    lines.append("")
    lines += [f"{name}: {report['verdict']['sentence']}" for name, report in zip(names, reports, strict=True)]
    before, after = (settings_of(report) for report in reports)
    differ = changed_keys(before, after)
    lines += [
        "",
        "Settings that differ:" if differ else "No setting differs.",
        *(f"- {one}" for one in differ),
    ]
    texts = [report["data"]["validation"]["sha256"] for report in reports]
    if texts[0] != texts[1]:
        lines.append("- the held-out text: numbers of the two do not compare")
    return "\n".join(lines)


def read_report(folder: str | Path) -> dict[str, Any]:
    path = CompareDir(folder).report_json
    if not path.is_file():
        raise UserError(f"{path}: no such file; `kanlm report {folder}` writes it")
    return read_json(path)


def settings_of(report: dict[str, Any]) -> dict[str, Any]:
    """The comparison's file, arms by name."""
    return {**report["config"], "arms": {arm["name"]: arm for arm in report["config"]["arms"]}}


def arm_numbers(report: dict[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Rows of the tables by (arm, matching, size); the size only where there are several."""
    several = len({table["size"] for table in report["tables"]}) > 1
    return {
        (row["arm"], table["matching"], *([table["size"]] if several else [])): row
        for table in report["tables"]
        for row in table["rows"]
    }


def cell_text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
