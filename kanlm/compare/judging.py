"""A finished run is exported and judged as anyone would load it: loss, samples of its text, functions."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kanlm.compare.artifacts import TrialDir
from kanlm.compare.schema import CompareConfig, Trial
from kanlm.config import RunConfig
from kanlm.data import documents, text_documents
from kanlm.evaluation.loading import load_causal_lm
from kanlm.evaluation.perplexity import evaluate_model
from kanlm.export import export, update_card
from kanlm.interpret.functions import learned_functions
from kanlm.runs import write_json


def held_out_documents(config: CompareConfig, base: RunConfig) -> Iterator[str]:
    source = config.evaluation.source
    found = text_documents(source) if source else documents(base, "validation")
    return itertools.islice(found, config.evaluation.max_documents)


def judge_run(
    config: CompareConfig, run: TrialDir, base: RunConfig, trial: Trial, say: Callable[[str], None]
) -> None:
    """Export the run, then judge the exported folder as anyone would load it: loss, samples, functions."""
    settings = config.evaluation
    if all(path.is_file() for path in (run.heldout, run.samples, run.functions)):
        return
    if run.hf.is_dir():
        shutil.rmtree(run.hf)
    export(run.root)
    model, tokenizer = load_causal_lm(run.hf)
    texts = list(held_out_documents(config, base))
    source = settings.source
    result = evaluate_model(
        model,
        tokenizer,
        texts,
        name=str(run.hf),
        dataset=source.source if source else base.data.validation_source or base.data.source,
        split=source.split if source else "held out",
        context_length=settings.context_length or base.data.block_size,
        stride=settings.stride,
        batch_size=settings.batch_size,
    )
    write_json(run.functions, learned_functions(model, tokenizer, texts, settings.functions_per_module))
    write_json(run.samples, samples(model, tokenizer, texts, settings, trial.seed))
    update_card(run.hf, [result])
    write_json(run.heldout, result)
    say(
        f"  {trial.arm} seed {trial.seed}: {result.bits_per_byte:.4f} bits per byte, perplexity "
        f"{result.perplexity:.2f} on {result.tokens:,} held-out tokens"
    )


def samples(model: Any, tokenizer: Any, texts: list[str], settings: Any, seed: int) -> list[dict[str, str]]:
    """Continuations of `settings.prompts`, or of the first words of two held-out documents."""
    if not settings.sample_tokens:
        return []
    prompts = settings.prompts or [
        text[:60].rsplit(None, 1)[0] for text in texts[:: max(1, len(texts) // 2)][:2]
    ]
    found = []
    sampling = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k}
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        positions = model.config.max_position_embeddings
        length = min(settings.sample_tokens, positions - 1)
        if ids.shape[1] > positions - length:
            ids = ids[:, : positions - length]
            prompt = tokenizer.decode(ids[0])
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed + number)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
                **sampling,
            )
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        found.append({"prompt": prompt, "text": text})
    return found
