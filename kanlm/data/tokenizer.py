"""Byte-level BPE that gives every UTF-8 text back exactly, as a `transformers` fast tokenizer."""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kanlm.checksums import must_be_readable
from kanlm.config import RunConfig, UserError
from kanlm.data import remote
from kanlm.data.corpus import TextStream, split_sources
from kanlm.data.text import BLOCK_CHARACTERS, Text, cut_at_words
from kanlm.runs import json_sha256, new_folder, remove_leftovers, save_tokenizer
from kanlm.trust import refuse_tokenizer_code

END_OF_TEXT = "<|endoftext|>"
"""The one special token: it opens every document (bos), ends generation (eos) and fills batches (pad)."""
SAMPLE_CHARACTERS = 50_000_000
"""A tokenizer is trained on at most this much of the training text, drawn from all of it."""
SAMPLE_PIECE = 1 << 14
_RECIPE = 2  # part of the cache key: raise it when the training below changes


def tokenizer_for(config: RunConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of `config`: that of its published cache, of `init_from` or at `tokenizer.path`, else one
    trained once on the training text.

    A trained tokenizer is kept in `data.cache_dir` under a key of the training text and the vocabulary size.
    Its vocabulary can come out smaller than asked for on a small text.
    """
    if config.data.cache_url is not None:
        return loaded_tokenizer(remote.published(config).tokenizer)
    if existing := config.init_from or config.tokenizer.path:
        return loaded_tokenizer(existing)
    key = _key(config)
    folder = Path(config.data.cache_dir) / "tokenizers" / f"bpe-{config.tokenizer.vocab_size}-{key[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "tokenizer.json").is_file():
            sample = _sample(config)
            first = next(sample, None)
            if first is None:
                raise UserError(f"data.source: {config.data.source!r} is empty: it holds no text to train on")
            tokenizer = trained_tokenizer(itertools.chain([first], sample), config.tokenizer.vocab_size)
            remove_leftovers(folder)
            with new_folder(folder) as temporary:
                save_tokenizer(tokenizer, temporary)
    return loaded_tokenizer(folder)


def trained_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's word pattern (Radford et al. 2019, section 2.2) and all 256 bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def loaded_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer in folder or hub id `path`; `UserError` where there is none or it has no eos."""
    must_be_readable(path)
    try:
        refuse_tokenizer_code(
            path, f"tokenizer.path {path}", "choose a tokenizer without code of its own, or leave it out"
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and type(error) is not Exception:
            raise  # the tokenizers library has no class of its own for a file that it cannot read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tokenizer.path: no tokenizer could be loaded from {str(path)!r}: {reason}; give a folder with "
            "tokenizer.json or a hub id that can be reached, or leave it out to train one"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer.path: {str(path)!r} has no fast tokenizer (tokenizer.json); choose another"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer.path: {str(path)!r} has no eos token, which stands between documents")
    return tokenizer


def packing_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The `tokenizers` object that encodes raw text: without truncation and padding, and with a special
    token's string in the text as ordinary tokens, so that no text can pose as a document's end."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of what decides the ids: the tokenizer without truncation and padding, and the eos id."""
    content = json.loads(packing_tokenizer(tokenizer).to_str())
    content["eos_token_id"] = tokenizer.eos_token_id
    return json_sha256(content, sort_keys=True)


def _key(config: RunConfig) -> str:
    parts: list[Any] = [[source.fingerprint, source.weight] for source in split_sources(config.data, "train")]
    parts += [config.tokenizer.vocab_size, SAMPLE_CHARACTERS, _RECIPE]
    return json_sha256(parts)


def _sample(config: RunConfig) -> Iterator[str]:
    """SAMPLE_CHARACTERS of the training text, sources in the mixture's proportions; all of a shorter text.

    Streamed text gives its beginning, as nobody knows where it ends.
    """
    sources = split_sources(config.data, "train")
    total = sum(source.weight for source in sources)
    for source in sources:
        share = int(SAMPLE_CHARACTERS * source.weight / total)
        if config.data.streaming:
            yield from beginning(TextStream(source), share)
        else:
            yield from sample(TextStream(source), share)


def beginning(texts: Iterable[Text], characters: int) -> Iterator[str]:
    """The first `characters` of `texts`."""
    for text in texts:
        for piece in (text,) if isinstance(text, str) else cut_at_words(text, BLOCK_CHARACTERS, strict=True):
            if characters <= 0:
                return
            yield piece[:characters]
            characters -= len(piece)


def sample(texts: Iterable[Text], characters: int, seed: int = 0) -> Iterator[str]:
    """`characters` of `texts` in their order: pieces of about SAMPLE_PIECE, each as likely as any other.

    One pass that holds no more than the sample: a piece is drawn a number, and those of the lowest are kept.
    Texts of fewer characters come back as they are, cut where they are long.
    """
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str]] = []  # a heap of (-draw, place, piece)
    size = number = 0
    for text in texts:
        short = isinstance(text, str) and len(text) <= SAMPLE_PIECE
        for piece in (str(text),) if short else cut_at_words(text, SAMPLE_PIECE, strict=True):
            heapq.heappush(kept, (-draw(), number, piece))
            size, number = size + len(piece), number + 1
            while size > characters and len(kept) > 1:
                size -= len(heapq.heappop(kept)[2])
    for _, _, piece in sorted(kept, key=lambda item: item[1]):
        yield piece[:characters]
