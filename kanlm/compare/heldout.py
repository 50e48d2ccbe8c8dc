"""What is known of held-out text: a run's exported folder judged as anyone would load it, and baselines."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from glob import has_magic
from pathlib import Path
from typing import Any

from kanlm.compare.plan import Study
from kanlm.compare.schema import EvaluationConfig, Trial
from kanlm.config import SourceConfig
from kanlm.data import documents, text_documents
from kanlm.evaluation.baselines import kneser_ney_by_order, xz_bits_per_byte
from kanlm.evaluation.generation import Sampling, sample_rows
from kanlm.evaluation.loading import load_causal_lm
from kanlm.evaluation.perplexity import evaluate_model
from kanlm.export import export, update_card
from kanlm.interpret.functions import learned_functions
from kanlm.runs import write_json


def held_out_documents(study: Study) -> Iterator[str]:
    settings = study.config.evaluation
    found = text_documents(settings.source) if settings.source else documents(study.base.data, "validation")
    return itertools.islice(found, settings.max_documents)


def split_of(source: SourceConfig) -> str:
    """The split that a report names: all of a file, whose only split the library calls train."""
    files = Path(source.source).expanduser().is_file() or has_magic(source.source)
    return "all" if files and source.split == "train" else source.split


def judge_run(study: Study, trial: Trial, say: Callable[[str], None]) -> None:
    """Export the finished run of `trial`; loss, samples and functions of the exported folder."""
    settings, run, base = study.config.evaluation, study.directory.run(trial.name), study.base
    if all(path.is_file() for path in (run.heldout, run.samples, run.functions)):
        return
    if run.hf.is_dir():
        shutil.rmtree(run.hf)
    export(run.root)
    model, tokenizer = load_causal_lm(run.hf)
    texts = list(held_out_documents(study))
    source = settings.source
    result = evaluate_model(
        model,
        tokenizer,
        texts,
        name=str(run.hf),
        dataset=source.source if source else base.data.validation_source or base.data.source,
        split=split_of(source) if source else "held out",
        context_length=settings.context_length or base.data.block_size,
        stride=settings.stride,
        batch_size=settings.batch_size,
    )
    functions = learned_functions(model, tokenizer, texts, settings.functions_per_module)
    continued = samples(model, tokenizer, texts, settings, trial.seed)
    write_json(run.functions, functions)
    write_json(run.samples, continued)
    update_card(run.hf, [result])
    write_json(run.heldout, result)
    say(
        f"  {trial.arm} seed {trial.seed}: {result.bits_per_byte:.4f} bits per byte, perplexity "
        f"{result.perplexity:.2f} on {result.tokens:,} held-out tokens"
    )


def samples(
    model: Any, tokenizer: Any, texts: list[str], settings: EvaluationConfig, seed: int
) -> list[dict[str, str]]:
    """Continuations of `settings.prompts`, or of the first words of two held-out documents."""
    if not settings.sample_tokens:
        return []
    prompts = settings.prompts or [
        text[:60].rsplit(None, 1)[0] for text in texts[:: max(1, len(texts) // 2)][:2]
    ]
    found = []
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        positions = model.config.max_position_embeddings
        length = min(settings.sample_tokens, positions - 1)
        if ids.shape[1] > positions - length:
            ids = ids[:, : positions - length]
            prompt = tokenizer.decode(ids[0])
        sampling = Sampling(max_new_tokens=length, temperature=settings.temperature, top_k=settings.top_k)
        output = sample_rows(model, tokenizer, ids, seed + number, **sampling.arguments())
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        found.append({"prompt": prompt, "text": text})
    return found


def ensure_baselines(study: Study) -> None:
    """baselines.json: what needs no neural network, trained on the same text, on the same held-out text."""
    settings, data = study.config.evaluation, study.base.data
    if study.directory.baselines.is_file():
        return
    rows: list[dict[str, Any]] = []
    if settings.baselines and data.streaming and data.max_documents is None:
        print("baselines: none; they would read the whole of a streamed text (data.max_documents bounds it)")
    elif settings.baselines:
        print("baselines: Kneser-Ney n-grams and xz -9 on the same text", flush=True)
        training, held_out = list(documents(study.base.data, "train")), list(held_out_documents(study))
        by_order = kneser_ney_by_order(training, held_out)
        best = min(by_order, key=by_order.__getitem__)
        rows = [
            {
                "name": f"{best}-gram",
                "what": f"Kneser-Ney over bytes, the best of orders {min(by_order)} to {max(by_order)}, "
                "counts of the training text",
                "bits_per_byte": by_order[best],
                "orders": by_order,
            },
            {
                "name": "xz -9",
                "what": "what the held-out text adds to the compressed training text",
                "bits_per_byte": xz_bits_per_byte(training, held_out),
            },
        ]
    write_json(study.directory.baselines, rows)
