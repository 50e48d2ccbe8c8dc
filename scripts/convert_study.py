"""Does a converted model gain from its functions? `python scripts/convert_study.py TRAIN VALID --out DIR`.

A SwiGLU model of 319k parameters without embeddings is trained on TRAIN and converted to `kan_glu`, which is
the same model. Both go on for as many tokens again: the functions alone, all of the converted model, and all
of the original. Two learning rates each, the same data order; the losses on VALID go to DIR/convert.json.
TRAIN and VALID are text files whose documents are separated by a line <|endoftext|>.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 240}
SEPARATOR = "<|endoftext|>"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "functions": ("converted", {"train.trainable": "functions"}),
    "converted": ("converted", {"train.kan_learning_rate": 3e-3}),
    "original": ("original", {}),
}
RATES = {"functions": (3e-3, 1e-2), "converted": (1e-3, 3e-3), "original": (1e-3, 3e-3)}


def kanlm(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "kanlm", *map(str, arguments)], check=True)


def settings(options: argparse.Namespace, name: str, rate: float, more: dict[str, Any]) -> list[str]:
    """Overrides of the run `name`."""
    values = {
        "name": name,
        "output_dir": str(options.out / "runs"),
        "tokenizer.vocab_size": 1024,
        "data.source": str(options.train),
        "data.validation_source": str(options.valid),
        "data.document_separator": SEPARATOR,
        "data.block_size": 128,
        "data.cache_dir": str(options.out / "cache"),
        "train.max_tokens": options.tokens,
        "train.batch_size": 8,
        "train.optimizer": "muon",
        "train.learning_rate": rate,
        "train.log_every": 100,
    } | more
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def trained(options: argparse.Namespace, name: str, rate: float, more: dict[str, Any]) -> dict[str, Any]:
    """The report on VALID of the run, which is trained and exported where it is not there yet."""
    run, report = options.out / "runs" / name, options.out / f"{name}.json"
    if not report.exists():
        empty = options.out / "empty.toml"
        empty.write_text("")
        kanlm("train", empty, *settings(options, name, rate, more))
        kanlm("export", run)
        evaluate(options, run / "hf", report)
    return json.loads(report.read_text())


def evaluate(options: argparse.Namespace, model: Path, report: Path) -> None:
    kanlm("eval", model, "--data", options.valid, "--document-separator", SEPARATOR, "--out", report)


def study(options: argparse.Namespace) -> dict[str, Any]:
    """The record of all runs."""
    options.out.mkdir(parents=True, exist_ok=True)
    model = {f"model.{key}": value for key, value in SIZES.items()} | {"model.ffn_type": "swiglu"}
    base = trained(options, "base", 6e-3, model)
    folders = {"original": options.out / "runs" / "base" / "hf", "converted": options.out / "converted"}
    if not folders["converted"].exists():
        kanlm("convert", folders["original"], "--arm", "kan_glu", "--out", folders["converted"])
    report = options.out / "converted.json"
    if not report.exists():
        evaluate(options, folders["converted"], report)
    start = json.loads(report.read_text())
    rows = []
    for arm, (source, more) in ARMS.items():
        for rate in RATES[arm]:
            begin = {"init_from": str(folders[source]), "data_seed": 1} | more
            found = trained(options, f"{arm}-{rate:g}", rate, begin)
            rows.append({"arm": arm, "learning_rate": rate, **numbers(found)})
    return {"tokens": options.tokens, "base": numbers(base), "converted": numbers(start), "rows": rows}


def numbers(report: dict[str, Any]) -> dict[str, float]:
    return {key: report[key] for key in ("loss", "bits_per_byte", "tokens", "parameters")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=500_000, help="of each training")
    options = parser.parse_args()
    record = study(options)
    (options.out / "convert.json").write_text(json.dumps(record, indent=1) + "\n")
    for name in ("base", "converted"):
        print(
            f"{name:24} {record[name]['loss']:.4f} nats/token {record[name]['bits_per_byte']:.4f} bits/byte"
        )
    for row in record["rows"]:
        name = f"{row['arm']}, {row['learning_rate']:g}"
        print(f"{name:24} {row['loss']:.4f} nats/token {row['bits_per_byte']:.4f} bits/byte")


if __name__ == "__main__":
    main()
