"""The report of a study, every number from its trials.jsonl and baselines.json."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from kanlm.compare.judgement import ArmLosses, Judgement, judge, learned_nothing, sentence
from kanlm.config import UserError
from kanlm.model.ffn import find_arm
from kanlm.runs import read_json, write_json, write_text
from kanlm.stats import holm, paired_difference, standard_error
from kanlm.study.figures import forest
from kanlm.study.ladders import ladders
from kanlm.study.plan import AVERAGED, SEGMENTS, StudyFolder, key_of, label_of, megaflops, rates_of, trials_of
from kanlm.study.rates import losses_by_rate
from kanlm.study.shapes import learned_functions
from kanlm.study.texts import counted

HEADER = """# The study: learned activations against fixed ones at equal parameters

Written by `kanlm report` from trials.jsonl (a line for each training) and the plan (plan.toml, or
configs/study.toml). Loss in nats/token: lower is better. Rates are chosen by the validation text, with a seed
that no verdict uses or, in the ladders, the judged seeds' own; the test text chooses none. The twin
of `kan_act, normed` is `gelu, normed`: the same block with the function fixed at its start. "Detectable" is
the true difference that so many seeds find in 80% of studies, "text" what another test text of this kind
would change in the difference (standard error over 64 parts). "p (Holm)": Student's paired t over the arms of
a phase; "tie p": of equivalence within 0.01 nats (two one-sided tests; small: a tie). Three seeds have no
sign-flip p below 0.25: there an interval rests on normal differences. Holm runs within a phase, not over
phases.

Below: every final phase with its interval; the ladders, losses by size; losses by rate; then each phase,
those judged on test text before the search."""


def is_study(directory: str | Path) -> bool:
    """Whether the folder holds trials of a study."""
    return StudyFolder(Path(directory)).trials.is_file()


def report(directory: str | Path) -> Path:
    """Write report.md, report.json and the figures of the study in the folder; the path of the first."""
    study = StudyFolder(Path(directory))
    counted_rows = read_json(study.baselines) if study.baselines.is_file() else {}
    rows = study.done()
    if not rows:
        raise UserError(f"{study.trials}: no trial is done; `kanlm study run --folder {study.path}` first")
    judged: list[dict[str, Any]] = []
    final, search = ["## Judged on test text"], ["## The search, on validation text"]
    for phase in study.phases():
        done = [rows[key] for trial in trials_of(phase) if (key := key_of(trial)) in rows]
        if not done:
            continue
        title = f"### {phase['name']}\n\n{phase.get('about', '')}\n"
        if phase.get("role") == "final" and len({row["arm"] for row in done}) > 1:
            found, text = judged_phase(phase, done, counted_rows)
            judged += found
            final.append(f"{title}\n{text}")
        else:
            text = seeds_table(done) if len(phase["seeds"]) > 1 else rates_table(done)
            search.append(f"{title}\n{text}")
    drawn = forest([one for one in judged if one["family"] == "kan"], study.path)
    picture = f"![differences of the KANs to their MLP by phase, with intervals]({drawn})"
    shapes, learned = learned_functions(study) if study.functions.is_file() else ([], [])
    texts, measured = ladders(study, rows)
    by_rate, at_rates = losses_by_rate(study, rows)
    parts = [HEADER, picture, *learned, *(["## Ladders"] if texts else []), *texts, *by_rate, *final, *search]
    found_in_all = {"verdict": {"judgements": judged}, "ladders": measured, "functions": shapes}
    found_in_all["rates"] = at_rates
    write_json(study.path / "report.json", found_in_all)
    write_text(study.path / "report.md", "\n\n".join(parts) + "\n")
    return study.path / "report.md"


def rates_table(done: list[dict[str, Any]]) -> str:
    """Every trial of a search, the best of each arm marked."""
    by_arm = defaultdict(list)
    for row in done:
        by_arm[label_of(row)].append(row)
    lines = ["| arm | rates of matrices / coefficients | validation | seed |", "|---|---|---|---|"]
    for label, own in sorted(by_arm.items(), key=lambda item: min(r.get("valid", math.inf) for r in item[1])):
        best = min(own, key=lambda row: row.get("valid", math.inf))
        for row in sorted(own, key=lambda row: (row["learning_rate"], row.get("kan_learning_rate", 0))):
            loss = f"{row['valid']:.4f}" if "valid" in row else "diverged"
            loss = f"**{loss}**" if row is best else loss
            lines.append(f"| {label} | {rates_of(row)} | {loss} | {row['seed']} |")
    return "\n".join(lines)


def seeds_table(done: list[dict[str, Any]]) -> str:
    """Trials of several seeds: the mean of each, and its paired difference to the normed GELU."""
    by_trial: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in done:
        by_trial[label_of(row), rates_of(row)][row["seed"]] = row.get("valid", math.inf)
    twin = next((own for (label, _), own in by_trial.items() if label == "gelu, normed"), {})
    lines = [
        "| arm | rates of matrices / coefficients | validation | seeds | less the normed GELU, 95% |",
        "|---|---|---|---|---|",
    ]
    for (label, rates), own in sorted(by_trial.items(), key=lambda item: fmean([*item[1].values()])):
        seeds = [s for s in sorted(set(own) & set(twin)) if math.isfinite(own[s] + twin[s])]
        seeds = seeds if own is not twin else []
        gap = ""
        if len(seeds) > 1:
            found = paired_difference([own[s] for s in seeds], [twin[s] for s in seeds])
            gap = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
        lines.append(f"| {label} | {rates} | {fmean([*own.values()]):.4f} | {len(own)} | {gap} |")
    return "\n".join(lines)


def judged_phase(
    phase: dict[str, Any], done: list[dict[str, Any]], counted_rows: dict[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """The judgements of a final phase and their table; the validation text chooses the baseline."""
    by_arm = defaultdict(list)
    for row in done:
        by_arm[label_of(row)].append(row)
    arms = [
        ArmLosses(
            label,
            "control" if own[0].get("frozen") else find_arm(own[0]["arm"]).family,
            validation={row["seed"]: row["valid"] for row in own if "valid" in row},
            test={row["seed"]: row["test"] for row in own if "test" in row},
            diverged=[row["seed"] for row in own if row["state"] == "diverged"],
            bits_per_byte={row["seed"]: row["test_bits_per_byte"] for row in own if "test" in row},
        )
        for label, own in by_arm.items()
    ]
    size, counts = f"{phase['corpus']} {phase['size']}", counts_of(phase, counted_rows)
    idle = [
        arm.name
        for arm in arms
        if arm.bits_per_byte and learned_nothing(fmean([*arm.bits_per_byte.values()]), counts)
    ]
    judgements = [
        replace(one, text_error_nats=text_error(by_arm, one))
        for one in judge(arms, matching=phase.get("matching", "parameters"), size=size, learned_nothing=idle)
    ]
    lines = [
        "| arm | rates | parameters | MFLOPs a token | seeds | validation | test | bits per byte | "
        "functions at their start |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(arms, key=lambda arm: np.mean(list(arm.validation.values() or [math.inf]))):
        own = by_arm[arm.name]
        fixed = [r["test_with_initial_functions"] for r in own if "test_with_initial_functions" in r]
        columns = [[*one.values()] for one in (arm.validation, arm.test, arm.bits_per_byte)]
        cells = [f"{np.mean(values):.4f}" if values else "" for values in [*columns, fixed]]
        parameters = next((row["non_embedding_parameters"] for row in own if "valid" in row), 0)
        lines.append(
            f"| {arm.name} | {rates_of(own[0])} | {parameters:,} | {megaflops(own[0]):.3f} | "
            f"{len(arm.test)} | {' | '.join(cells)} |"
        )
    lines += [
        "",
        *(f"- {sentence(one)}{beaten(one, counts)}" for one in judgements),
        *counting(phase, counted_rows),
        "",
    ]
    lines += [
        "| arm against | seeds | difference | interval | bootstrap | p (Holm) | sign flips p | tie p | "
        "detectable | text |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in judgements:
        # Against its own twin too, which is the attribution: what the learning of the function gave.
        lines += [difference_row(one)] + [
            difference_row(other)
            for twin in arms
            if twin.family == "mlp" and twin.name != one.baseline
            for other in judge([next(a for a in arms if a.name == one.arm), twin])
        ]
    lines += spreads(arms, judgements)
    lines += averaging(by_arm, judgements)
    lines += zero_shot_table(by_arm, judgements)
    return [{**one.as_dict(), "phase": phase["name"]} for one in judgements], "\n".join(lines)


def paired_rows(
    by_arm: dict[str, list[dict[str, Any]]], one: Judgement, key: str
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]], list[int]]:
    """By seed the trials of an arm and of its baseline that have the `key`, and the seeds that both have."""
    own, other = (
        {row["seed"]: row for row in by_arm.get(name, []) if key in row}
        for name in (one.arm, one.baseline or "")
    )
    return own, other, sorted(set(own) & set(other))


def text_error(by_arm: dict[str, list[dict[str, Any]]], one: Judgement) -> float | None:
    """What another test text of this kind would change in the difference, from its segments, nats/token."""
    own, other, seeds = paired_rows(by_arm, one, "test")
    if not seeds:
        return None
    gaps = [np.subtract(own[seed]["test_segments"], other[seed]["test_segments"]) for seed in seeds]
    tokens = sum(own[seeds[0]]["test_segments"]) / own[seeds[0]]["test"]
    return standard_error(np.mean(gaps, axis=0).tolist(), [tokens / SEGMENTS] * SEGMENTS)


def spreads(arms: list[ArmLosses], judgements: list[Judgement]) -> list[str]:
    """What pairing by seed (equal draws by name, equal order of data) does to the spread of differences."""
    lines = []
    for one in judgements:
        test = {arm.name: arm.test for arm in arms}
        own, other = test[one.arm], test.get(one.baseline or "", {})
        seeds = sorted(set(own) & set(other))
        if len(seeds) < 3:
            continue
        a, b = (np.array([losses[seed] for seed in seeds]) for losses in (own, other))
        paired, apart = np.std(a - b, ddof=1), math.sqrt(np.var(a, ddof=1) + np.var(b, ddof=1))
        lines.append(
            f"\nStandard deviation over seeds: {one.arm} {np.std(a, ddof=1):.4f}, {one.baseline} "
            f"{np.std(b, ddof=1):.4f}; of the differences {paired:.4f} in pairs of one seed, {apart:.4f} if "
            "seeds were unrelated."
        )
        if one.text_error_nats is not None and one.text_error_nats > paired / 3:
            lines[-1] += (
                f" The test text's own sampling error ({one.text_error_nats:.4f}) is more than a third of "
                "that: the interval is of seeds, and another text of this kind adds to it."
            )
    return lines


def averaging(by_arm: dict[str, list[dict[str, Any]]], judgements: list[Judgement]) -> list[str]:
    """The differences with the last checkpoints averaged, beside those of the same seeds without."""
    lines = []
    for one in judgements:
        own, other, seeds = paired_rows(by_arm, one, "test_averaged")
        if len(seeds) < 2:
            continue
        lines += [
            "",
            f"| test, weights of {len(seeds)} seeds | {one.arm} | {one.baseline} | difference | interval | "
            "spread |",
            "|---|---|---|---|---|---|",
        ]
        for words, key in (
            ("the last", "test"),
            (f"mean of at most {AVERAGED} checkpoints", "test_averaged"),
        ):
            a, b = ([rows[seed][key] for seed in seeds] for rows in (own, other))
            gap, spread = paired_difference(a, b), np.std(np.subtract(a, b), ddof=1)
            lines.append(
                f"| {words} | {fmean(a):.4f} | {fmean(b):.4f} | {gap.mean:+.4f} | "
                f"{gap.low:+.4f} to {gap.high:+.4f} | {spread:.4f} |"
            )
    return lines


def zero_shot_table(by_arm: dict[str, list[dict[str, Any]]], judgements: list[Judgement]) -> list[str]:
    """BLiMP and LAMBADA of each judged arm beside its baseline, paired by seed, Holm over the lines."""
    lines = []
    for one in judgements:
        own, other, seeds = paired_rows(by_arm, one, "blimp")
        if len(seeds) < 2:
            continue
        asked: dict[str, Callable[[dict[str, Any]], float]] = {
            "LAMBADA, nats a word": lambda row: row["lambada_nats"],
            "LAMBADA, % right": lambda row: 100 * row["lambada_accuracy"],
            "BLiMP, % over paradigms": lambda row: 100 * row["blimp"],
        }
        for name in own[seeds[0]]["blimp_phenomena"]:
            asked[f"BLiMP, {name.replace('_', ' ')}, %"] = partial(phenomenon, name)
        rows = [
            ([value(own[s]) for s in seeds], [value(other[s]) for s in seeds]) for value in asked.values()
        ]
        found = [paired_difference(*row) for row in rows]
        adjusted = holm([difference.p_value for difference in found])
        lines += [
            "",
            "The first 100 pairs of each BLiMP paradigm and the first 1,000 passages of LAMBADA.",
            "",
            f"| zero-shot | {one.arm} | {one.baseline} | difference | 95% interval | p (Holm) |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {fmean(a):.3f} | {fmean(b):.3f} | {gap.mean:+.3f} | "
            f"{gap.low:+.3f} to {gap.high:+.3f} | {p:.2g} |"
            for name, (a, b), gap, p in zip(asked, rows, found, adjusted, strict=True)
        ]
    return lines


def phenomenon(name: str, row: dict[str, Any]) -> float:
    return 100 * row["blimp_phenomena"][name]


def counts_of(phase: dict[str, Any], counted_rows: dict[str, Any]) -> list[dict[str, Any]]:
    """What n-grams and xz reach from as much text as the phase's models saw; empty before `baselines`."""
    row = counted_rows.get(counted(phase["corpus"], phase["tokens"]))
    if row is None:
        return []
    orders = row["kneser_ney_bits_per_byte"]
    order, best = min(orders.items(), key=lambda item: item[1])
    return [
        {"name": f"Kneser-Ney of order {order}", "bits_per_byte": best, "orders": orders},
        {"name": "xz", "bits_per_byte": row["xz_bits_per_byte"]},
    ]


def beaten(one: Judgement, counts: list[dict[str, Any]]) -> str:
    """What a sentence has to add where counting or compressing predicts the text better than both arms."""
    bits = [value for value in (one.arm_bits_per_byte, one.baseline_bits_per_byte) if value is not None]
    better = [row for row in counts if bits and row["bits_per_byte"] <= min(bits)]
    if not better:
        return ""
    listed = " and ".join(f"{row['name']} ({row['bits_per_byte']:.4f})" for row in better)
    return f" From as much text, {listed} predict{'s' if len(better) == 1 else ''} better than both."


def counting(phase: dict[str, Any], counted_rows: dict[str, Any]) -> list[str]:
    """What needs no neural network on the phase's test text."""
    lines = []
    for tokens, words in (
        (phase["tokens"], "as much training text as the models saw"),
        (None, "all training text"),
    ):
        row = counted_rows.get(counted(phase["corpus"], tokens))
        if row is None:
            continue
        order, best = min(row["kneser_ney_bits_per_byte"].items(), key=lambda item: item[1])
        lines.append(
            f"- Counting, from {words} ({row['bytes']:,} bytes): Kneser-Ney of order {order} "
            f"{best:.4f} bits per byte, xz {row['xz_bits_per_byte']:.4f}."
        )
    return lines


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def difference_row(one: Judgement) -> str:
    def pair(interval: Any) -> str:
        return f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""

    if one.difference_nats is None:
        return f"| {one.arm} against {one.baseline} | 0 | | | | | | | | |"
    p, flips, tie = (
        "" if value is None else p_text(value) for value in (one.p_holm, one.p_sign_flip, one.p_tie)
    )
    detectable = "" if one.detectable_nats is None else f"{one.detectable_nats:.4f}"
    text = "" if one.text_error_nats is None else f"{one.text_error_nats:.4f}"
    return (
        f"| {one.arm} against {one.baseline} | {one.seeds} | {one.difference_nats:+.4f} | "
        f"{pair(one.interval_nats)} | {pair(one.bootstrap_nats)} | {p} | {flips} | {tie} | "
        f"{detectable} | {text} |"
    )
