"""Bridge to lm-evaluation-harness (`kanlm[eval]`): perplexity of a local text as one of its tasks.

With `stride = context_length` its figures equal `kanlm eval`'s: same windows, same prefix token, same words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import kanlm.model  # noqa: F401  registers the classes that serve kanlm's own folders
from kanlm.checksums import downloaded, verify
from kanlm.config import UserError
from kanlm.trust import refuse_model_code


def write_task(folder: str | Path, name: str, documents: Iterable[str]) -> Path:
    """Write NAME.jsonl and NAME.yaml, a `loglikelihood_rolling` task over `documents`; the YAML's path.

    The harness then runs it offline:
    `lm-eval run --model hf --model_args pretrained=MODEL --tasks NAME --include_path
    FOLDER`
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    with data.open("w", encoding="utf-8") as lines:
        for text in documents:
            lines.write(json.dumps({"text": text}) + "\n")
    metrics = [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
        for metric, aggregation in (
            ("word_perplexity", "weighted_perplexity"),
            ("byte_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"),
        )
    ]
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    return path


def harness_perplexity(
    model_path: str | Path,
    task: str | Path,
    *,
    context_length: int,
    batch_size: int = 8,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """word_perplexity, byte_perplexity and bits_per_byte by the harness, on a task of `write_task`."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness: not installed ({error}); pip install 'kanlm[eval]'"
        ) from None
    place = model_path if Path(model_path).exists() else downloaded(model_path) or model_path
    if not trust_remote_code:
        refuse_model_code(place)
    verify(model_path)
    task = Path(task)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(place),
            "trust_remote_code": trust_remote_code,
            "dtype": "float32",
            "max_length": context_length,
        },
        tasks=[task.stem],
        task_manager=TaskManager(include_path=str(task.parent), include_defaults=False),
        batch_size=batch_size,
        device=device,
        bootstrap_iters=0,
    )["results"][task.stem]
    return {name: results[f"{name},none"] for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")}
