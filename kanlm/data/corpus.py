"""Where text comes from: every source as an iterator of documents, and its parts for training and validation.

    source name                           read by
    `stdlib`, `stories`                   kanlm.data.stdlib, kanlm.data.stories
    file.{txt,jsonl,json,parquet}[.gz|.xz|...]   datasets.load_dataset("text" | "json" | "parquet")
    folder                                datasets.load_from_disk where save_to_disk wrote it, else load_dataset
    anything else                         datasets.load_dataset(hub id)

Local files are read as streams, so that no second copy of them lands in a library's cache. Text files have
universal newlines: CRLF and CR are read as LF.

Held-out text, in this order: `data.validation_source`; `data.validation_split`; of 100 documents or more, those
whose hash falls below `data.validation_fraction`, so that equal documents are on one side; of fewer, the last
`validation_fraction` of every document. Documents without text are skipped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kanlm.config import DataConfig, RunConfig, SourceConfig, UserError
from kanlm.data import stdlib, stories

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]
FEW_DOCUMENTS = 100
"""Below this many documents the tail of each is held out instead of whole documents."""
STREAMED_VALIDATION_DOCUMENTS = 1000
"""With `data.streaming` the held-out documents end here, so that validation does not read the whole corpus."""

_BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
}
_BUILDERS[".parquet"] = "parquet"
_COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2", ".lz4")


@dataclass(frozen=True)
class Source:
    """One source of one split, ready to be read any number of times."""

    spec: SourceConfig
    weight: float
    name: str
    licence: str
    fingerprint: str
    """Changes when the text may have changed; part of every cache key."""
    read: Callable[[], Iterator[str]]
    part: Callable[[str], str]
    """The part of a document that belongs to this split; empty where none does."""


def text_documents(
    spec: SourceConfig,
    *,
    invalid_utf8: str = "error",
    streaming: bool = False,
    max_documents: int | None = None,
) -> Iterator[str]:
    """The documents of `spec.split` of `spec.source` that hold text, at most the first `max_documents`."""
    documents = _reader(spec, invalid_utf8, streaming).read()
    return itertools.islice((text for text in documents if text), max_documents)


def documents(config: RunConfig, split: Split) -> Iterator[str]:
    """Original text of a split of `config.data`: exactly what the token cache of that split holds."""
    for source in training_sources(config) if split == "train" else validation_sources(config):
        yield from split_texts(source)


def split_texts(source: Source) -> Iterator[str]:
    """The texts of `source` that belong to its split."""
    return (part for text in source.read() if (part := source.part(text)))


def training_sources(config: RunConfig) -> tuple[Source, ...]:
    """The mixture's training sources, or the single one."""
    return tuple(_source(config.data, spec, "train") for spec in _specs(config.data))


def validation_sources(config: RunConfig) -> tuple[Source, ...]:
    """Where held-out text comes from: one source, or for a mixture the held-out part of each."""
    if config.data.validation_source is not None:
        return (_source(config.data, _validation_spec(config.data), "validation"),)
    return tuple(_source(config.data, spec, "validation") for spec in _specs(config.data))


def _specs(data: DataConfig) -> tuple[SourceConfig, ...]:
    if not data.mixture:
        return (data,)
    if sum(spec.weight for spec in data.mixture) <= 0:
        raise UserError(
            "data.mixture: the weights sum to 0; they must sum to a positive number: set weight of at least one source"
        )
    return tuple(spec for spec in data.mixture if spec.weight > 0)


def _validation_spec(data: DataConfig) -> SourceConfig:
    return SourceConfig(
        source=data.validation_source,
        split=data.validation_split or "train",
        text_column=data.text_column,
        document_separator=data.document_separator,
    )


def _source(data: DataConfig, spec: SourceConfig, split: Split) -> Source:
    """`spec` as it is read for `split`, with the rule that keeps training and held-out text apart."""
    held_out_apart = data.validation_source is not None or data.validation_split is not None
    if held_out_apart:
        _check_apart(data, spec)
    if split == "validation" and data.validation_source is None and data.validation_split is not None:
        spec = SourceConfig(
            **{name: getattr(spec, name) for name in SourceConfig.model_fields}
            | {"split": data.validation_split}
        )
    reader = _reader(spec, data.invalid_utf8, data.streaming)
    limit = None if split == "validation" and held_out_apart else data.max_documents

    def read() -> Iterator[str]:
        return itertools.islice((text for text in reader.read() if text), limit)

    rule = [split, limit]
    part: Callable[[str], str] = _whole
    if not held_out_apart:
        few = sum(1 for _ in itertools.islice(read(), FEW_DOCUMENTS)) < FEW_DOCUMENTS
        rule += [data.validation_fraction, few]
        part = (_tail_rule if few else _hash_rule)(split, data.validation_fraction)
    identity = [reader.fingerprint, spec.text_column, spec.document_separator, data.invalid_utf8, rule]
    return Source(
        spec=spec,
        weight=spec.weight,
        name=reader.name,
        licence=reader.licence,
        fingerprint=_sha256(json.dumps(identity)),
        read=read,
        part=part,
    )


def _check_apart(data: DataConfig, spec: SourceConfig) -> None:
    held_out = (data.validation_source or spec.source, data.validation_split or "train")
    if held_out == (spec.source, spec.split):
        raise UserError(
            f"data.validation_split: {held_out[1]!r} of {held_out[0]!r} is what the model trains on; name another "
            "split or source, or leave both out to hold out data.validation_fraction of the documents"
        )


def _whole(text: str) -> str:
    return text


def _hash_rule(split: Split, fraction: float) -> Callable[[str], str]:
    def part(text: str) -> str:
        place = int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()) / 2**64
        return text if (place < fraction) == (split == "validation") else ""

    return part


def _tail_rule(split: Split, fraction: float) -> Callable[[str], str]:
    """Cut at the first line end, else the first space, after the head's share; head + tail is the document."""

    def part(text: str) -> str:
        share = int(len(text) * (1 - fraction))
        cut = next(
            (at + 1 for mark in "\n " if (at := text.find(mark, share)) >= 0 and at + 1 < len(text)), share
        )
        return text[cut:] if split == "validation" else text[:cut]

    return part


@dataclass(frozen=True)
class _Reader:
    name: str
    licence: str
    fingerprint: str
    read: Callable[[], Iterator[str]]


def _reader(spec: SourceConfig, invalid_utf8: str, streaming: bool) -> _Reader:
    if spec.source in ("stdlib", "stories"):
        return _embedded(spec)
    path = Path(spec.source).expanduser()
    if path.exists():
        return _local(spec, path, invalid_utf8)
    if spec.source.startswith((".", "/", "~")) or _builder(path) is not None:
        siblings = sorted(p.name for p in path.parent.iterdir())[:10] if path.parent.is_dir() else []
        hint = f"; {path.parent}/ has: {', '.join(siblings)}" if siblings else ""
        raise UserError(f"data.source: no such file or folder: {spec.source!r}{hint}")
    return _hub(spec, streaming)


def _embedded(spec: SourceConfig) -> _Reader:
    if spec.split != "train":
        raise UserError(f"data.split: {spec.source!r} has only the split 'train', got {spec.split!r}")
    if spec.source == "stdlib":
        library = stdlib.standard_library()
        if library.bytes >= stdlib.MINIMUM_BYTES:
            return _Reader("stdlib", stdlib.LICENCE, library.sha256, lambda: iter(library.texts))
        logger.warning(
            "stdlib: only %s bytes of library sources found; using the story generator (data.source=stories) instead",
            f"{library.bytes:,}",
        )
    return _Reader(
        "stories", stories.LICENCE, stories.VERSION, lambda: (story.text for story in stories.stories())
    )


def _local(spec: SourceConfig, path: Path, invalid_utf8: str) -> _Reader:
    import datasets

    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [
        (p.relative_to(path).as_posix() or p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files
    ]
    builder = _builder(path)
    if builder is None:
        known = ", ".join(sorted(_BUILDERS))
        raise UserError(
            f"data.source: {spec.source!r} has an unknown ending; known: {known}, also compressed"
        )
    arguments: dict[str, Any] = {}
    if builder == "text":
        arguments = {"encoding_errors": "replace" if invalid_utf8 == "replace" else "strict"}
        by_line = spec.document_separator is not None
        arguments |= {"sample_by": "line", "keep_linebreaks": True} if by_line else {"sample_by": "document"}
    dataset = datasets.load_dataset(
        builder, data_files=str(path), split=spec.split, streaming=True, **arguments
    )
    fingerprint = _sha256(json.dumps([stats, spec.split]))
    return _Reader(spec.source, "see the source", fingerprint, lambda: _texts(dataset, spec))


def _hub(spec: SourceConfig, streaming: bool) -> _Reader:
    raise UserError(f"data.source: {spec.source!r} cannot be reached")


def _builder(path: Path) -> str | None:
    """The `datasets` builder for a file of this name, compressed or not."""
    name = Path(path.stem) if path.suffix in _COMPRESSIONS else path
    return _BUILDERS.get(name.suffix)


def _texts(dataset: Any, spec: SourceConfig) -> Iterator[str]:
    lines: list[str] = []
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        if spec.text_column not in table.column_names:
            raise UserError(
                f"data.text_column: {spec.source!r} has no column {spec.text_column!r}; "
                f"it has: {', '.join(table.column_names)}"
            )
        texts = (text or "" for text in table.column(spec.text_column).to_pylist())
        if spec.document_separator is None:
            yield from texts
            continue
        for line in texts:
            if line.rstrip("\n") == spec.document_separator:
                yield "".join(lines)
                lines.clear()
            else:
                lines.append(line)
    if lines:
        yield "".join(lines)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
