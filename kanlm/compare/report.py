"""The report of a comparison: HTML, Markdown and JSON from the artifacts alone; no model is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from kanlm.compare.artifacts import ArmRuns, Artifacts, Result, load
from kanlm.compare.findings import findings
from kanlm.compare.page import TITLES, page_texts
from kanlm.compare.plots import report_pictures
from kanlm.compare.schema import MATCHINGS
from kanlm.interpret.pictures import standalone_svg
from kanlm.runs import write_json, write_text

SCHEMA = 1


def report(directory: str | Path) -> Path:
    """Write the report of the comparison in `directory`; the path of its HTML."""
    artifacts = load(directory)
    write_report(artifacts)
    return artifacts.directory.report_html


def write_report(artifacts: Artifacts) -> dict[str, Any]:
    """report.json, report.md, report.html and plots/*.svg in the comparison's folder; the first's content."""
    content = report_content(artifacts)
    pictures = report_pictures(artifacts, content)
    files = {f"{name}.svg": standalone_svg(picture["svg"]) for name, picture in pictures.items()}
    markdown, html = page_texts(artifacts, content, pictures)
    paths = artifacts.directory
    texts = {paths.report_md: markdown, paths.report_html: html}
    texts |= {paths.plots / name: svg for name, svg in files.items()}
    write_json(paths.report_json, content)  # once all is there, so that a mistake leaves the old report whole
    for path, text in texts.items():
        write_text(path, text)
    return content


def report_content(artifacts: Artifacts) -> dict[str, Any]:
    """report.json: verdict, tables, every run's EvalReport and RunRecord, claims, baselines, provenance."""
    config, cautions = artifacts.config, notes(artifacts)
    found = findings(artifacts)
    judged = [verdict.judgement for verdict in found.verdicts]
    tables = [
        {
            "matching": table.matching,
            "size": table.size,
            "tolerance": MATCHINGS[table.matching].tolerance,
            "rows": [arm_row(runs) for runs in table.arms.values()],
            "sentences": [
                one.sentence
                for one in found.verdicts
                if (one.judgement.matching, one.judgement.size) == (table.matching, table.size)
            ],
        }
        for table in artifacts.tables
    ]
    largest = config.sizes[-1].name
    sentences = [verdict.sentence for verdict in found.verdicts if verdict.judgement.size == largest]
    headline = sentences[0] if sentences else "No verdict: there is no KAN arm among the arms."
    return {
        "schema": SCHEMA,
        "name": config.name,
        "date": artifacts.provenance["date"],
        "verdict": {"sentence": headline, "judgements": [judgement.as_dict() for judgement in judged]},
        "tables": tables,
        "runs": [run_entry(result) for result in artifacts.results],
        "baselines": artifacts.baselines,
        "claims": found.claims,
        "sweep": artifacts.sweep,
        "speed": artifacts.speed,
        "notes": cautions + found.notes,
        "data": artifacts.data,
        "provenance": artifacts.provenance,
        "config": config.model_dump(mode="json"),
    }


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


def arm_row(runs: ArmRuns) -> dict[str, Any]:
    """One line of a table of arms: what was planned and what all seeds gave."""
    planned, speed, reports = runs.planned, runs.speed, [*runs.evaluations.values()]
    records = [result.record for result in runs.results if result.record]
    first = runs.results[0].trial if runs.results else None
    loss = fmean(report.loss for report in reports) if reports else None
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
        "learning_rate": first.learning_rate if first else None,
        "training_tokens": first.max_tokens if first else None,
        "bits_per_byte": runs.bits_per_byte,
        "loss": loss,
        "perplexity": math.exp(loss) if loss is not None else None,
        "word_perplexity": geometric_mean(report.word_perplexity for report in reports) if reports else None,
        "text_error_nats": runs.text_error_nats,
        "learned_nothing": runs.learned_nothing,
        "seeds": [seed_entry(result) for result in runs.results],
        "tokens_per_second": speed["tokens_per_second"] if speed else (fmean(recorded) if recorded else None),
        "speed_source": "step times measured in turns" if speed else "the runs' own clocks",
        "training_seconds": fmean(record.seconds for record in records) if records else None,
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
    mlps = sorted(arm for arm, runs in artifacts.shown.arms.items() if runs.planned.family == "mlp")
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


def summary(content: dict[str, Any]) -> str:
    """The table of arms and the verdict as plain text for a terminal; `content`: report.json."""
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
