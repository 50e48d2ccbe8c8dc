"""report.json and pictures as the text of report.md and report.html."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from kanlm.compare import plots
from kanlm.compare.artifacts import Artifacts
from kanlm.compare.judgement import MATCHED

TITLES = {
    "parameters": "Equal parameters",
    "flops": "Equal computation per token",
    "wallclock": "Equal training time",
}


def page_texts(
    artifacts: Artifacts, content: dict[str, Any], pictures: dict[str, dict[str, str]]
) -> tuple[str, str]:
    """report.md and report.html."""
    prompts: dict[str, list[dict[str, str]]] = {}
    for arm, runs in artifacts.shown.arms.items():
        for sample in next((result.samples for result in runs.results if result.samples), []):
            prompts.setdefault(sample["prompt"], []).append({"arm": arm, "text": sample["text"]})
    held_out = next((result.eval for result in artifacts.results if result.eval), None)
    values = {
        **content,
        "titles": TITLES,
        "matched": MATCHED,
        "pictures": pictures,
        "prompts": prompts,
        "colour": artifacts.colours,
        "held_out": held_out,
        "block_size": artifacts.data.get("block_size"),
        "importance": importance_rows(artifacts),
        "config_text": json.dumps(content["config"], indent=1, ensure_ascii=False),
        "day": datetime.fromisoformat(artifacts.provenance["date"]).strftime("%d %B %Y, %H:%M UTC"),
    }
    return render("report.md.j2", values), render("report.html.j2", values)


def importance_rows(artifacts: Artifacts) -> list[dict[str, Any]]:
    """One line for each layer of learned functions of each arm's first seed."""
    rows = []
    for arm, runs in artifacts.shown.arms.items():
        found = next((result.functions for result in runs.results if result.functions), None)
        rows += [{"arm": arm, **row} for row in (found["layers"] if found else [])]
    return rows


def render(template: str, values: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("kanlm.compare"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    return environment.get_template(template).render(values)


def fence(text: str) -> str:
    """A Markdown code block that no text can end early."""
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}\n{text}\n{ticks}"


FILTERS: dict[str, Callable[..., Any]] = {
    "short": plots.short,
    "nats": lambda value: "–" if value is None else f"{value:+.4f}",
    "interval": lambda pair: "–" if pair is None else f"{pair[0]:+.4f} to {pair[1]:+.4f}",
    "number": lambda value: "–" if value is None else f"{value:,.0f}",
    "fixed": lambda value, digits=3: "–" if value is None else f"{value:.{digits}f}",
    "percent": lambda value, digits=2: f"{100 * value:+.{digits}f}%",
    "mebibytes": lambda value: "–" if value is None else f"{value / 2**20:,.0f} MiB",
    "inline": Markup,
    "code": lambda text: Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))),
    "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    "fence": fence,
}
