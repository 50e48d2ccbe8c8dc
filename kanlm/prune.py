"""`kanlm prune`: a trained model with fewer hidden channels, exported, and what that cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from kanlm import kernels
from kanlm.config import UserError
from kanlm.evaluation.loading import load_causal_lm
from kanlm.evaluation.perplexity import held_out_documents
from kanlm.export import code_span, export_model
from kanlm.interpret.functions import token_batch
from kanlm.interpret.pruning import checked_keep, prune_channels, without_edges
from kanlm.interpret.removal import sequence_losses
from kanlm.timing import take_turns

KEPT = (0.9, 0.8, 0.6, 0.4)


def prune(
    model_path: str | Path,
    out: str | Path,
    data: str | Path,
    *,
    keep: float = 0.8,
    what: Literal["channels", "edges"] = "channels",
    split: str | None = None,
    tokens: int = 16_384,
    trust_remote_code: bool = False,
) -> str:
    """Write the pruned model to the new folder `out`; returns what it has lost, as text.

    Half of `tokens` of the data decides what goes, the loss is measured on the other half.

    Raises:
        UserError: no model, keep outside (0, 1], data without tokens, `out` exists.
    """
    try:
        checked_keep(keep)
    except ValueError as error:
        raise UserError(str(error)) from error
    if Path(out).exists():
        raise UserError(f"{out}: exists already; delete it, or choose another folder with --out")
    model, tokenizer = load_causal_lm(model_path, trust_remote_code=trust_remote_code)
    batch = text_batch(model, tokenizer, data, split, tokens)
    fit, held = batch[::2], batch[1::2]
    try:
        if what == "edges":
            small = without_edges(model, fit, keep)
        else:
            small, _ = prune_channels(model, fit, keep)
    except ValueError as error:
        raise UserError(f"model {model_path}: {error}") from error
    before, after = (float(sequence_losses(network, held).mean()) for network in (model, small))
    numbers = [sum(parameter.numel() for parameter in network.parameters()) for network in (model, small)]
    facts = {
        "Pruned from": f"{code_span(model_path)}, {keep:.0%} of the {what} kept",
        "Loss before and after": f"{before:.4f} and {after:.4f} nats/token on {held.numel():,} tokens",
    }
    export_model(small, tokenizer, out, {"name": f"{Path(model_path).name}-{keep:g}", "training": facts})
    width = getattr(small.config, "intermediate_size", None)
    return "\n".join(
        [
            f"parameters         {numbers[0]:,} -> {numbers[1]:,}",
            f"intermediate_size  {getattr(model.config, 'intermediate_size', None)} -> {width}",
            f"loss               {before:.4f} -> {after:.4f} nats/token ({held.numel():,} tokens)",
            f"written            {out}",
        ]
    )


def text_batch(model: Any, tokenizer: Any, data: str | Path, split: str | None, tokens: int) -> Any:
    """The first `tokens` tokens of the data as [B, T].

    Raises:
        UserError: fewer than 64.
    """
    documents, name, _ = held_out_documents(data, split)
    try:
        batch = token_batch(model, tokenizer, documents, tokens, rows=4)
    except ValueError as error:
        raise UserError(f"data {name}: has no text to decide on: {error}") from error
    if batch.numel() < 64:
        raise UserError(f"data {name}: {batch.numel()} tokens are too few to decide on; give at least 64")
    return batch


def step_seconds(models: Sequence[Any], input_ids: Tensor, rounds: int = 5) -> list[float]:
    """Seconds of a forward and backward pass over tokens [B, T]: the fastest of `rounds`, taken in turns."""

    def step(model: Any) -> None:
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    steps = [partial(step, model) for model in models]
    taken = take_turns(steps, range(1 + rounds).__contains__, input_ids.device.type)
    return [min(seconds[1:]) for seconds in taken]  # the first warms up


def prune_table(
    models: Sequence[str | Path],
    data: str | Path,
    *,
    split: str | None = None,
    tokens: int = 16_384,
    seeds: Sequence[int] = (0, 1, 2),
    tune: Callable[[Any, Any], Any] | None = None,
) -> list[dict[str, Any]]:
    """For each model and share in KEPT: parameters, loss pruned by importance and at random, step time.

    A row has model, ffn_type, keep, parameters, ffn_parameters, loss, random (mean over `seeds`) and
    step_seconds (forward and backward of 2,048 tokens, the fastest of rounds in turns with the whole model).
    With `tune`, which gives a model (with its tokenizer) back fine-tuned: also tuned, and random_tuned of the
    first seed.
    """
    from kanlm.interpret.pruning import blocks

    rows = []
    for path in models:
        model: Any
        model, tokenizer = load_causal_lm(path)
        batch = text_batch(model, tokenizer, data, split, tokens)
        fit, held = batch[::2], batch[1::2]

        def loss(network: Any, held=held) -> float:
            return float(sequence_losses(network, held).mean())

        small = {1.0: model} | {keep: prune_channels(model, fit, keep)[0] for keep in KEPT}
        timed = [copy.deepcopy(network) for network in small.values()]
        for network in timed:
            kernels.select(network)  # what training steps take
        seconds = step_seconds(timed, fit[: max(1, 2048 // fit.shape[1])])
        for (keep, network), step in zip(small.items(), seconds, strict=True):
            at_random = [prune_channels(model, fit, keep, "random", seed)[0] for seed in seeds]
            row = {
                "model": str(path),
                "ffn_type": getattr(model.config, "ffn_type", model.config.model_type),
                "keep": keep,
                "parameters": sum(p.numel() for p in network.parameters()),
                "ffn_parameters": sum(
                    p.numel() for block in blocks(network).values() for p in block.parameters()
                ),
                "loss": loss(network),
                "random": sum(map(loss, at_random)) / len(at_random),
                "step_seconds": step,
            }
            if tune is not None:
                row["tuned"] = loss(tune(network, tokenizer))
                row["random_tuned"] = row["tuned"] if keep == 1 else loss(tune(at_random[0], tokenizer))
            rows.append(row)
    return rows
