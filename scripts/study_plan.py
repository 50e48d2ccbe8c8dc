"""What the study trains: the trials of configs/study.toml, the run of each, and the results so far."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

import study_ideas  # noqa: F401  registers its arms and starts

from kanlm.config import RunConfig, parse_table
from kanlm.model import KanLMConfig
from kanlm.sizing import architecture, matched_width, parameter_counts, training_flops_per_token

ROOT = Path("runs/study")
PLAN = Path("configs/study.toml")
RESULTS = Path("docs/results/study/trials.jsonl")
SEPARATOR = "<|endoftext|>"
FROZEN = 1e-12
"""A rate at which coefficients of about 1 stay as they are in fp32."""
AVERAGED, AVERAGED_EVERY = 8, 16
"""Of a final phase's run, the mean weights of the last 8 checkpoints, 16 steps apart, are judged, too."""
SIZES = {
    "0.1m": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
    "0.3m": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 360},
    "0.6m": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
    "1.2m": {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5, "intermediate_size": 640},
}
"""GELU models; every other arm gets the width with as many parameters."""
OF_TRAINING = ("kan_learning_rate", "kan_betas", "weight_decay", "schedule", "max_grad_norm")
"""Keys of a trial that are keys of the run's [train], where it has them."""
OF_A_PHASE = ("name", "about", "arms", "seeds", "ladder", "matching")
"""Keys of a phase that change none of its trials."""


def plan() -> list[dict[str, Any]]:
    return tomllib.loads(PLAN.read_text(encoding="utf-8"))["phase"]


def trials_of(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The planned trials in their order; lists in the plan are tried in every combination."""
    found = []
    for phase in plan():
        if names and phase["name"] not in names:
            continue
        common = {key: value for key, value in phase.items() if key not in OF_A_PHASE}
        rows = []
        for arm in phase["arms"]:
            table = {**common, **arm}
            keys = [key for key, value in table.items() if isinstance(value, list)]
            for values in itertools.product(*(table[key] for key in keys)):
                rows.append({**table, **dict(zip(keys, values, strict=True))})
        # Seed after seed, so that a phase that is cut short still has paired seeds.
        for seed in phase["seeds"]:
            found += [{**row, "seed": seed} for row in rows]
    return found


def key_of(trial: dict[str, Any]) -> str:
    """A name from everything that decides the trial's result."""
    fields = [f"{key}={trial[key]}" for key in sorted(trial) if key != "role"]
    return ",".join(fields)


def name_of(trial: dict[str, Any]) -> str:
    return f"{trial['arm']}-{hashlib.sha256(key_of(trial).encode()).hexdigest()[:12]}"


def run_config(trial: dict[str, Any]) -> RunConfig:
    """The run of a trial, its width solved to the parameters of the GELU model of its size."""
    corpus = ROOT / "data" / trial["corpus"]
    sizes = SIZES[trial["size"]]
    base = KanLMConfig(vocab_size=trial["vocab_size"], max_position_embeddings=128, ffn_type="gelu", **sizes)
    own = {key: value for key, value in trial.items() if key.startswith("kan_") and key not in OF_TRAINING}
    own["hidden_norm"] = trial.get("hidden_norm", False)
    fields = {**sizes, "vocab_size": trial["vocab_size"], "max_position_embeddings": 128, **own}
    own_base = KanLMConfig(**{**fields, "ffn_type": "gelu"})
    sized, _ = matched_width(own_base, trial["arm"], parameter_counts(base).non_embedding)
    train_table = {
        "max_tokens": trial["tokens"],
        "batch_size": 8,
        "optimizer": trial.get("optimizer", "muon"),
        "learning_rate": trial["learning_rate"],
        "eval_every": 0,
        "save_minutes": 60.0,
        "save_every": AVERAGED_EVERY if trial.get("role") == "final" else 0,
        "keep_last": AVERAGED,
        "min_lr_ratio": trial.get("min_lr_ratio", 0.1),
    }
    if trial.get("frozen"):
        train_table["kan_learning_rate"] = FROZEN
    for name in OF_TRAINING:
        if name in trial:
            train_table[name] = trial[name]
    table = {
        "name": name_of(trial),
        "output_dir": str(ROOT / "runs"),
        "seed": trial["seed"],
        "model": {**sizes, **own, "ffn_type": trial["arm"], "intermediate_size": sized.intermediate_size},
        "tokenizer": {"vocab_size": trial["vocab_size"]},
        "data": {
            "source": f"{corpus}.train.txt",
            "validation_source": f"{corpus}.valid.txt",
            "document_separator": SEPARATOR,
            "block_size": 128,
            "cache_dir": str(ROOT / "cache"),
        },
        "train": train_table,
    }
    return parse_table(RunConfig, table, "study")


def results() -> list[dict[str, Any]]:
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def rates_of(row: dict[str, Any]) -> str:
    own = f" / {row['kan_learning_rate']:g}" if "kan_learning_rate" in row else ""
    own = " / 0" if "frozen" in row else own
    return f"{row['learning_rate']:g}{own}"


def megaflops(trial: dict[str, Any]) -> float:
    """Of a training step, for each token."""
    return training_flops_per_token(architecture(run_config(trial)), 128) / 1e6
