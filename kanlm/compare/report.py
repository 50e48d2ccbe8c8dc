"""The report of a comparison: HTML, Markdown and JSON from the artifacts alone; no model is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from kanlm.compare import plots
from kanlm.compare.artifacts import Artifacts, Result, load
from kanlm.compare.claims import claims, size_points
from kanlm.compare.judgement import MATCHED, Judgement, mean, sentence
from kanlm.compare.schema import MATCHINGS, PlannedArm
from kanlm.compare.verdict import judgements, learned_nothing, mean_bits
from kanlm.interpret.pictures import learned_functions_svg, spread, standalone_svg
from kanlm.runs import EvalReport, write_json, write_text
from kanlm.stats import standard_error

SCHEMA = 1
DRAWN_FUNCTIONS = 12
"""Panels of learned functions for each arm."""
TITLES = {
    "parameters": "Equal parameters",
    "flops": "Equal computation per token",
    "wallclock": "Equal training time",
}


def report(directory: str | Path) -> Path:
    """Write report.json, report.md, report.html and plots/*.svg into `directory`; returns the HTML's path."""
    artifacts = load(directory)
    content = report_content(artifacts)
    pictures = report_pictures(artifacts)
    paths = artifacts.directory
    for name, picture in pictures.items():
        write_text(paths.plots / f"{name}.svg", standalone_svg(picture["svg"]))
    write_json(paths.report_json, content)
    values = template_values(artifacts, content, pictures)
    write_text(paths.report_md, render("report.md.j2", values))
    write_text(paths.report_html, render("report.html.j2", values))
    return paths.report_html


def report_content(artifacts: Artifacts) -> dict[str, Any]:
    """report.json: verdict, tables, every run's EvalReport and RunRecord, claims, baselines, provenance."""
    config = artifacts.config
    margin = config.evaluation.equivalence_margin_nats
    tables: list[dict[str, Any]] = []
    judged: list[Judgement] = []
    for matching in config.matching:
        for size in config.sizes:
            here = judgements(artifacts, matching, size.name)
            judged += here
            tables.append(
                {
                    "matching": matching,
                    "size": size.name,
                    "tolerance": MATCHINGS[matching].tolerance,
                    "rows": [
                        arm_row(artifacts, artifacts.planned(matching, size.name, arm.name))
                        for arm in config.arms
                    ],
                    "sentences": [
                        sentence(judgement, margin) + counting_beats_both(artifacts, judgement)
                        for judgement in here
                    ],
                }
            )
    headline = next(
        (
            table["sentences"][0]
            for table in tables
            if table["size"] == config.sizes[-1].name and table["sentences"]
        ),
        "No verdict: there is no KAN arm among the arms.",
    )
    return {
        "schema": SCHEMA,
        "name": config.name,
        "date": artifacts.provenance["date"],
        "verdict": {"sentence": headline, "judgements": [judgement.as_dict() for judgement in judged]},
        "tables": tables,
        "runs": [run_entry(result) for result in artifacts.results],
        "baselines": artifacts.baselines,
        "claims": claims(artifacts, judged),
        "sweep": artifacts.sweep,
        "speed": artifacts.speed,
        "notes": notes(artifacts) + text_notes(judged),
        "data": artifacts.data,
        "provenance": artifacts.provenance,
        "config": config.model_dump(mode="json"),
    }


def counting_beats_both(artifacts: Artifacts, judgement: Judgement) -> str:
    """What the verdict has to add where a model that only counts or compresses predicts better than both."""
    bits = [judgement.arm_bits_per_byte, judgement.baseline_bits_per_byte]
    known = [value for value in bits if value is not None]
    rows = [row for row in artifacts.baselines if known and row["bits_per_byte"] <= min(known)]
    if not rows or judgement.outcome in ("no result", "learned nothing"):
        return ""
    listed = " and ".join(f"{row['name']} ({row['bits_per_byte']:.4f})" for row in rows)
    verb = "predict" if len(rows) > 1 else "predicts"
    return f" Without any neural network {listed} {verb} this text better than both."


def run_entry(result: Result) -> dict[str, Any]:
    trial = result.trial
    return {
        **{key: getattr(trial, key) for key in ("name", "kind", "matching", "size", "arm", "seed")},
        "learning_rate": trial.learning_rate,
        "kan_learning_rate": trial.run.train.kan_learning_rate,
        "max_tokens": trial.max_tokens,
        "state": result.state,
        "reason": result.reason,
        "eval": result.eval.model_dump(mode="json") if result.eval else None,
        "record": result.record.model_dump(mode="json") if result.record else None,
        "samples": result.samples,
    }


def arm_row(artifacts: Artifacts, planned: PlannedArm) -> dict[str, Any]:
    """One line of a table of arms: what was planned and what all seeds gave."""
    results = artifacts.at(planned.matching, planned.size, planned.arm)
    evaluated = [result.eval for result in results if result.eval]
    records = [result.record for result in results if result.record]
    speeds = speed_row(artifacts, planned)
    bits = mean_bits(results)
    loss = mean([report.loss for report in evaluated]) if evaluated else None
    recorded = [record.tokens_per_second for record in records if record.tokens_per_second]
    return {
        "arm": planned.arm,
        "family": planned.family,
        "ffn_type": planned.ffn_type,
        "intermediate_size": planned.intermediate_size,
        "parameters": planned.parameters,
        "non_embedding_parameters": planned.non_embedding_parameters,
        "ffn_parameters": planned.ffn_parameters,
        "mismatch": planned.mismatch,
        "flops_per_token": planned.flops_per_token,
        "learning_rate": results[0].trial.learning_rate if results else None,
        "training_tokens": results[0].trial.max_tokens if results else None,
        "bits_per_byte": bits,
        "loss": loss,
        "perplexity": math.exp(loss) if loss is not None else None,
        "word_perplexity": geometric_mean([report.word_perplexity for report in evaluated]),
        "text_error_nats": text_error_of(evaluated),
        "learned_nothing": bits is not None and learned_nothing(bits, artifacts.baselines),
        "seeds": [seed_entry(result) for result in results],
        "tokens_per_second": speeds["tokens_per_second"]
        if speeds
        else (mean(recorded) if recorded else None),
        "speed_source": "step times measured in turns" if speeds else "the runs' own clocks",
        "training_seconds": mean([record.seconds for record in records]) if records else None,
        "peak_memory_bytes": max((record.peak_memory_bytes or 0 for record in records), default=0) or None,
    }


def seed_entry(result: Result) -> dict[str, Any]:
    report = result.eval
    return {
        "seed": result.trial.seed,
        "state": result.state,
        "reason": result.reason,
        "bits_per_byte": report.bits_per_byte if report else None,
        "loss": report.loss if report else None,
        "perplexity": report.perplexity if report else None,
        "tokens_per_second": result.record.tokens_per_second if result.record else None,
    }


def text_error_of(reports: Sequence[EvalReport]) -> float | None:
    """Sampling error of one arm's loss that is due to the held-out text, mean over seeds."""
    errors = [
        standard_error([nll for _, nll in report.parts], [tokens for tokens, _ in report.parts])
        for report in reports
        if len(report.parts) > 1
    ]
    return mean(errors) if errors else None


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(mean([math.log(value) for value in values])) if values else None


def speed_row(artifacts: Artifacts, planned: PlannedArm) -> dict[str, Any] | None:
    """The arm's entry in speed.json, of the same rule of widths."""
    rule = MATCHINGS[planned.matching]
    for row in artifacts.speed["arms"] if artifacts.speed else []:
        same_width = MATCHINGS[row["matching"]].width == rule.width
        if same_width and (row["size"], row["arm"]) == (planned.size, planned.arm):
            return row
    return None


def notes(artifacts: Artifacts) -> list[str]:
    """What a sceptic should know before believing the tables."""
    config = artifacts.config
    found = []
    if len(config.seeds) < 3:
        found.append(
            f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''} only: intervals are wide or "
            "absent; add seeds for a verdict that holds."
        )
    if config.evaluation.source is None:
        tuned = " on which learning rates were chosen" if artifacts.sweep_ran else ""
        found.append(
            f"Reported on the held-out part of the training source{tuned} and by which the best MLP was "
            "chosen, not on a separate test text."
        )
    if not artifacts.sweep_ran:
        found.append("Learning rates are as configured; none was tuned in this comparison.")
    for row in artifacts.sweep:
        for axis in row["on_edge"]:
            found.append(
                f"{row['arm']}: the best {axis.replace('_', ' ')}, {row[axis]:g}, lies on the edge of those "
                "tried; a better one may lie outside."
            )
    mlps = sorted(arm.name for arm in config.arms if artifacts.family(arm.name) == "mlp")
    if len(mlps) == 1:
        found.append(f"The only MLP arm is {mlps[0]}; another MLP might have done better.")
    for result in artifacts.results:
        if result.state != "finished":
            detail = f": {result.reason}" if result.reason else ""
            found.append(f"{result.trial.name}: {result.state}{detail}.")
    idle = [
        row["name"]
        for row in artifacts.baselines
        for result in artifacts.results
        if result.eval and result.eval.bits_per_byte >= row["bits_per_byte"]
    ]
    for name in dict.fromkeys(idle):
        beaten = sorted(
            {
                result.trial.arm
                for result in artifacts.results
                for row in artifacts.baselines
                if row["name"] == name and result.eval and result.eval.bits_per_byte >= row["bits_per_byte"]
            }
        )
        found.append(f"Not better than {name} on this text: {', '.join(beaten)}.")
    return found


def text_notes(judged: Sequence[Judgement]) -> list[str]:
    """Where the text is too short: its sampling error is to stay below a third of the seeds' spread."""
    return [
        f"{one.arm}: another test text of this length would move the difference by {one.text_error_nats:.4f} "
        f"nats, more than a third of what seeds do ({one.std_nats:.4f}); a longer text would say more."
        for one in judged
        if one.text_error_nats is not None and one.std_nats and one.text_error_nats > one.std_nats / 3
    ]


def report_pictures(artifacts: Artifacts) -> dict[str, dict[str, str]]:
    """`{name: {"svg", "caption", "section"}}`; a picture without data is left out."""
    config = artifacts.config
    colour = plots.colours([(arm.name, artifacts.family(arm.name)) for arm in config.arms])
    matching, size = config.matching[0], config.sizes[-1].name
    results = artifacts.at(matching, size)
    order = {arm.name: place for place, arm in enumerate(config.arms)}
    results = sorted(results, key=lambda result: (order[result.trial.arm], result.trial.seed))
    pictures: dict[str, dict[str, str]] = {}

    def add(name: str, section: str, svg: str, caption: str) -> None:
        pictures[name] = {"svg": svg, "caption": caption, "section": section}

    if any(result.eval for result in results):
        add(
            "quality",
            "quality",
            plots.quality(results, artifacts.baselines, colour, "quality"),
            "Bits per byte of unseen text: a dot for each seed, a bar at the mean; dashed: what needs no "
            "neural network.",
        )
    if any(result.curve.loss for result in results):
        measured = {
            arm.name: speed_row(artifacts, artifacts.planned(matching, size, arm.name)) for arm in config.arms
        }
        speeds = {arm: row["tokens_per_second"] for arm, row in measured.items() if row}
        speeds = speeds if len(speeds) == len(measured) else {}
        clock = (
            "training time, by step times measured in turns"
            if speeds
            else "training time, by the runs' clocks"
        )
        for against, words in (("tokens", "tokens seen"), ("seconds", clock)):
            add(
                f"loss-{against}",
                "curves",
                plots.loss_curves(results, colour, against, f"loss-{against}", speeds),
                f"Loss against {words}. Lines: training, smoothed, one for each seed; dots: held-out text.",
            )
    rows = []
    for arm in config.arms:
        row = arm_row(artifacts, artifacts.planned(matching, size, arm.name))
        speed = speed_row(artifacts, artifacts.planned(matching, size, arm.name)) or {}
        if row["tokens_per_second"]:
            rows.append(
                {
                    "arm": arm.name,
                    "low": None,
                    "high": None,
                    **speed,
                    "tokens_per_second": row["tokens_per_second"],
                }
            )
    if rows:
        source = (
            "measured in turns; the line spans the middle half of the rounds"
            if rows[0]["low"]
            else "of the runs"
        )
        add("throughput", "speed", plots.throughput(rows, colour, "throughput"), f"Training speed, {source}.")
    tried = [row for row in artifacts.sweep if row["size"] == size and len(row["trials"]) > 1]
    if tried:
        add(
            "sweep",
            "curves",
            plots.sweep(tried, colour, "sweep", "learning_rate"),
            "Learning rates tried, each with the best rate of the coefficients; the filled point was chosen.",
        )
    if any(trial["kan_learning_rate"] for row in tried for trial in row["trials"]):
        add(
            "sweep-coefficients",
            "curves",
            plots.sweep(tried, colour, "sweep-coefficients", "kan_learning_rate"),
            "Rates of the KAN coefficients tried; the filled point was chosen.",
        )
    series = {arm.name: list(zip(*size_points(artifacts, arm.name), strict=True)) for arm in config.arms}
    series = {arm: points for arm, points in series.items() if len(points) > 1}
    if series:
        add(
            "scaling",
            "quality",
            plots.scaling(series, colour, "scaling"),
            "Loss at several sizes, mean over seeds.",
        )
    for arm in config.arms:
        shown = next((r.functions for r in results if r.trial.arm == arm.name and r.functions), None)
        if shown and shown["curves"]:
            curves = spread(shown["curves"], DRAWN_FUNCTIONS)
            add(
                f"functions-{arm.name}",
                "functions",
                learned_functions_svg(curves, colour[arm.name], f"functions-{arm.name}"),
                f"{arm.name}: {shown['caption']}",
            )
    return pictures


def template_values(
    artifacts: Artifacts, content: dict[str, Any], pictures: dict[str, dict[str, str]]
) -> dict[str, Any]:
    config = artifacts.config
    first = [r for r in artifacts.at(config.matching[0], config.sizes[-1].name) if r.samples]
    prompts: dict[str, list[dict[str, str]]] = {}
    for arm in config.arms:
        result = next((r for r in first if r.trial.arm == arm.name), None)
        for sample in result.samples if result else []:
            prompts.setdefault(sample["prompt"], []).append({"arm": arm.name, "text": sample["text"]})
    colour = plots.colours([(arm.name, artifacts.family(arm.name)) for arm in config.arms])
    held_out = next((result.eval for result in artifacts.results if result.eval), None)
    return {
        **content,
        "titles": TITLES,
        "matched": MATCHED,
        "pictures": pictures,
        "prompts": prompts,
        "colour": colour,
        "held_out": held_out,
        "block_size": artifacts.data.get("block_size"),
        "importance": importance_rows(artifacts),
        "config_text": json.dumps(content["config"], indent=1, ensure_ascii=False),
        "day": datetime.fromisoformat(artifacts.provenance["date"]).strftime("%d %B %Y, %H:%M UTC"),
    }


def importance_rows(artifacts: Artifacts) -> list[dict[str, Any]]:
    """One line for each layer of learned functions of each arm's first seed."""
    rows = []
    config = artifacts.config
    for arm in config.arms:
        results = artifacts.at(config.matching[0], config.sizes[-1].name, arm.name)
        shown = next((result.functions for result in results if result.functions), None)
        rows += [{"arm": arm.name, **row} for row in (shown["layers"] if shown else [])]
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


def summary(directory: str | Path) -> str:
    """The table of arms and the verdict as plain text for a terminal, from report.json."""
    content = json.loads((Path(directory) / "report.json").read_text(encoding="utf-8"))
    lines = []
    for table in content["tables"]:
        lines.append(
            f"{TITLES[table['matching']]}" + (f" (size {table['size']})" if table["size"] != "base" else "")
        )
        header = ("arm", "parameters", "mismatch", "bits/byte", "perplexity", "tokens/s", "peak memory")
        rows = [header]
        for row in table["rows"]:
            bits = "failed" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
            ppl = "" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
            rate = "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}"
            memory = (
                "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB"
            )
            cells = (
                row["arm"],
                f"{row['non_embedding_parameters']:,}",
                f"{row['mismatch']:+.2%}",
                bits,
                ppl,
                rate,
                memory,
            )
            rows.append(cells)
        for baseline in content["baselines"] if table is content["tables"][0] else []:
            rows.append((baseline["name"], "", "", f"{baseline['bits_per_byte']:.4f}", "", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        for row in rows:
            right = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  " + "  ".join([row[0].ljust(widths[0]), *right]).rstrip())
    lines += ["", content["verdict"]["sentence"]]
    return "\n".join(lines)
