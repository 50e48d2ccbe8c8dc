"""Which documents a run trains on and which it holds out; the two never overlap.

Held-out text is, in this order: `data.validation_source`; the split `data.validation_split` of the source; of
100 documents or more, those whose hash falls below `data.validation_fraction` (equal documents fall on one
side); of fewer, the last `validation_fraction` of each document. Documents without text are skipped. Of
an embedded source the documents of the lowest EMBEDDED_HELD_OUT of the hashes are never trained on. Those of
`stdlib` are hashed by their path, not by their text, and what is much like one of them is not trained on.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from kanlm.config import DataConfig, SourceConfig, UserError
from kanlm.data.sources import Reader, State, reader
from kanlm.data.text import Text
from kanlm.runs import json_sha256

Split = Literal["train", "validation"]

FEW_DOCUMENTS = 100
"""Below this many documents the tail of each is held out instead of whole documents."""
EMBEDDED = ("stdlib", "stories")
EMBEDDED_HELD_OUT = DataConfig.model_fields["validation_fraction"].default
"""`kanlm eval --data stdlib` scores this share of an embedded source, so no run trains on it."""
STREAMED_VALIDATION_DOCUMENTS = 1000
"""With `data.streaming`, hashed-out documents end here: validation must not read the whole corpus."""


@dataclass(frozen=True)
class Source:
    """One source as it is read for one split."""

    reader: Reader
    weight: float
    part: Callable[[Text], Text]
    """The part of a document that belongs to the split; empty where none does."""
    max_documents: int | None
    """Documents read, before `part`."""
    max_parts: int | None
    """Documents given, after `part`."""
    known_bits: Callable[[str], float] | None
    """-log2 of the true probability of a text, where it is known."""
    fingerprint: str
    """Changes when the split's text may have changed; part of every cache key."""

    @property
    def name(self) -> str:
        return self.reader.name


class TextStream(Iterator[Text]):
    """The texts of one source that belong to its split; `state_dict()` is the place of the next one."""

    def __init__(self, source: Source, state: dict[str, Any] | None = None):
        self.source = source
        state = state or {"chunk": None, "row": 0, "read": 0, "given": 0}
        self._chunks = source.reader.chunks(state["chunk"])
        self._place: State = state["chunk"]
        self._texts: list[Text] = []
        self._row, self._read, self._given = state["row"], state["read"], state["given"]

    def __next__(self) -> Text:
        source = self.source
        while source.max_parts is None or self._given < source.max_parts:
            if source.max_documents is not None and self._read >= source.max_documents:
                break
            while self._row >= len(self._texts):
                first = not self._texts
                found = next(self._chunks, None)
                if found is None:
                    raise StopIteration
                self._place, self._texts = found
                self._row = self._row if first else 0
            text = self._texts[self._row]
            self._row += 1
            if not text:
                continue
            self._read += 1
            if part := source.part(text):
                self._given += 1
                return part
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        return {"chunk": self._place, "row": self._row, "read": self._read, "given": self._given}


def documents(data: DataConfig, split: Split) -> Iterator[str]:
    """Original text of a split of `data`: exactly what the token caches of that split hold."""
    sources = split_sources(data, split)
    return map(str, itertools.chain.from_iterable(TextStream(source) for source in sources))


def text_documents(
    spec: SourceConfig,
    *,
    invalid_utf8: str = "error",
    streaming: bool = False,
    max_documents: int | None = None,
) -> Iterator[str]:
    """All documents of a source's split, at most the first `max_documents`; nothing is held out."""
    found = reader(spec, invalid_utf8=invalid_utf8, streaming=streaming)
    return map(str, TextStream(Source(found, 1.0, _whole, max_documents, None, None, found.fingerprint)))


def split_sources(data: DataConfig, split: Split) -> tuple[Source, ...]:
    """The sources of a split: one for each of positive weight in a mixture."""
    if split == "validation" and data.validation_source is not None:
        return (_source(data, _validation_spec(data), split),)
    specs = [spec for spec in data.mixture if spec.weight > 0] or [data]
    return tuple(_source(data, spec, split) for spec in specs)


def _validation_spec(data: DataConfig) -> SourceConfig:
    assert data.validation_source is not None
    return SourceConfig(
        source=data.validation_source,
        split=data.validation_split or "train",
        text_column=data.text_column,
        document_separator=data.document_separator,
    )


def _source(data: DataConfig, spec: SourceConfig, split: Split) -> Source:
    held_out_apart = data.validation_source is not None or data.validation_split is not None
    if held_out_apart:
        if split == "train":
            _check_apart(data, spec)
        elif data.validation_split is not None and data.validation_source is None:
            spec = _with_split(spec, data.validation_split)
    found = reader(spec, invalid_utf8=data.invalid_utf8, streaming=data.streaming)
    max_documents = None if held_out_apart and split == "validation" else data.max_documents
    part: Callable[[Text], Text] = _whole
    max_parts, rule, fraction = None, "whole", data.validation_fraction
    embedded = spec.source in EMBEDDED
    if embedded and split == "train":
        fraction = max(EMBEDDED_HELD_OUT, 0.0 if held_out_apart else fraction)
    if not held_out_apart or (embedded and split == "train"):
        few = not embedded and _has_few_documents(found, max_documents)
        rule = "tails" if few else "hashed" if found.keys is None else "paths"
        if found.keys is not None:
            part = _key_rule(split, fraction, found.keys)
        else:
            part = (_tail_rule if few else _hash_rule)(split, fraction)
        if data.streaming and split == "validation":
            max_parts = STREAMED_VALIDATION_DOCUMENTS
    identity: list[Any] = [found.fingerprint, split, rule, max_documents, max_parts]
    if rule != "whole":
        identity.append(fraction)
    fingerprint = json_sha256(identity)
    return Source(found, spec.weight, part, max_documents, max_parts, found.known_bits, fingerprint)


@lru_cache
def _has_few_documents(found: Reader, max_documents: int | None) -> bool:
    everything = TextStream(Source(found, 1.0, _whole, max_documents, None, None, ""))
    return sum(1 for _ in itertools.islice(everything, FEW_DOCUMENTS)) < FEW_DOCUMENTS


def _with_split(spec: SourceConfig, split: str) -> SourceConfig:
    fields = {name: getattr(spec, name) for name in SourceConfig.model_fields}
    return SourceConfig(**fields | {"split": split})


def _check_apart(data: DataConfig, spec: SourceConfig) -> None:
    held_out = (data.validation_source or spec.source, data.validation_split or "train")
    if (_place(held_out[0]), held_out[1]) == (_place(spec.source), spec.split):
        raise UserError(
            f"data.validation_split: split {held_out[1]!r} of {held_out[0]!r} is what is trained on; name "
            "another split or source, or leave both out to hold out data.validation_fraction of the documents"
        )


def _place(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _whole(text: Text) -> Text:
    return text


def _key_rule(split: Split, fraction: float, keys: dict[str, tuple[str, ...]]) -> Callable[[Text], Text]:
    """Held out by key; what is much like a held-out document is neither trained on nor scored."""

    def held_out(key: str) -> bool:
        return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()) / 2**64 < fraction

    def part(text: Text) -> Text:
        own, *alike = keys[str(text)]
        if split == "validation":
            return text if held_out(own) else ""
        return "" if held_out(own) or any(map(held_out, alike)) else text

    return part


def _hash_rule(split: Split, fraction: float) -> Callable[[Text], Text]:
    def part(text: Text) -> Text:
        digest = hashlib.blake2b(digest_size=8)
        for piece in (text,) if isinstance(text, str) else text:
            digest.update(piece.encode("utf-8"))
        place = int.from_bytes(digest.digest()) / 2**64
        return text if (place < fraction) == (split == "validation") else ""

    return part


def _tail_rule(split: Split, fraction: float) -> Callable[[Text], Text]:
    """Cut at the first line end, else the first space, after the head's share; head + tail = the document."""

    def part(text: Text) -> Text:
        share = int(len(text) * (1 - fraction))
        ends = (text.find(mark, share) + 1 for mark in "\n ")
        cut = next((end for end in ends if 0 < end < len(text)), share)
        return text[cut:] if split == "validation" else text[:cut]

    return part
