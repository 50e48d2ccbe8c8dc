"""Packed token ids on disk: built once, memory-mapped ever after.

    CACHE_DIR/tokens/SPLIT-KEY/
      manifest.json       counts, hashes, shards; written last
      shard-00000.bin     uint16 (uint32 for vocabularies over 65,536) ids
      documents.bin       uint64 position of every document's first id

A document is stored as the eos id followed by its own ids, so the stream reads EOS a EOS b EOS c: the first
token of a document is predicted from EOS alone or from EOS and earlier documents, and EOS is predicted at
the end of the document before it. A shard ends where a document ends.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from kanlm.config import RunConfig, UserError
from kanlm.data.corpus import Source, Split, split_texts, training_sources, validation_sources
from kanlm.data.tokenizer import packing_tokenizer, tokenizer_hash
from kanlm.metrics import TextCounts, text_counts
from kanlm.runs import new_folder, read_json, write_json

FORMAT = 1
SHARD_TOKENS = 1 << 25
BATCH_DOCUMENTS = 256


class TokenCache:
    """Token ids of one split in `folder`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        dtype = np.dtype(self.manifest["dtype"])
        self._shards, self._ends = [], []
        end = 0
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.exists() else 0
            if size != shard["tokens"] * dtype.itemsize:
                raise UserError(
                    f"{path}: expected {shard['tokens'] * dtype.itemsize} bytes as its manifest says, found {size}; "
                    f"delete {self.folder} to build it again"
                )
            self._shards.append(np.memmap(path, dtype=dtype, mode="r"))
            end += shard["tokens"]
            self._ends.append(end)
        self.document_starts = np.fromfile(self.folder / "documents.bin", dtype=np.uint64).astype(np.int64)

    def __len__(self) -> int:
        return self.manifest["tokens"]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """ids [start, stop) as int64, across shards."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        pieces = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = self._ends[shard] - len(self._shards[shard])
            piece = self._shards[shard][start - begin : stop - begin]
            pieces.append(piece)
            start += len(piece)
            shard += 1
        return np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, dtype=np.int64)


def token_cache(config: RunConfig, tokenizer: PreTrainedTokenizerFast, split: Split) -> TokenCache:
    """The packed tokens of `split`, built where `data.cache_dir` does not hold them yet."""
    sources = training_sources(config) if split == "train" else validation_sources(config)
    return cached(sources, tokenizer, split, config)


def train_caches(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[TokenCache, ...]:
    """One cache for each source of the training mixture."""
    return tuple(cached((source,), tokenizer, "train", config) for source in training_sources(config))


def cached(
    sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerFast, split: Split, config: RunConfig
) -> TokenCache:
    identity = {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(tokenizer),
        "sources": [source.fingerprint for source in sources],
    }
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = Path(config.data.cache_dir) / "tokens" / f"{split}-{key[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "manifest.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            with new_folder(folder) as temporary:
                manifest = identity | {
                    "split": split,
                    "source": ", ".join(source.name for source in sources),
                    "licence": ", ".join(sorted({source.licence for source in sources})),
                }
                texts = itertools.chain.from_iterable(split_texts(source) for source in sources)
                _build(temporary, texts, tokenizer, manifest)
    return TokenCache(folder)


def _build(
    folder: Path, texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, manifest: dict[str, Any]
) -> None:
    backend = packing_tokenizer(tokenizer)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    eos = tokenizer.eos_token_id
    pieces, starts, position = [], [], 0
    counts = TextCounts()
    while batch := list(itertools.islice(texts, BATCH_DOCUMENTS)):
        for text, encoding in zip(
            batch, backend.encode_batch_fast(batch, add_special_tokens=False), strict=True
        ):
            starts.append(position)
            ids = encoding.ids
            pieces.append(np.array([eos, *ids], dtype=dtype))
            position += len(ids) + 1
            counts += text_counts(text)
    if not position:
        raise UserError(f"data.source: {manifest['source']} holds no text for {manifest['split']}")
    ids = np.concatenate(pieces)
    ids.tofile(folder / "shard-00000.bin")
    np.array(starts, dtype=np.uint64).tofile(folder / "documents.bin")
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    manifest |= {
        "dtype": dtype.name,
        "eos_token_id": eos,
        "tokens": position,
        "documents": counts.documents,
        "bytes": counts.bytes,
        "words": counts.words,
        "sha256": digest,
        "shards": [{"file": "shard-00000.bin", "tokens": position, "sha256": digest}],
    }
    write_json(folder / "manifest.json", manifest)
