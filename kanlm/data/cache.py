"""Packed token ids on disk: built once, memory-mapped ever after.

    CACHE_DIR/tokens/SPLIT-KEY/
      manifest.json       what the ids are of, counts, hashes, shards; present only in a finished cache
      shard-00000.bin     uint16 ids (uint32 for vocabularies over 65,536) of about SHARD_CHARACTERS of text
      documents.bin       uint64 position of every document's first id, which is EOS (kanlm.data.packing)

KEY covers the tokenizer and all that decides the text, so a cache is never reused for other data. A build
goes on in SPLIT-KEY.partial/, where shard-00000.json and .starts say what shard-00000.bin holds; it is
renamed when it is whole. Which text a shard holds depends on the text alone, so a build that was stopped
goes on after its whole shards, and several machines can write a share of the shards each. A file lock lets
one process build while others wait; builders of shares write without it, as every shard appears in one
rename.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from kanlm.config import RunConfig, UserError
from kanlm.data import remote
from kanlm.data.corpus import Source, Split, TextStream, split_sources
from kanlm.data.packing import Fragment, Packed, Packer
from kanlm.data.sources import Unreachable
from kanlm.data.tokenizer import tokenizer_hash
from kanlm.metrics import TextCounts
from kanlm.runs import file_sha256, fsync_folder, fsync_one, json_sha256, named_errors, read_json, write_json

logger = logging.getLogger(__name__)

FORMAT = 1
"""Part of the key: raise it when the same text would give other files."""
VERIFIED_BYTES = 256 << 20
"""A cache of at most so many bytes is compared with its sha256 each time it is opened."""
SHARD_CHARACTERS = 1 << 25
"""About 8 million tokens, 16 MB; what a build that is killed loses at most."""


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
        if sum(part.nbytes for part in (*self._shards, self.document_starts)) <= VERIFIED_BYTES:
            self._verify()

    def _verify(self) -> None:
        expected = {shard["file"]: shard["sha256"] for shard in self.manifest["shards"]}
        if "documents_sha256" in self.manifest:  # older caches lack it
            expected["documents.bin"] = self.manifest["documents_sha256"]
        for name, digest in expected.items():
            if file_sha256(path := self.folder / name) != digest:
                raise UserError(
                    f"{path}: damaged (sha256 differs from manifest.json); delete {self.folder} to build "
                    "it again"
                )

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
    if config.data.cache_url is not None:
        (folder,) = remote.published(config).folders(split)
        return _published_cache(folder, tokenizer)
    return ensure_cache(split_sources(config.data, split), config, tokenizer, split)


def train_caches(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[TokenCache, ...]:
    """One cache for each source of the training mixture."""
    if config.data.cache_url is not None:
        return tuple(
            _published_cache(folder, tokenizer) for folder in remote.published(config).folders("train")
        )
    return tuple(
        ensure_cache((source,), config, tokenizer, "train") for source in split_sources(config.data, "train")
    )


def ensure_cache(
    sources: tuple[Source, ...],
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    split: Split,
    shard_characters: int | None = None,
) -> TokenCache:
    """The cache of `sources`, built or resumed under its lock where it is not whole.

    `UserError` for text that cannot be packed; then, and on a full disk, nothing half-built stays, while an
    `Unreachable` source leaves what was packed of it.
    """
    identity = _identity(sources, tokenizer)
    folder = _folder(config, split, identity)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), _told_of_lost_workers():
        if not folder.is_dir():
            build = _Build(folder, sources, tokenizer, identity, split, shard_characters)
            try:
                build.run(config.data.num_workers)
                build.finish()
            except Unreachable:
                raise
            except UserError:
                shutil.rmtree(build.partial, ignore_errors=True)
                raise
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                shutil.rmtree(build.partial, ignore_errors=True)
                raise _no_space(folder) from None
    return _checked_cache(folder, identity)


def pack_share(
    sources: tuple[Source, ...],
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    split: Split,
    share: tuple[int, int],
    shard_characters: int | None = None,
) -> TokenCache | int:
    """Pack share number i of n, `share` = (i, n) with i from 0, of a cache's shards; others pack the rest.

    The cache where it is whole now, else how many shards others still have to write. What is written stays.
    """
    identity = _identity(sources, tokenizer)
    folder = _folder(config, split, identity)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        build = _Build(folder, sources, tokenizer, identity, split, shard_characters)
        try:
            with _told_of_lost_workers():
                number = build.run(config.data.num_workers, share)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    if missing := number - len(build.written()):
                        return missing
                    build.finish()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and folder.is_dir():
                pass  # somebody else with the same share has finished the cache in between
            elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _no_space(folder) from None
            else:
                raise
    return _checked_cache(folder, identity)


@contextmanager
def _told_of_lost_workers() -> Iterator[None]:
    """A process that tokenises and is killed from outside, as UserError; what was packed stays."""
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            "data.num_workers: a process that tokenises was killed, most likely for want of memory; run the "
            "same command again with fewer"
        ) from None


def _identity(sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "source_fingerprints": [source.fingerprint for source in sources],
    }


def _folder(config: RunConfig, split: Split, identity: dict[str, Any]) -> Path:
    return Path(config.data.cache_dir) / "tokens" / f"{split}-{json_sha256(identity)[:16]}"


def _checked_cache(folder: Path, identity: dict[str, Any]) -> TokenCache:
    cache = TokenCache(folder)
    found = {name: cache.manifest.get(name) for name in identity}
    if found != identity:
        different = ", ".join(name for name in identity if found[name] != identity[name])
        raise UserError(f"{folder}/manifest.json: made of other data ({different} differs); delete {folder}")
    return cache


def _published_cache(folder: Path, tokenizer: PreTrainedTokenizerFast) -> TokenCache:
    cache = TokenCache(folder)
    if cache.manifest["tokenizer_sha256"] != tokenizer_hash(tokenizer):
        raise UserError(f"{folder}/manifest.json: made with another tokenizer; delete {folder}")
    return cache


def _no_space(folder: Path) -> UserError:
    return UserError(
        f"data.cache_dir: no space left for the token cache in {folder.parent}; free some, set "
        "data.cache_dir to another disk, or set data.streaming=true"
    )


class _Build:
    """A cache in the making in FOLDER.partial."""

    def __init__(
        self,
        folder: Path,
        sources: tuple[Source, ...],
        tokenizer: PreTrainedTokenizerFast,
        identity: dict[str, Any],
        split: Split,
        shard_characters: int | None,
    ):
        self.folder, self.sources, self.identity, self.split = folder, sources, identity, split
        self.partial = folder.with_name(f"{folder.name}.partial")
        self.packer, self.key = Packer(tokenizer), json_sha256(identity)
        self.shard_characters = shard_characters or SHARD_CHARACTERS

    def written(self) -> list[Path]:
        """The records of whole shards, in order."""
        return sorted(self.partial.glob("shard-*.json"))

    def run(self, num_workers: int, share: tuple[int, int] = (0, 1)) -> int:
        """Pack those of the share's shards that are not there yet; how many shards there are in all."""
        self.partial.mkdir(exist_ok=True)
        there = {path.stem for path in self.written()}
        if there:
            logger.info("%s: going on, %s shards are written", self.partial, len(there))
        coming: deque[str] = deque()
        seen = 0

        def wanted() -> Iterator[Fragment]:
            nonlocal seen
            for number, name, fragments in self._shards():
                seen = number + 1
                if number % share[1] == share[0] and name not in there:
                    coming.append(name)
                    yield from fragments
                else:
                    for _ in fragments:  # read, so that the next shard begins at its place
                        pass

        with _Meter(self.split) as meter:
            shard: _Shard | None = None
            try:
                for packed in self.packer.pack(wanted(), num_workers):
                    shard = shard or _Shard(self.partial, coming.popleft(), self.key)
                    shard.add(packed)
                    meter.add(packed)
                    if packed.ends_shard:
                        shard.keep()
                        shard = None
            finally:
                if shard is not None:
                    shard.file.close()
        if not seen:
            source = ", ".join(source.name for source in self.sources)
            raise UserError(_no_text(self.split, source))
        return seen

    def _shards(self) -> Iterator[tuple[int, str, Iterator[Fragment]]]:
        """Number, name and fragments of every shard; the fragments are to be read to the end."""
        texts = itertools.chain.from_iterable(TextStream(source) for source in self.sources)
        fragments = self.packer.fragments(texts)
        first = next(fragments, None)
        number = 0

        def of_shard() -> Iterator[Fragment]:
            nonlocal first
            size = 0
            while first is not None:
                fragment, first = first, next(fragments, None)
                size += len(fragment.text)
                ends = first is None or size >= self.shard_characters
                yield replace(fragment, ends_shard=ends)
                if ends:
                    return

        while first is not None:
            yield number, f"shard-{number:05d}", of_shard()
            number += 1

    def finish(self) -> None:
        """Check the shards, write the manifest, and rename the folder: all shards are there."""
        manifest: dict[str, Any] = self.identity | {
            "split": self.split,
            "source": ", ".join(source.name for source in self.sources),
            "licence": ", ".join(dict.fromkeys(source.reader.licence for source in self.sources)),
        }
        known = [(source, source.known_bits) for source in self.sources if source.known_bits is not None]
        if len(known) == len(self.sources):
            manifest["known_bits"] = sum(
                known_bits(str(text)) for source, known_bits in known for text in TextStream(source)
            )
        digest, counts, tokens, shards = hashlib.sha256(), TextCounts(), 0, []
        with open(self.partial / "documents.bin", "wb") as documents:
            for path in self.written():
                record = self._checked_shard(path, digest)
                documents.write((np.fromfile(path.with_suffix(".starts"), np.uint64) + tokens).tobytes())
                tokens += record["tokens"]
                counts += TextCounts(**record["counts"])
                shards.append({name: record[name] for name in ("file", "tokens", "sha256")})
        write_json(
            self.partial / "manifest.json",
            manifest
            | {
                "dtype": self.packer.dtype.name,
                "tokens": tokens,
                "text_tokens": tokens - counts.documents,
                "bytes": counts.bytes,
                "words": counts.words,
                "documents": counts.documents,
                "sha256": digest.hexdigest(),
                "documents_sha256": file_sha256(self.partial / "documents.bin"),
                "shards": shards,
            },
        )
        self._remove_strays(shards)
        fsync_folder(self.partial)
        os.rename(self.partial, self.folder)
        fsync_one(self.folder.parent)
        for path in self.folder.glob("shard-*"):  # last, so that a kill loses no shard
            if path.suffix in (".json", ".starts"):
                path.unlink()
        logger.info(
            "packed %s: %s documents, %s bytes, %s tokens, sha256 %s",
            self.split,
            f"{counts.documents:,}",
            f"{counts.bytes:,}",
            f"{tokens:,}",
            digest.hexdigest()[:16],
        )

    def _remove_strays(self, shards: list[dict[str, Any]]) -> None:
        """What killed builders left behind."""
        names = {Path(shard["file"]).stem for shard in shards} | {"manifest", "documents"}
        for path in self.partial.iterdir():
            if path.stem not in names:
                path.unlink()

    def _checked_shard(self, path: Path, digest: Any) -> dict[str, Any]:
        """The record at `path` of a shard that is as it was written; its ids are added to `digest`."""
        record = read_json(path)
        shard = path.with_suffix(".bin")
        found = hashlib.sha256()
        starts = path.with_suffix(".starts")
        if record.get("key") != self.key:
            raise UserError(f"{path}: of another tokenizer or other text; delete {self.partial}")
        if not shard.is_file() or shard.stat().st_size != record["tokens"] * self.packer.dtype.itemsize:
            raise UserError(f"{shard}: damaged (its size differs); delete {path} to have it packed again")
        with open(shard, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
                digest.update(block)
        if (
            found.hexdigest() != record["sha256"]
            or not starts.is_file()
            or file_sha256(starts) != record["starts"]
        ):
            raise UserError(f"{shard}: damaged (sha256 differs); delete {path} to have it packed again")
        return record


class _Shard:
    """One shard while it is written, under a name of its own until it is whole."""

    def __init__(self, folder: Path, name: str, key: str):
        self.folder, self.name, self.key = folder, name, key
        self.temporary = folder / f".{name}.bin.{os.getpid()}"
        self.file = open(self.temporary, "wb")
        self.sha256, self.counts, self.tokens = hashlib.sha256(), TextCounts(), 0
        self.starts: list[np.ndarray] = []

    def add(self, packed: Packed) -> None:
        content = packed.ids.tobytes()
        with named_errors(self.temporary):
            self.file.write(content)
        self.sha256.update(content)
        self.starts.append((packed.starts + self.tokens).astype(np.uint64))
        self.tokens += len(packed.ids)
        self.counts += packed.counts

    def keep(self) -> None:
        with named_errors(self.temporary):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        os.replace(self.temporary, self.folder / f"{self.name}.bin")
        starts = self.folder / f"{self.name}.starts"
        starts.write_bytes(b"".join(part.tobytes() for part in self.starts))
        fsync_one(starts)
        write_json(  # last: a shard with a record is whole
            self.folder / f"{self.name}.json",
            {
                "key": self.key,
                "file": f"{self.name}.bin",
                "tokens": self.tokens,
                "sha256": self.sha256.hexdigest(),
                "starts": file_sha256(starts),
                "counts": asdict(self.counts),
            },
        )


class _Meter:
    """A progress bar where there is a terminal, and a line with the speed at the end."""

    def __init__(self, split: str):
        self.split, self.tokens, self.bytes, self.started = split, 0, 0, time.monotonic()
        self.bar = tqdm(desc=f"packing {split} text", unit="B", unit_scale=True, disable=None)

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.tokens:
            logger.info(
                "%s: %s bytes of text, %s tokens/s",
                self.split,
                f"{self.bytes:,}",
                f"{self.per_second():,.0f}",
            )

    def add(self, packed: Packed) -> None:
        self.tokens += len(packed.ids)
        self.bytes += packed.counts.bytes
        self.bar.update(packed.counts.bytes)
        self.bar.set_postfix_str(f"{self.per_second():,.0f} tokens/s", refresh=False)

    def per_second(self) -> float:
        return self.tokens / max(time.monotonic() - self.started, 1e-9)


def _no_text(split: Split, source: str) -> str:
    if split == "train":
        return f"data.source: {source!r} is empty: it holds no text; give a source with text"
    return (
        f"data.validation_fraction: no text of {source!r} is held out; raise it, "
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
