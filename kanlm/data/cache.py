"""Packed token ids on disk: built once, memory-mapped ever after.

    CACHE_DIR/tokens/SPLIT-KEY/
      manifest.json       what the ids are of, counts, hashes, shards; present only in a finished cache
      shard-00000.bin     uint16 ids (uint32 for vocabularies over 65,536); a shard ends where a document ends
      documents.bin       uint64 position of every document's first id, which is EOS (kanlm.data.packing)

KEY covers the tokenizer and all that decides the text, so a cache is never reused for other data. A build
goes on in SPLIT-KEY.partial/, which is renamed when it is whole; stopped at any moment it resumes after the
last whole shard. A file lock lets one process build while others wait.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from kanlm.config import RunConfig, UserError
from kanlm.data.corpus import Source, Split, TextStream, split_sources
from kanlm.data.packing import Packed, Packer
from kanlm.data.sources import Unreachable
from kanlm.data.tokenizer import tokenizer_hash
from kanlm.metrics import TextCounts
from kanlm.runs import fsync_folder, fsync_one, json_sha256, read_json, remove_leftovers, write_json

logger = logging.getLogger(__name__)

FORMAT = 1
"""Part of the key: raise it when the same text would give other files."""
SHARD_TOKENS = 1 << 25


class TokenCache:
    """Token ids of one split, memory-mapped; `manifest` says what they are."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        dtype = np.dtype(self.manifest["dtype"])
        self._shards = [
            np.memmap(
                _checked(self.folder / shard["file"], shard["tokens"] * dtype.itemsize), dtype, mode="r"
            )
            for shard in self.manifest["shards"]
        ]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        starts = _checked(self.folder / "documents.bin", self.manifest["documents"] * 8)
        self.document_starts = np.memmap(starts, np.uint64, mode="r")
        """[documents] position of every document's EOS."""

    def __len__(self) -> int:
        """Tokens, with one EOS for each document."""
        return self.manifest["tokens"]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64 ids [start, stop), across shards."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        found = np.empty(stop - start, dtype=np.int64)
        done = start
        while done < stop:
            shard = int(np.searchsorted(self._ends, done, side="right"))
            offset = done - (self._ends[shard] - len(self._shards[shard]))
            part = self._shards[shard][offset : offset + stop - done]
            found[done - start : done - start + len(part)] = part
            done += len(part)
        return found


def token_cache(config: RunConfig, tokenizer: PreTrainedTokenizerFast, split: Split) -> TokenCache:
    """The packed tokens of `split`, source after source; built where there is no cache of them."""
    return cached(split_sources(config, split), config, tokenizer, split)


def train_caches(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[TokenCache, ...]:
    """One cache for each source of the training mixture."""
    return tuple(cached((source,), config, tokenizer, "train") for source in split_sources(config, "train"))


def cached(
    sources: tuple[Source, ...],
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    split: Split,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenCache:
    """The cache of `sources`, built or resumed under its lock where it is not whole.

    `UserError` for text that cannot be packed; then, and on a full disk, nothing half-built stays, while an
    `Unreachable` source leaves what was packed of it.
    """
    identity = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "source_fingerprints": [source.fingerprint for source in sources],
    }
    key = json_sha256(identity)
    folder = Path(config.data.cache_dir) / "tokens" / f"{split}-{key[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            manifest: dict[str, Any] = identity | {
                "split": split,
                "source": ", ".join(source.name for source in sources),
                "licence": ", ".join(dict.fromkeys(source.reader.licence for source in sources)),
            }
            known = [(source, source.known_bits) for source in sources if source.known_bits is not None]
            if len(known) == len(sources):
                manifest["known_bits"] = sum(
                    known_bits(text) for source, known_bits in known for text in TextStream(source)
                )
            partial = folder.with_name(f"{folder.name}.partial")
            try:
                build = _Build(partial, Packer(tokenizer), shard_tokens)
                texts = itertools.chain.from_iterable(TextStream(source) for source in sources)
                build.run(texts, config.data.num_workers, manifest)
            except Unreachable:
                raise
            except UserError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                shutil.rmtree(partial, ignore_errors=True)
                raise UserError(
                    f"data.cache_dir: no space left for the token cache in {folder.parent}; free some, set "
                    "data.cache_dir to another disk, or set data.streaming=true"
                ) from None
            os.rename(partial, folder)
            fsync_one(folder.parent)
            (folder / "progress.json").unlink()  # last, so that a kill loses no shard
    cache = TokenCache(folder)
    found = {name: cache.manifest.get(name) for name in identity}
    if found != identity:
        different = ", ".join(name for name in identity if found[name] != identity[name])
        raise UserError(f"{folder}/manifest.json: made of other data ({different} differs); delete {folder}")
    return cache


class _Build:
    """A cache in the making. progress.json names the whole shards and what has been read up to their end."""

    def __init__(self, folder: Path, pack: Packer, shard_tokens: int):
        self.folder, self.pack, self.shard_tokens = folder, pack, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.counts = TextCounts()
        self.sha256 = hashlib.sha256()
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder / "progress.json", folder / "manifest.json")
        if (folder / "progress.json").is_file():
            progress = read_json(folder / "progress.json")
            self.counts = TextCounts(**progress["counts"])
            self.shards = progress["shards"]
            for shard in self.shards:
                content = (folder / shard["file"]).read_bytes()
                if hashlib.sha256(content).hexdigest() != shard["sha256"]:
                    raise UserError(f"{folder / shard['file']}: damaged (sha256 differs); delete {folder}")
                self.sha256.update(content)
        with open(folder / "documents.bin", "ab") as file:
            file.truncate(self.counts.documents * 8)

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    def run(self, texts: Iterator[str], num_workers: int, manifest: dict[str, Any]) -> None:
        """Pack what is left of `texts` and write the manifest."""
        done = self.counts
        if done.documents:
            logger.info("%s: resuming after %s documents", self.folder, f"{done.documents:,}")
        rest = itertools.islice(texts, done.documents, None)
        description = f"packing {manifest['split']} text"
        with tqdm(desc=description, unit="B", unit_scale=True, initial=done.bytes, disable=None) as bar:
            buffer: list[Packed] = []
            for packed in self.pack.packed(rest, num_workers):
                buffer.append(packed)
                bar.update(packed.counts.bytes)
                if sum(len(part.ids) for part in buffer) >= self.shard_tokens:
                    self._write_shard(buffer)
                    buffer = []
            if buffer:
                self._write_shard(buffer)
        if not self.counts.documents:
            raise UserError(_no_text(manifest))
        counts = self.counts
        write_json(
            self.folder / "manifest.json",
            manifest
            | {
                "dtype": self.pack.dtype.name,
                "tokens": self.tokens,
                "text_tokens": self.tokens - counts.documents,
                "bytes": counts.bytes,
                "words": counts.words,
                "documents": counts.documents,
                "sha256": self.sha256.hexdigest(),
                "shards": self.shards,
            },
        )
        fsync_folder(self.folder)
        logger.info(
            "packed %s: %s documents, %s bytes, %s tokens, sha256 %s",
            manifest["split"],
            f"{counts.documents:,}",
            f"{counts.bytes:,}",
            f"{self.tokens:,}",
            self.sha256.hexdigest()[:16],
        )

    def _write_shard(self, buffer: list[Packed]) -> None:
        name = f"shard-{len(self.shards):05d}.bin"
        lengths = np.concatenate([packed.lengths for packed in buffer])
        starts = self.tokens + np.cumsum(lengths) - lengths
        content = b"".join(packed.ids.tobytes() for packed in buffer)
        (self.folder / name).write_bytes(content)
        with open(self.folder / "documents.bin", "ab") as file:
            file.write(starts.astype(np.uint64).tobytes())
        fsync_folder(self.folder)
        self.sha256.update(content)
        digest = hashlib.sha256(content).hexdigest()
        self.shards.append({"file": name, "tokens": int(lengths.sum()), "sha256": digest})
        self.counts = sum((packed.counts for packed in buffer), self.counts)
        write_json(self.folder / "progress.json", {"counts": asdict(self.counts), "shards": self.shards})


def _no_text(manifest: dict[str, Any]) -> str:
    if manifest["split"] == "train":
        return f"data.source: {manifest['source']!r} is empty: it holds no text; give a source with text"
    return (
        f"data.validation_fraction: no text of {manifest['source']!r} is held out; raise it, "
        "or name data.validation_source or data.validation_split"
    )


def _checked(path: Path, expected: int) -> Path:
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise UserError(
            f"{path}: {found}, but its manifest says {expected} bytes; delete {path.parent} to build it again"
        )
    return path
