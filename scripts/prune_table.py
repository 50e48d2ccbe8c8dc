"""Pruning side by side: parameters, loss by importance and at random, and step times at each share kept.

    python scripts/prune_table.py DATA MODEL... [--tune RUN.toml] [--out FILE.json]

prints a Markdown table. Of an MLP's block its neurons are pruned, so an MLP among the MODELs is the baseline.
With --tune each pruned model, also the first random one, is trained on as RUN.toml says (no [model] and no
tokenizer in it).
"""

import argparse
import tempfile
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from kanlm.config import load_run_config
from kanlm.evaluation.loading import load_causal_lm
from kanlm.export import export, export_model
from kanlm.prune import prune_table
from kanlm.runs import provenance, read_json, write_json
from kanlm.train.loop import train


def tuned(run: Path, folder: Path, numbers: Any, model: Any, tokenizer: Any) -> Any:
    """`model` after the run that the file `run` describes; everything is written below `folder`."""
    name = f"tuned-{next(numbers)}"
    start = export_model(model, tokenizer, folder / "pruned" / name, {"name": name})
    settings = {"name": name, "init_from": start, "output_dir": folder}
    config = load_run_config(run, [f"{key}={value}" for key, value in settings.items()])
    train(config)
    return load_causal_lm(export(config.run_dir))[0]


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "FFN": "ffn_type",
        "keep": "keep",
        "parameters": "parameters",
        "of the FFNs": "ffn_parameters",
        "loss": "loss",
        "random channels": "random",
        "tuned": "tuned",
        "random, tuned": "random_tuned",
    }
    columns = {title: key for title, key in columns.items() if key in rows[0]}
    lines = ["| " + " | ".join([*columns, "ms a step"]) + " |", "|---" + "|--:" * len(columns) + "|"]
    for row in rows:
        values = [row[key] for key in columns.values()]
        shown = [
            f"{v:,}" if isinstance(v, int) else f"{v:.4f}" if isinstance(v, float) else v for v in values
        ]
        shown[1] = f"{row['keep']:g}"
        lines.append("| " + " | ".join([*shown, f"{1e3 * row['step_seconds']:.1f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="text as in `kanlm eval --data`")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--tune", type=Path, metavar="RUN.toml", help="fine-tune each by this run")
    parser.add_argument("--out", type=Path, help="also write rows, machine and versions to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tune = options.tune and partial(tuned, options.tune, Path(folder), count())
        rows = prune_table(options.models, options.data, tune=tune)
        if options.out is not None:
            found: dict[str, Any] = {"data": options.data, "rows": rows, "provenance": provenance()}
            if tune:
                found["tune"] = read_json(Path(folder) / "tuned-0" / "config.json")
                del found["tune"]["output_dir"], found["tune"]["init_from"]
            write_json(options.out, found)
    print(table(rows))


if __name__ == "__main__":
    main()
