"""`kanlm inspect`: the learned functions of an exported model as pictures, numbers, formulas and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kanlm.config import UserError
from kanlm.evaluation.perplexity import load_causal_lm, prefix_token
from kanlm.interpret.functions import SAMPLED_TOKENS, learned_functions
from kanlm.interpret.pictures import learned_functions_svg, spread, standalone_svg
from kanlm.interpret.symbolic import formula
from kanlm.runs import write_json, write_text

COLOUR = "#c2410c"


def inspect(
    model_path: str | Path, out: str | Path, texts: list[str] | None = None, per_module: int = 3
) -> str:
    """Write functions.json, functions.md and one SVG a layer into `out`; the table of layers as text.

    `texts` set where the layers' inputs lie; without them the model writes a text of its own (seed 0).
    UserError where the model has no KAN layers.
    """
    network, tokenizer = load_causal_lm(model_path)
    found = learned_functions(network, tokenizer, texts or [own_text(network, tokenizer)], per_module)
    if not found["layers"]:
        raise UserError(
            f"{model_path}: ffn_type {getattr(network.config, 'ffn_type', 'unknown')!r} has no learned "
            "functions to draw"
        )
    out = Path(out)
    for curve in found["curves"]:
        fitted = formula(curve["x"], curve["y"], curve["density"])
        curve["formula"], curve["formula_r2"] = str(fitted), fitted.r2
    write_json(out / "functions.json", found)
    pictures = []
    for row in found["layers"]:
        curves = [curve for curve in found["curves"] if curve["module"] == row["module"]]
        name = row["module"].replace(" ", "-")
        svg = learned_functions_svg(spread(curves, 12), COLOUR, name)
        write_text(out / f"{name}.svg", standalone_svg(svg))
        pictures.append(f"![{row['module']}]({name}.svg)")
    table = layer_table(found["layers"])
    formulas = formula_table(found["curves"])
    text = "\n\n".join([f"# Learned functions of {model_path}", table, *pictures, formulas]) + "\n"
    write_text(out / "functions.md", text)
    return f"{table}\n\npictures and numbers: {out}/"


def layer_table(rows: list[dict[str, Any]]) -> str:
    """The layers' rows as Markdown."""
    lines = [
        "| layer | functions | share that carries 90% | nonlinear share | inputs off the grid |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        outside = "-" if row["outside_grid"] is None else f"{row['outside_grid']:.1%}"
        lines.append(
            f"| {row['module']} | {row['functions']:,} | {row['share_for_90_percent']:.0%} | "
            f"{row['nonlinear_share']:.0%} | {outside} |"
        )
    return "\n".join(lines)


def formula_table(curves: list[dict[str, Any]]) -> str:
    """The closest elementary formula of every drawn function, as Markdown."""
    lines = ["| function | closest formula | R^2 |", "|---|---|--:|"]
    lines += [f"| {c['label']} | `{c['formula']}` | {c['formula_r2']:.4f} |" for c in curves]
    return "\n".join(lines)


def own_text(model: Any, tokenizer: Any) -> str:
    """Text that the model samples itself, as many tokens as `learned_functions` looks at."""
    length = min(256, model.config.max_position_embeddings)
    start = torch.full(
        (max(1, SAMPLED_TOKENS // length), 1), prefix_token(model, tokenizer), device=model.device
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        rows = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, max_length=length, pad_token_id=pad
        )
    return "\n".join(tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True))
