"""`kanlm inspect`: what the functions of a model do on real text, as one page and JSON, with controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kanlm import __version__
from kanlm.config import UserError
from kanlm.evaluation.generation import sample_rows
from kanlm.evaluation.loading import load_causal_lm
from kanlm.evaluation.perplexity import held_out_documents, prefix_token
from kanlm.interpret.drivers import drivers
from kanlm.interpret.functions import curves, rounded, token_batch
from kanlm.interpret.layers import (
    FunctionLayer,
    function_layers,
    record_layers,
    short_name,
    with_random_weights,
    without_learned_part,
)
from kanlm.interpret.page import page
from kanlm.interpret.removal import ClosedForms, lines_of, removal, start_of
from kanlm.interpret.statistics import (
    STATISTICS,
    FunctionStatistics,
    compare_with_control,
    function_statistics,
    layer_summary,
)
from kanlm.interpret.symbolic import NAMES, THRESHOLD, WEIGHT, Formulas, fit_functions
from kanlm.runs import write_json, write_text

SCHEMA = 1
PARTS = 8
"""Parts of the text, each of which gives one difference to a control: p is at least 2 / 2^PARTS."""
DRIVEN = 4
"""Functions of a layer whose tokens are shown."""
SCATTERED = 250
"""Functions of a layer in the picture of the two importances."""
EVALUATIONS = 450_000_000
"""Formulas evaluated for one loss: beyond, the sequences on which losses are measured are shortened."""
PART_EVALUATIONS = 60_000_000
"""Functions times tokens of one part of the text for the controls: beyond, its sequences are shortened."""
LOOKED_FOR = "KANLinear, LearnedFunction, or a dense block with down_proj, c_proj or fc2 and an activation"


def inspect(
    model_path: str | Path,
    out: str | Path,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    tokens: int = 4096,
    functions: int = 12,
    weight: float = WEIGHT,
    threshold: float = THRESHOLD,
    library: Sequence[str] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> str:
    """Write inspect.html and inspect.json into `out`; returns a table for the terminal.

    data: a specification of `held_out_documents`, whose text the functions are looked at on; without it the
    model writes a text of its own (seed 0). Half of `tokens` sets the statistics and fits, on the other half
    losses are measured. functions: drawn for each layer. weight, threshold, library: of the formulas, see
    `fit_functions`; functions whose R^2 reaches the threshold are frozen as formulas.

    Raises:
        UserError: no causal LM, no functions in it, no tokens.
    """
    if tokens < 2 * PARTS * 2:
        raise UserError(f"tokens: expected at least {4 * PARTS}, got {tokens}; the default is 4096")
    model, tokenizer = load_causal_lm(model_path, trust_remote_code=trust_remote_code)
    model = model.float()
    if not function_layers(model):
        raise UserError(
            f"model {model_path}: {type(model).__name__} has no functions to look at; looked for {LOOKED_FOR}"
        )
    if data is None:
        texts, source = [own_text(model, tokenizer, tokens)], "text that the model wrote itself"
    else:
        documents, name, part = held_out_documents(data, split)
        texts, source = documents, f"{name} ({part})"
    try:
        batch = token_batch(model, tokenizer, texts, tokens, rows=2 * PARTS)
    except ValueError as error:
        raise UserError(f"data {data}: has no text to look at the functions on: {error}") from error
    if batch.numel() < 4 * PARTS:
        raise UserError(f"data {data}: {batch.numel()} tokens are too few; give at least {4 * PARTS}")
    try:
        record_layers(model, batch[:1], gradients=False)
    except ValueError as error:
        raise UserError(f"model {model_path}: {error}") from error
    found = inspection(
        model,
        tokenizer,
        batch,
        functions=functions,
        weight=weight,
        threshold=threshold,
        library=library,
        seed=seed,
    )
    found |= {"model": str(model_path), "data": source, "kanlm_version": __version__}
    out = Path(out)
    write_json(out / "inspect.json", found)
    write_text(out / "inspect.html", page(found))
    return f"{terminal_table(found)}\n\npage and numbers: {out}/inspect.html, {out}/inspect.json"


def inspection(
    model: Any,
    tokenizer: Any,
    batch: Tensor,
    *,
    functions: int = 12,
    weight: float = WEIGHT,
    threshold: float = THRESHOLD,
    library: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """inspect.json on tokens [B, T]: even sequences for statistics and fits, odd ones for losses."""
    own, held = batch[::2], batch[1::2]
    number = len(function_layers(model))
    names = list(function_layers(model))
    removed = without_learned_part(model)
    controls = 2 + (removed is not None)
    bar = tqdm(
        total=controls * PARTS + 3 * number + 4 * (number + 1), desc="inspecting", unit="step", disable=None
    )

    layers = record_layers(model, own)
    evaluated = sum(layer.functions for layer in layers if layer.kind == "edge") * len(held)
    held = held[:, : max(32, EVALUATIONS // max(1, evaluated))]
    statistics: dict[str, FunctionStatistics] = {}
    forms: dict[str, Formulas] = {}
    rows: list[dict[str, Any]] = []
    for layer in layers:
        statistics[layer.name] = function_statistics(layer)
        bar.update()
        forms[layer.name] = fit_layer(layer, statistics[layer.name], library, weight)
        bar.update()
        rows.append(
            describe_layer(
                layer, statistics[layer.name], forms[layer.name], own, tokenizer, functions, threshold
            )
        )
        bar.update()

    summaries: dict[str, list[list[dict[str, float | None]]]] = {}  # of each model: parts x layers
    number_of_functions = sum(layer.functions for layer in layers)
    positions = max(32, PART_EVALUATIONS // (number_of_functions * (len(own) // PARTS)))
    parts = own[:, :positions].tensor_split(PARTS)
    summaries["trained"] = [part_summaries(model, part, bar.update) for part in parts]
    summaries["random"] = [
        part_summaries(with_random_weights(model, seed + index), part, bar.update)
        for index, part in enumerate(parts)
    ]
    if removed is not None:
        summaries["removed"] = [part_summaries(removed, part, bar.update) for part in parts]
    for place, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        trained = [part[place] for part in summaries["trained"]]
        against = {
            control: compare_with_control(trained, [part[place] for part in summaries[control]])
            for control in ("random", "removed")
            if control in summaries and (control == "random" or layer.kind != "channel")
        }
        whole = layer_summary(layer, statistics[layer.name], own.flatten())
        row["statistics"] = {
            key: {"trained": whole[key]} | {control: against[control][key] for control in against}
            for key in STATISTICS
        }

    replacements: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}
    learned = [layer for layer in layers if layer.kind != "channel"]
    if learned:
        replacements["start"] = {layer.name: start_of(layer) for layer in learned}
    replacements["line"] = {layer.name: lines_of(layer, statistics[layer.name]) for layer in layers}
    if learned:
        everything = {
            layer.name: torch.ones_like(forms[layer.name].r2, dtype=torch.bool) for layer in learned
        }
        good = {layer.name: forms[layer.name].r2 >= threshold for layer in learned}
        replacements["formula"] = {
            layer.name: ClosedForms(layer, forms[layer.name], everything[layer.name]) for layer in learned
        }
        replacements["frozen"] = {
            layer.name: ClosedForms(layer, forms[layer.name], good[layer.name])
            for layer in learned
            if good[layer.name].any()
        }
    lost = removal(model, layers, replacements, held, PARTS, bar.update)
    bar.close()
    return {
        "schema": SCHEMA,
        "ffn_type": getattr(model.config, "ffn_type", model.config.model_type),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "functions": sum(layer.functions for layer in layers),
        "tokens": {"statistics": own.numel(), "loss": held.numel(), "length": batch.shape[1], "parts": PARTS},
        "smallest_p": 2 / 2**PARTS,
        "layers": rows,
        "removal": lost,
        "formulas": {"weight": weight, "threshold": threshold, **formula_totals(learned, forms, threshold)},
        "order": [short_name(name) for name in names],
    }


def fit_layer(
    layer: FunctionLayer, found: FunctionStatistics, library: Sequence[str] | None, weight: float
) -> Formulas:
    """Formulas of all functions of a layer, over the range that their inputs visit."""
    samples = layer.samples()
    low, high = samples.amin(0), samples.amax(0)
    return fit_functions(found.x, found.y, low=low, high=high, library=library, weight=weight)


def part_summaries(model: Any, part: Tensor, step: Callable[[], Any]) -> list[dict[str, float | None]]:
    """`layer_summary` of each layer of `model` on one part of the text."""
    ids = part.flatten()
    result = [layer_summary(layer, function_statistics(layer), ids) for layer in record_layers(model, part)]
    step()
    return result


def describe_layer(
    layer: FunctionLayer,
    found: FunctionStatistics,
    forms: Formulas,
    input_ids: Tensor,
    tokenizer: Any,
    count: int,
    threshold: float,
) -> dict[str, Any]:
    """What the page says of one layer, but for its statistics."""
    drawn = curves(layer, found, count)
    for curve in drawn:
        place, output = divmod(curve["index"], layer.outputs)
        closest = forms.formula(place, output)
        curve["formula"] = str(closest)
        curve["formula_r2"] = closest.r2
        curve["latex"] = closest.latex()
        curve["sympy"] = str(closest.sympy())
        curve["formula_y"] = rounded(torch.as_tensor(closest(curve["x"])))
    reached = (forms.r2 >= threshold).float()
    row = {
        "module": short_name(layer.name),
        "name": layer.name,
        "kind": layer.kind,
        "functions": layer.functions,
        "curves": drawn,
        "drivers": drivers(layer, [curve["index"] for curve in drawn[:DRIVEN]], input_ids, tokenizer),
        "formulas": {
            "good": reached.mean().item(),
            "names": name_counts(forms, reached.bool()),
            "skipped": {name: count for name, count in forms.skipped.items() if count},
        },
        "scatter": [],
    }
    if found.effect is not None:
        order = found.variance.flatten().argsort(descending=True)
        some = order[:: max(1, math.ceil(len(order) / SCATTERED))]
        row["scatter"] = list(
            zip(
                rounded(found.variance.flatten()[some].sqrt()),
                rounded(found.effect.flatten()[some]),
                strict=True,
            )
        )
    return row


def name_counts(forms: Formulas, chosen: Tensor) -> dict[str, int]:
    counts = torch.bincount(forms.name[chosen], minlength=len(NAMES)).tolist()
    return {name: count for name, count in zip(NAMES, counts, strict=True) if count}


def formula_totals(
    layers: Iterable[FunctionLayer], forms: dict[str, Formulas], threshold: float
) -> dict[str, Any]:
    chosen = [forms[layer.name] for layer in layers]
    return {
        "functions": sum(form.r2.numel() for form in chosen),
        "frozen": sum(int((form.r2 >= threshold).sum()) for form in chosen),
        "skipped": sum(sum(form.skipped.values()) for form in chosen),
    }


def terminal_table(found: dict[str, Any]) -> str:
    """The layers as Markdown, and the loss without the learned parts."""
    lines = [
        "| layer | functions | carry 90% | nonlinear | off grid | loss: start | straight line | formula |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row, lost in zip(found["layers"], found["removal"]["layers"], strict=True):
        numbers = {key: row["statistics"][key]["trained"] for key in STATISTICS}
        outside = "-" if numbers["outside_grid"] is None else f"{numbers['outside_grid']:.1%}"
        changes = [
            f"{lost[kind]['change']:+.4f}" if kind in lost else "-" for kind in ("start", "line", "formula")
        ]
        lines.append(
            f"| {row['module']} | {row['functions']:,} | {numbers['share_for_90_percent']:.0%} | "
            f"{numbers['nonlinear_share']:.0%} | {outside} | {' | '.join(changes)} |"
        )
    total = found["removal"]["all"]
    changes = [
        f"{total[kind]['change']:+.4f}" if kind in total else "-" for kind in ("start", "line", "formula")
    ]
    lines.append(f"| all layers | {found['functions']:,} | | | | {' | '.join(changes)} |")
    lines.append(f"\nloss {found['removal']['loss']:.4f} nats/token on held-out tokens")
    return "\n".join(lines)


def own_text(model: Any, tokenizer: Any, tokens: int) -> str:
    """Text that the model samples itself, at least `tokens` tokens."""
    length = min(256, getattr(model.config, "max_position_embeddings", 256))
    start = torch.full(
        (math.ceil(tokens / length) + 1, 1), prefix_token(model, tokenizer), device=model.device
    )
    rows = sample_rows(model, tokenizer, start, seed=0, do_sample=True, max_length=length)
    return "\n".join(tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True))
