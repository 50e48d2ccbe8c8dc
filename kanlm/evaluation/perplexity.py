"""Perplexity of any causal language model: every token of every document scored exactly once.

Legend: B windows, T tokens of a window, V vocabulary.

A document of n tokens t_1 .. t_n is scored apart from the others, after a prefix token P (BOS, else EOS), as
in lm-evaluation-harness' `loglikelihood_rolling`. A window is `context_length` consecutive inputs; it moves
by `stride` tokens, and only the tokens that no earlier window has scored count. With n = 7, context 4 and
stride 2:

    inputs     scored
    P 1 2 3    1 2 3 4
    2 3 4 5    5 6
    3 4 5 6    7

The last window is moved back so that it too sees a full context. `stride = context_length` (the default) is
the harness' definition and costs one pass over the text; a smaller stride gives more context and costs more.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kanlm import __version__, kernels, metrics
from kanlm.config import DataConfig, SourceConfig, UserError, load_run_config, parse_table
from kanlm.data import documents as split_documents
from kanlm.data import text_documents
from kanlm.evaluation.loading import load_causal_lm
from kanlm.runs import EvalReport, RunDir, versions

_BUFFERED_BATCHES = 32
"""Windows are sorted by length within this many batches, so that short documents are padded little."""


@dataclass(frozen=True)
class Window:
    """Inputs of one forward pass and the targets of its last positions.

    `inputs` has at most context_length ids; the last `len(targets)` positions predict `targets`.
    """

    document: int
    inputs: list[int]
    targets: list[int]
    number: int = 0
    """Of the window in the whole text."""
    share_of_bytes: float = 0.0
    """Bytes of the text that its targets stand for, on average over the document."""


def windows(
    tokens: list[int], prefix_token_id: int, context_length: int, stride: int, document: int = 0
) -> Iterator[Window]:
    """The windows of one document; their targets, in order, are `tokens`."""
    inputs = [prefix_token_id, *tokens[:-1]]
    scored = 0
    while scored < len(tokens):
        end = min(len(tokens), scored + stride if scored else context_length)
        yield Window(document, inputs[max(0, end - context_length) : end], tokens[scored:end])
        scored = end


@dataclass
class Score:
    """Sums over a text: nll_nats over `tokens` scored tokens, and the size of the original text."""

    nll_nats: float = 0.0
    tokens: int = 0
    counts: metrics.TextCounts = field(default_factory=metrics.TextCounts)
    sha256: str = ""
    seconds: float = 0.0
    document_nll: list[float] = field(default_factory=list)
    window_nll: list[float] = field(default_factory=list)
    window_tokens: list[int] = field(default_factory=list)
    document_bytes: list[int] = field(default_factory=list)
    token_losses: list[list[float]] | None = None
    """-ln p of each scored token, by windows in the order of the text; kept only when asked for."""
    scored_tokens: list[list[int]] = field(default_factory=list)
    """Their ids."""
    window_documents: list[int] = field(default_factory=list)

    def parts(self, most: int = 100) -> list[tuple[int, float]]:
        """(tokens, nll_nats) of consecutive parts of the text, whole windows each; for its sampling error."""
        cuts = [len(self.window_nll) * part // most for part in range(most + 1)]
        spans = [slice(*span) for span in itertools.pairwise(dict.fromkeys(cuts))]
        return [(sum(self.window_tokens[span]), math.fsum(self.window_nll[span])) for span in spans]


@torch.inference_mode()
def window_nll(model: nn.Module, batch: list[Window], pad_token_id: int = 0) -> Tensor:
    """[B] fp64 sums of -ln p of each window's targets."""
    return target_nll(model, batch, pad_token_id).double().sum(dim=1).cpu()


@torch.inference_mode()
def target_nll(model: nn.Module, batch: list[Window], pad_token_id: int = 0) -> Tensor:
    """[B, T] fp32 -ln p of each window's targets, which stand at its end; 0 elsewhere.

    Windows are padded on the right: under causal attention no real token sees a pad, so neither padding nor
    the other windows of the batch change the result beyond rounding. Log-probabilities are taken in fp32.
    """
    device = next(model.parameters()).device
    longest = max(len(window.inputs) for window in batch)
    inputs = torch.full((len(batch), longest), pad_token_id, dtype=torch.int64)  # [B, T]
    labels = torch.full((len(batch), longest), -100, dtype=torch.int64)  # [B, T]
    for row, window in enumerate(batch):
        length = len(window.inputs)
        inputs[row, :length] = torch.tensor(window.inputs)
        labels[row, length - len(window.targets) : length] = torch.tensor(window.targets)
    arguments: dict[str, Tensor] = {}
    if any(len(window.inputs) < longest for window in batch):
        lengths = torch.tensor([len(window.inputs) for window in batch])
        arguments["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long().to(device)  # [B, T]
    labels = labels.to(device)
    logits = model(input_ids=inputs.to(device), use_cache=False, **arguments).logits  # [B, T, V]
    return token_nll(logits, labels)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-ln p of labels [B, T] under logits [B, T, V], fp32; 0 where the label is -100."""
    # One row a token: over a transposed vocabulary the same sum takes four times as long on a CPU.
    rows = logits.float().flatten(0, 1)  # [B T, V]
    return nn.functional.cross_entropy(rows, labels.flatten(), reduction="none").view_as(labels)


def score(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    context_length: int,
    stride: int | None = None,
    batch_size: int = 8,
    prefix_token_id: int | None = None,
    progress: bool = False,
    total_bytes: int | None = None,
    keep_tokens: bool = False,
) -> Score:
    """Score every token of `documents` once (module docstring) and add up in fp64.

    `batch_size` counts full windows: shorter ones are batched to the same number of tokens. The model is left
    in eval mode. Text that spells a special token is scored as the text that it is. `total_bytes` of the text
    gives the progress bar its end; `keep_tokens` keeps the loss of each token.

    Raises:
        UserError: settings out of range, no text, or a tokenizer that loses part of it.
    """
    stride = context_length if stride is None else stride
    if context_length < 1:
        raise UserError(f"context_length: expected at least 1 token, got {context_length}")
    if not 1 <= stride <= context_length:
        raise UserError(
            f"stride: expected 1 <= stride <= context_length ({context_length}), got {stride}; "
            "a longer stride would leave tokens unscored"
        )
    if batch_size < 1:
        raise UserError(f"batch_size: expected at least 1 window, got {batch_size}")
    if prefix_token_id is None:
        prefix_token_id = prefix_token(model, tokenizer)
    model.eval()
    result = Score(token_losses=[] if keep_tokens else None)
    digest = hashlib.sha256()
    start = time.perf_counter()
    token_budget = batch_size * context_length
    bar = progress_bar(total_bytes, progress)

    def flush(buffer: list[Window]) -> None:
        for batch in _batches(buffer, token_budget):
            losses = target_nll(model, batch)  # [B, T]
            for row, (window, nll) in enumerate(zip(batch, losses.double().sum(dim=1).tolist(), strict=True)):
                result.document_nll[window.document] += nll
                result.window_nll[window.number] = nll
                result.tokens += len(window.targets)
                bar.update(window.share_of_bytes)
                if result.token_losses is not None:
                    end = len(window.inputs)
                    result.token_losses[window.number] = losses[row, end - len(window.targets) : end].tolist()

    buffer: list[Window] = []
    buffered_tokens = 0
    for index, document in enumerate(documents):
        if index:
            digest.update(b"\0")
        digest.update(document.encode("utf-8"))
        result.counts += metrics.text_counts(document)
        result.document_nll.append(0.0)
        result.document_bytes.append(len(document.encode("utf-8")))
        ids = token_ids(tokenizer, document)
        token_bytes = result.document_bytes[-1] / max(1, len(ids))
        for window in windows(ids, prefix_token_id, context_length, stride, index):
            share = token_bytes * len(window.targets)
            buffer.append(replace(window, number=len(result.window_nll), share_of_bytes=share))
            result.window_nll.append(0.0)
            result.window_tokens.append(len(window.targets))
            if result.token_losses is not None:
                result.token_losses.append([])
                result.scored_tokens.append(window.targets)
                result.window_documents.append(index)
            buffered_tokens += len(window.inputs)
        if buffered_tokens >= _BUFFERED_BATCHES * token_budget:
            flush(buffer)
            buffer, buffered_tokens = [], 0
    flush(buffer)
    bar.close()
    if not result.tokens:
        raise UserError("data: the held-out text is empty; there is no token to score")
    result.nll_nats = math.fsum(result.document_nll)
    result.seconds = time.perf_counter() - start
    result.sha256 = digest.hexdigest()
    return result


def _batches(buffer: list[Window], token_budget: int) -> Iterator[list[Window]]:
    """Windows sorted by length, longest first, cut where rows x longest row would exceed the budget."""
    batch: list[Window] = []
    for window in sorted(buffer, key=lambda window: len(window.inputs), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].inputs) > token_budget:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def progress_bar(total_bytes: int | None, shown: bool) -> tqdm:
    """Bytes done and time left, on standard error; where that is no terminal, every half minute at most."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total_bytes,
        unit="B",
        unit_scale=True,
        desc="evaluating",
        disable=not shown,
        mininterval=0.5 if terminal else 30,
        delay=0 if terminal else 10,
        leave=not terminal,
    )


def token_ids(tokenizer: Any, document: str) -> list[int]:
    """Ids of the text alone: no special token is added, and none is read out of the text.

    Raises:
        UserError: the ids do not give the text back; what is lost would not be scored.
    """
    ids = tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    decode = getattr(tokenizer, "decode", None)
    back = document if decode is None else decode(ids, clean_up_tokenization_spaces=False)
    if back != document and back != document.removeprefix(" "):  # some tokenizers add a space and take one
        place = next((i for i, (a, b) in enumerate(zip(document, back, strict=False)) if a != b), len(back))
        raise UserError(
            f"tokenizer: loses text: {document[place : place + 20]!r} comes back as "
            f"{back[place : place + 20]!r}; its losses cover less than the text, so bits per byte and "
            "perplexity would be too good; use a model with a lossless tokenizer"
        )
    return ids


def prefix_token(model: nn.Module, tokenizer: Any) -> int:
    """The id put before each document: the tokenizer's BOS, else its EOS, else those of the config."""
    config = getattr(model, "config", None)
    for holder in (tokenizer, config):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(holder, name, None)
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None:
                return value
    raise UserError(
        "prefix_token_id: neither the tokenizer nor the model's config has a BOS or EOS token, so a "
        "document's first token has no context; name the id to put before each document"
    )


def max_context_length(model: nn.Module) -> int:
    """Positions that the model's config declares."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    raise UserError("context_length: the model's config declares no number of positions; give context_length")


def parameter_numbers(model: Any) -> tuple[int, int]:
    """(all, non-embedding) parameters; the second leaves out input and output embeddings, tied or not."""
    embeddings = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None and getattr(module, "weight", None) is not None
    }
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.parameters() if id(p) not in embeddings)


def evaluate(
    model_path: str | Path,
    documents: Iterable[str],
    dataset: str,
    split: str,
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    *,
    dtype: str = "float32",
    device: str | None = None,
    prefix_token_id: int | None = None,
    words: int | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> EvalReport:
    """The perplexity report of a causal LM (folder or hub id) on `documents`.

    context_length: inputs of a window, default the model's positions. stride: default context_length.
    words: the corpus' published word count where it is not the white-space count (WikiText-2 test: 245,569).
    """
    model, tokenizer = load_fast(model_path, dtype, device, trust_remote_code)
    return evaluate_model(
        model,
        tokenizer,
        documents,
        name=str(model_path),
        dataset=dataset,
        split=split,
        context_length=context_length,
        stride=stride,
        batch_size=batch_size,
        prefix_token_id=prefix_token_id,
        words=words,
        progress=progress,
    )


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    name: str,
    dataset: str,
    split: str,
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    prefix_token_id: int | None = None,
    words: int | None = None,
    progress: bool = False,
    total_bytes: int | None = None,
) -> EvalReport:
    """`evaluate` of a model that is loaded already; the other arguments are those of `score`."""
    if words is not None and words < 1:
        raise UserError(f"words: expected at least 1, got {words}")
    context_length = usable_context(model, context_length, name)
    result = score(
        model,
        tokenizer,
        documents,
        context_length=context_length,
        stride=stride,
        batch_size=batch_size,
        prefix_token_id=prefix_token_id,
        progress=progress,
        total_bytes=total_bytes,
    )
    return report_of(
        model,
        result,
        name,
        dataset,
        split,
        context_length,
        context_length if stride is None else stride,
        words,
    )


def load_fast(
    model_path: str | Path, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """`load_causal_lm`, with the fused kernels of the machine where the model is kanlm's and fp32."""
    model, tokenizer = load_causal_lm(
        model_path, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    if next(model.parameters()).dtype == torch.float32:
        kernels.select(model)
    return model, tokenizer


def usable_context(model: nn.Module, context_length: int | None, name: str) -> int:
    """`context_length`, by default the model's positions; UserError where it has fewer."""
    if context_length is None:
        return max_context_length(model)
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and context_length > positions:
        raise UserError(
            f"context_length: got {context_length}, but {name} has max_position_embeddings {positions}; "
            f"use at most {positions}"
        )
    return context_length


def report_of(
    model: nn.Module,
    result: Score,
    name: str,
    dataset: str,
    split: str,
    context_length: int,
    stride: int,
    words: int | None = None,
) -> EvalReport:
    """The report of a text's `result`."""
    words = result.counts.words if words is None else words
    total, non_embedding = parameter_numbers(model)
    parameter = next(model.parameters())
    return EvalReport(
        model=name,
        dataset=dataset,
        split=split,
        tokens=result.tokens,
        bytes=result.counts.bytes,
        words=words,
        lines=result.counts.lines,
        documents=result.counts.documents,
        nll_nats=result.nll_nats,
        **metrics.ratios(result.nll_nats, result.tokens, result.counts.bytes, words),
        parts=result.parts(),
        context_length=context_length,
        stride=stride,
        parameters=total,
        non_embedding_parameters=non_embedding,
        seconds=result.seconds,
        tokens_per_second=result.tokens / result.seconds,
        data_sha256=result.sha256,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
        kanlm_version=__version__,
        versions=versions(),
    )


def held_out_documents(
    data: str | Path,
    split: str | None = None,
    *,
    text_column: str = "text",
    document_separator: str | None = None,
    max_documents: int | None = None,
    invalid_utf8: Literal["error", "replace"] = "error",
) -> tuple[Iterator[str], str, str]:
    """(documents, name, split) of a data specification.

    A run folder or a config (.toml): its held-out split (or `train`). `stdlib`, `stories`: the part held out
    by default (or `train`). A file or data-set folder: all of it. A hub id: `split`, which must be given.
    """
    path = Path(data)
    if path.suffix == ".toml":
        settings = load_run_config(path).data
    elif RunDir(path).record.is_file():
        settings = load_run_config(RunDir(path).config).data
    elif str(data) in ("stdlib", "stories"):
        settings = DataConfig(source=str(data))
    else:
        if split is None and not path.exists() and path.suffix == "":
            raise UserError(
                f"data {data}: a hub data set needs a split, e.g. test; or no such file or folder"
            )
        table = {
            "source": str(data),
            "split": split or "train",
            "text_column": text_column,
            "document_separator": document_separator,
        }
        spec = parse_table(SourceConfig, table, "data")
        texts = text_documents(spec, max_documents=max_documents, invalid_utf8=invalid_utf8)
        return texts, str(data), split or "all"
    if split not in (None, "train", "validation"):
        raise UserError(f"split: {data} has train and validation, got {split!r}")
    part: Literal["train", "validation"] = "train" if split == "train" else "validation"
    texts = itertools.islice(split_documents(settings, part), max_documents)
    return texts, settings.validation_source or settings.source, part


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    cache: Any,
    *,
    block_size: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    cross_document_attention: bool = True,
) -> dict[str, float]:
    """The training loop's cheap check: consecutive blocks of the packed stream, EOS included, each once.

    Differs from `evaluate`: a block does not see the one before it, document ends are scored too, and the
    very first token is not. Returns loss (nats/token), perplexity, bits_per_byte (by the stream's bytes per
    token), nll_nats and tokens. Under torch.distributed every rank must call it: each scores its share of the
    batches, all run the same number of forward passes, and all return the same sums. Training mode is
    restored.
    """
    targets = len(cache) - 1 if max_tokens is None else min(len(cache) - 1, max_tokens)
    if targets < 1:
        raise UserError(f"data: the validation text has {len(cache)} tokens; at least 2 are needed")
    starts = range(0, targets, block_size)
    batches = [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, ranks = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nll, tokens
    for round_start in range(0, len(batches), ranks):
        own = round_start + rank
        counted = own < len(batches)
        batch = batches[own if counted else round_start]
        inputs, labels, position_ids = stream_blocks(
            cache, batch, block_size, targets, cross_document_attention
        )
        arguments = {} if position_ids is None else {"position_ids": position_ids.to(device)}
        logits = model(input_ids=inputs.to(device), use_cache=False, **arguments).logits  # [B, T, V]
        nll = token_nll(logits, labels.to(device))
        if counted:
            sums += torch.stack([nll.double().sum(), (labels != -100).sum().double().to(device)])
    if distributed:
        torch.distributed.all_reduce(sums)
    model.train(was_training)
    nll_nats, tokens = sums.tolist()
    bytes_per_token = cache.manifest["bytes"] / (len(cache) - 1)
    return {
        "loss": nll_nats / tokens,
        "perplexity": metrics.perplexity(nll_nats, int(tokens)),
        "bits_per_byte": nll_nats / tokens / bytes_per_token / math.log(2),
        "nll_nats": nll_nats,
        "tokens": int(tokens),
    }


def stream_blocks(
    cache: Any, starts: range, block_size: int, targets: int, cross_document_attention: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """inputs, labels, position_ids [B, T] of the blocks at `starts`; short ones are padded on the right."""
    length = min(block_size, targets - starts[0])
    inputs = torch.zeros(len(starts), length, dtype=torch.int64)
    labels = torch.full((len(starts), length), -100, dtype=torch.int64)
    for row, start in enumerate(starts):
        end = min(start + length, targets)
        block = torch.from_numpy(cache.tokens(start, end + 1))
        inputs[row, : end - start] = block[:-1]
        labels[row, : end - start] = block[1:]
    if cross_document_attention:
        return inputs, labels, None
    document_starts = torch.from_numpy(cache.document_starts.astype("int64"))
    block_starts = torch.tensor(list(starts))[:, None]
    places = block_starts + torch.arange(length)  # [B, T] places in the stream
    current = document_starts[torch.searchsorted(document_starts, places, right=True) - 1]  # [B, T]
    return inputs, labels, places - torch.maximum(current, block_starts)
