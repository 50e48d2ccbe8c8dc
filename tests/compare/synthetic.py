"""A comparison's folder full of plausible numbers, drawn from a seed, as if arms had been trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from kanlm.compare.artifacts import CompareDir
from kanlm.compare.plan import Study
from kanlm.compare.schema import CompareConfig, PlannedArm, Trial
from kanlm.model.ffn import find_arm
from kanlm.runs import write_json, write_text

BYTES, WORDS, TOKENS, DOCUMENTS = 571_234, 60_123, 171_000, 37
WIDTHS = {"kan": 56, "kan_glu": 336, "swiglu": 341, "gelu": 512, "kan_mixed": 90}


def config(name: str = "study", **changes) -> CompareConfig:
    table = {
        "name": name,
        "base": {"model": {"hidden_size": 128}, "train": {"max_tokens": 400_000}},
        "reference": "kan",
        "seeds": [0, 1, 2],
        "arms": [{"name": arm, "ffn_type": arm} for arm in ("kan", "kan_glu", "swiglu")],
        **changes,
    }
    return CompareConfig.model_validate(table)


def planned(config: CompareConfig, matching: str, size: str, arm: str, number: int) -> PlannedArm:
    chosen = config.arm(arm)
    block = find_arm(chosen.ffn_type)
    count = 1_003_776 * 4**number + 97 * len(arm)
    return PlannedArm(
        matching=matching,
        size=size,
        arm=arm,
        family=block.family,
        ffn_type=chosen.ffn_type,
        intermediate_size=WIDTHS[chosen.ffn_type],
        model={
            "hidden_size": 128,
            "ffn_type": chosen.ffn_type,
            "intermediate_size": WIDTHS[chosen.ffn_type],
        },
        train={},
        parameters=count + 262_144,
        embedding_parameters=262_144,
        non_embedding_parameters=count,
        ffn_parameters=count - 300_000,
        coefficients=0 if block.family == "mlp" else 400,
        flops_per_token=7.7e6 * 4**number,
        mismatch=0.0012 * (len(arm) - 3) / 4,
    )


def trial(config: CompareConfig, arm: PlannedArm, seed: int) -> Trial:
    name = f"{arm.matching}-{arm.size}-{arm.arm}-seed{seed}"
    study = Study(config, 512, [arm])
    return study.trial(arm, "final", name, seed, {"learning_rate": 2e-3}, 400_000)


def eval_report(loss: float, model: str, parameters: int) -> dict:
    nll = loss * TOKENS
    return {
        "model": model,
        "dataset": "stdlib",
        "split": "held out",
        "tokens": TOKENS,
        "bytes": BYTES,
        "words": WORDS,
        "documents": DOCUMENTS,
        "nll_nats": nll,
        "loss": loss,
        "perplexity": math.exp(loss),
        "word_perplexity": math.exp(nll / WORDS),
        "bits_per_byte": nll / BYTES / math.log(2),
        "context_length": 256,
        "stride": 256,
        "parameters": parameters + 262_144,
        "non_embedding_parameters": parameters,
        "seconds": 9.1,
        "tokens_per_second": TOKENS / 9.1,
        "data_sha256": "5f" * 32,
        "dtype": "float32",
        "device": "cpu",
        "kanlm_version": "0.1.0",
        "versions": {"torch": "2.13.0"},
    }


def run_record(state: str, loss: float, parameters: int, **more) -> dict:
    return {
        "state": state,
        "step": 200,
        "total_steps": 200,
        "tokens": 400_000,
        "seconds": 52.5,
        "tokens_per_second": 7619.0,
        "peak_memory_bytes": 912_261_120,
        "final_validation": {"loss": loss, "perplexity": math.exp(loss), "tokens": TOKENS},
        "parameters": parameters + 262_144,
        "non_embedding_parameters": parameters,
        "provenance": {},
        **more,
    }


def metrics_lines(rng: np.random.Generator, final: float, seconds_per_step: float, evals: int = 8) -> str:
    rows = []
    for step in range(1, 201):
        loss = final + 4.2 * math.exp(-step / 35) + 0.9 * math.exp(-step / 130) - 0.2
        row = {"step": step, "tokens": step * 2000, "seconds": step * seconds_per_step}
        rows.append({**row, "loss": loss + rng.normal(0, 0.08), "lr": 1e-3})
        if step % (200 // evals) == 0:
            rows[-1]["validation_loss"] = loss + rng.normal(0, 0.004) if step < 200 else final
    return "".join(json.dumps(row) + "\n" for row in rows)


def functions(rng: np.random.Generator, arm: str) -> dict:
    curves, layers = [], []
    x = np.linspace(-3, 3, 61)
    for layer in range(4):
        for rank in range(3):
            y = x / (1 + np.exp(-x)) + rng.normal(0, 0.4) * np.sin(x * rng.uniform(1, 3))
            curves.append(
                {
                    "label": f"layer {layer} up_proj [{rng.integers(56)}, {rng.integers(128)}]",
                    "module": f"layer {layer} up_proj",
                    "rank": rank,
                    "x": x.tolist(),
                    "y": y.tolist(),
                    "density": np.exp(-x * x / 2).tolist(),
                    "start": (x / (1 + np.exp(-x))).tolist() if arm == "kan_glu" else None,
                }
            )
        layers.append(
            {
                "module": f"layer {layer} up_proj",
                "kind": "KANLinear",
                "functions": 7168,
                "importance": 3.2,
                "share_for_90_percent": rng.uniform(0.2, 0.5),
                "nonlinear_share": rng.uniform(0.05, 0.4),
                "outside_grid": rng.uniform(0, 0.02),
            }
        )
    return {"caption": "learned functions of the most important edges.", "curves": curves, "layers": layers}


def write(
    root: Path,
    losses: dict[tuple[str, int], float | str],
    baselines: tuple[float, float] = (2.31, 1.93),
    step_ms: dict[str, float] | None = None,
    seed: int = 7,
    sizes: dict[str, float] | None = None,
    **changes,
) -> Path:
    """A comparison where (arm, seed) reached a held-out loss, or ended as "diverged" or "crashed".

    sizes: name -> nats added to every loss at that size.
    """
    rng = np.random.default_rng(seed)
    if sizes:
        changes["sizes"] = [{"name": name} for name in sizes]
    compared = config(**changes)
    sizes = sizes or {"base": 0.0}
    directory = CompareDir(root)
    step_ms = step_ms or {"kan": 262.0, "kan_glu": 243.0, "swiglu": 236.0, "gelu": 230.0}
    arms, trials, speed = [], [], []
    for matching in compared.matching:
        for number, size in enumerate(sizes):
            for arm in compared.arms:
                arms.append(planned(compared, matching, size, arm.name, number))
                times = (step_ms[arm.name] * rng.lognormal(0, 0.02, 9) / 1000).tolist()
                speed.append(
                    {
                        "matching": matching,
                        "size": size,
                        "arm": arm.name,
                        "intermediate_size": arms[-1].intermediate_size,
                        "step_seconds": times,
                        "median_seconds": float(np.median(times)),
                        "tokens_per_second": 2000 / float(np.median(times)),
                        "low": 2000 / float(np.quantile(times, 0.75)),
                        "high": 2000 / float(np.quantile(times, 0.25)),
                    }
                )
                for s in compared.seeds:
                    if (arm.name, s) not in losses:
                        continue
                    one = trial(compared, arms[-1], s)
                    trials.append(one)
                    loss = losses[arm.name, s]
                    if not isinstance(loss, str):
                        loss += sizes[size]
                    write_run(directory, one, arms[-1], loss, rng, step_ms)
    write_json(
        directory.speed,
        {
            "rounds": 9,
            "arms": speed,
            "tokens_per_step": 2000,
            "device": "CPU",
            "threads": 2,
            "dtype": "float32",
            "compiled": False,
        },
    )
    names = ("5-gram", "xz -9")
    rows = [
        {"name": name, "what": f"what {name} makes of the text", "bits_per_byte": bits}
        for name, bits in zip(names, baselines, strict=True)
    ]
    write_json(directory.baselines, rows)
    sweep = [
        {
            "size": size,
            "arm": arm.name,
            "learning_rate": 2e-3,
            "kan_learning_rate": None,
            "on_edge": [],
            "trials": [],
        }
        for size in sizes
        for arm in compared.arms
    ]
    write_json(
        directory.plan,
        {
            "arms": [arm.model_dump(mode="json") for arm in arms],
            "sweep": changes.get("_sweep", sweep),
            "trials": [one.model_dump(mode="json") for one in trials],
        },
    )
    manifest = {
        "source": "stdlib (Python 3.11 library sources)",
        "licence": "PSF-2.0",
        "documents": 700,
        "bytes": 9_712_345,
        "words": 900_000,
        "tokens": 2_890_123,
        "sha256": "ab" * 32,
    }
    write_json(
        directory.compare,
        {
            "config": compared.model_dump(mode="json"),
            "provenance": {
                "date": "2026-11-23T22:00:00+00:00",
                "versions": {"python": "3.11.7", "kanlm": "0.1.0", "torch": "2.13.0"},
                "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
                "hardware": {
                    "cpu": "A processor",
                    "cores": 2,
                    "memory_gib": 23.4,
                    "accelerators": [],
                    "platform": "Linux",
                },
            },
            "data": {
                "train": manifest,
                "validation": {
                    **manifest,
                    "documents": DOCUMENTS,
                    "tokens": TOKENS + DOCUMENTS,
                    "bytes": BYTES,
                },
                "vocab_size": 2048,
                "block_size": 256,
            },
        },
    )
    return root


def write_run(
    directory: CompareDir, one: Trial, arm: PlannedArm, loss, rng, step_ms: dict[str, float]
) -> None:
    run = directory.run(one.name)
    if loss == "diverged":
        failure = {"failure": f"Diverged: {one.name}: loss not finite in 3 steps", "failure_kind": "diverged"}
        write_json(run.record, run_record("failed", 9.0, arm.non_embedding_parameters, **failure))
        return
    if loss == "crashed":
        write_json(run.failure, {"returncode": -9, "message": "killed", "lines": ["step 3", "killed"]})
        return
    write_json(run.record, run_record("finished", loss, arm.non_embedding_parameters))
    write_json(run.heldout, eval_report(loss, f"{run.hf}", arm.non_embedding_parameters))
    write_text(run.metrics, metrics_lines(rng, loss, step_ms[one.arm] / 1000))
    text = "    def close(self):\n        self._file = None | `x`\n        return <b>self</b>._closed\n"
    write_json(
        run.samples,
        [{"prompt": "class Reader:", "text": text}, {"prompt": "import os", "text": "\nimport re\n"}],
    )
    write_json(
        run.functions,
        functions(rng, one.arm) if arm.family == "kan" else {"caption": "", "curves": [], "layers": []},
    )
