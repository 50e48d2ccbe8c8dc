"""Readers: one way to iterate the documents of any source, in order, from the start or from a saved place.

    `data.source`                          read by
    `stdlib`, `stories`                    kanlm.data.stdlib, kanlm.data.stories
    .txt .md [.gz ...]                     kanlm.data.text, by the piece
    .jsonl .json .parquet .csv .tsv        datasets.load_dataset("json" | "parquet" | "csv")
      [.gz ...]
    a pattern (*, **, ?, [...])            the files that match, in the order of their names, as one source
    folder                                 load_from_disk where save_to_disk wrote it, else load_dataset; that
                                           says which text files belong to the split
    anything else                          datasets.load_dataset(hub id)

Local files are streamed, so no second copy of them lands in the library's cache. Text files are read with
universal newlines (CRLF and CR become LF).
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
import json
import logging
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
from huggingface_hub.errors import HfHubHTTPError

from kanlm.config import SourceConfig, UserError
from kanlm.data import stdlib, stories
from kanlm.data.text import BLOCK_CHARACTERS, Place, Text, TextFile
from kanlm.runs import json_sha256

logger = logging.getLogger(__name__)

State = dict[str, Any] | None
"""A place in a source, JSON only; None is the start."""

Chunks = Callable[[State], Iterator[tuple[State, list[Text]]]]
CHUNK_ROWS = 1000
HASHED_BYTES = 2**28
"""Of a local source this much is read for its fingerprint."""
_BLOCK = 2**16
_ENDINGS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
_COMPRESSIONS = (".gz", ".xz", ".bz2")
_READ_ERRORS = (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, datasets.exceptions.DatasetsError)


class Unreachable(UserError):
    """A source that may be readable later: what was read of it so far stays good."""


@dataclass(frozen=True)
class Reader:
    """One split of one source."""

    name: str
    licence: str
    fingerprint: str
    """Changes when the text may have changed."""
    chunks: Chunks = field(compare=False)
    """Lists of documents from a place on, each with the place of its first document. Texts may be empty."""
    known_bits: Callable[[str], float] | None = field(default=None, compare=False)
    """-log2 of the true probability of a document, where the source knows it."""
    keys: dict[str, tuple[str, ...]] | None = field(default=None, compare=False)
    """By text: what a document is held out by instead of its text, and the same of others much like it."""


def reader(spec: SourceConfig, *, invalid_utf8: str = "error", streaming: bool = False) -> Reader:
    """The reader of `spec`; `UserError` where the source, its configuration or its split does not exist.

    `streaming` matters for hub ids: without it they are downloaded first.
    """
    if spec.source in ("stdlib", "stories"):
        return _embedded(spec)
    path = Path(spec.source).expanduser()
    if path.exists():
        return _local(spec, path, invalid_utf8)
    if glob.has_magic(spec.source):
        return _local(spec, path, invalid_utf8, _matching(spec.source))
    if spec.source.startswith((".", "/", "~")) or _builder(path) is not None or spec.source.count("/") > 1:
        siblings = sorted(p.name for p in path.parent.iterdir())[:10] if path.parent.is_dir() else []
        hint = f"; {path.parent} has: {', '.join(siblings)}" if siblings else ""
        raise UserError(f"data.source: no such file or folder: {spec.source!r}{hint}")
    return _hub(spec, invalid_utf8, streaming)


@lru_cache(maxsize=1)
def _keys(library: stdlib.StandardLibrary) -> dict[str, tuple[str, ...]]:
    return library.keys()


def _embedded(spec: SourceConfig) -> Reader:
    if spec.split != "train":
        raise UserError(
            f"data.split: {spec.source!r} has only the split 'train', got {spec.split!r}; "
            "leave it out: data.validation_fraction of the documents are held out"
        )
    if spec.source == "stdlib":
        library = stdlib.standard_library()
        if library.bytes >= stdlib.MINIMUM_BYTES:
            return Reader(
                "stdlib",
                stdlib.LICENCE,
                library.sha256,
                _counted(lambda: iter(library.texts)),
                keys=_keys(library),
            )
        logger.warning(
            "stdlib: only %s bytes of library sources found; using the story generator instead "
            '(data.source = "stories")',
            f"{library.bytes:,}",
        )
    texts = _counted(lambda: (story.text for story in stories.default_stories()))
    return Reader("stories", stories.LICENCE, stories.VERSION, texts, stories.known_bits)


def _matching(pattern: str) -> list[str]:
    """The files of one kind that match, sorted; UserError where there are none or their kinds differ."""
    found = glob.iglob(str(Path(pattern).expanduser()), recursive=True)
    files = sorted({name for name in found if os.path.isfile(name)}, key=_by_parts)
    if not files:
        raise UserError(f"data.source: no file matches {pattern!r}")
    kinds: dict[str | None, str] = {}
    for file in files:
        kinds.setdefault(_builder(file), file)
    if len(kinds) > 1:
        one, other = (os.path.basename(file) for file in list(kinds.values())[:2])
        raise UserError(
            f"data.source: {pattern!r} matches files of several kinds ({one}, {other}); "
            "narrow it to one ending, or make a data.mixture"
        )
    return files


def _below(folder: Path) -> list[str]:
    """All files below a folder but hidden ones, sorted."""
    found = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted((f for f in found if os.path.basename(f)[0] != "." and os.path.isfile(f)), key=_by_parts)


def _by_parts(name: str) -> str:
    """Sorts names as pathlib sorts paths, part by part. Of a million files strings are kept, not paths."""
    return name.replace(os.sep, "\0")


def _local(spec: SourceConfig, path: Path, invalid_utf8: str, matching: list[str] | None = None) -> Reader:
    """The reader of a file, of a folder, or of the files `matching` a pattern."""
    named = matching or ([str(path)] if path.is_file() else [])
    files = named or _below(path)
    sizes = [os.path.getsize(file) for file in files]
    if not sum(sizes):
        raise UserError(f"data.source: {spec.source!r} is empty; give a file or folder that holds text")
    root = os.path.commonpath({os.path.dirname(file) for file in named}) if named else str(path)
    fingerprint = _fingerprint(root, files, sizes, _reading(spec, invalid_utf8))
    builder = _builder(named[0]) if named else _commonest_builder(files)
    if named and builder is None:
        raise UserError(
            f"data.source: {spec.source!r} has an unknown ending; known: {' '.join(_ENDINGS)}, "
            f"plain or with {' '.join(_COMPRESSIONS)}"
        )
    if named and spec.config_name is not None:
        raise UserError(
            f"data.config_name: {spec.source!r} is a file and has no configurations; leave it out"
        )
    if named and builder == "text":
        # The library would look at each file for itself, and at a million for minutes.
        if spec.split != "train":
            raise UserError(f"data.split: {spec.source!r} has only the split 'train', got {spec.split!r}")
        chunks = _text_chunks(named, spec, named, _decoding(invalid_utf8))
        return Reader(spec.source, "not stated", fingerprint, chunks)
    arguments = _builder_arguments(builder, files, spec, invalid_utf8)
    texts_of = files if arguments else []  # where bytes that are not UTF-8 can be searched for
    with _one_line_errors(spec, texts_of):
        if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            dataset, text_files = _saved(path, spec), None
        else:
            where = (
                {"path": builder, "data_files": [glob.escape(os.path.realpath(file)) for file in named]}
                if named
                else {"path": str(path.resolve()), "name": spec.config_name}
            )
            dataset = datasets.load_dataset(split=spec.split, streaming=True, **where, **arguments)
            text_files = _text_files(path, spec, arguments) if builder == "text" else None
    if text_files is not None:
        chunks = _text_chunks(text_files, spec, files, _decoding(invalid_utf8))
    else:
        chunks = _dataset_chunks(dataset, spec, texts_of, invalid_utf8)
    return Reader(spec.source, dataset.info.license or "not stated", fingerprint, chunks)


def _decoding(invalid_utf8: str) -> str:
    return "replace" if invalid_utf8 == "replace" else "strict"


def _builder_arguments(
    builder: str | None, files: list[str], spec: SourceConfig, invalid_utf8: str
) -> dict[str, Any]:
    """What the library's reader of this kind of file is told."""
    if builder not in ("text", "json", "csv"):
        return {}
    arguments: dict[str, Any] = {"encoding": "utf_8", "encoding_errors": _decoding(invalid_utf8)}
    if builder == "text":
        arguments["sample_by"] = "document"
    if builder == "csv":
        # Texts stay what is written: "NA" and "12" are neither missing nor numbers.
        arguments |= {"converters": {spec.text_column: str}, "keep_default_na": False}
        arguments["sep"] = "\t" if any(".tsv" in Path(file).suffixes for file in files) else ","
    return arguments


def _fingerprint(root: str, files: list[str], sizes: list[int], reading: list[str | None]) -> str:
    """The sha256 of the JSON [names within root, content marks, *reading], which is never whole in memory."""
    prefix, digest = os.path.join(root, ""), hashlib.sha256(b"[[")
    names = (file.removeprefix(prefix).replace(os.sep, "/") for file in files)
    for number, name in enumerate(names):
        digest.update((", " * bool(number) + json.dumps(name)).encode())
    digest.update(b"], [")
    for number, mark in enumerate(_content_marks(files, sizes)):
        digest.update((", " * bool(number) + json.dumps(mark)).encode())
    digest.update(f"], {json.dumps(reading)[1:]}".encode())
    return digest.hexdigest()


def _content_marks(files: list[str], sizes: list[int]) -> Iterator[tuple[int, str]]:
    """Size and sha256 of each file: the same for every copy, whatever its place and its times.

    Files of at most HASHED_BYTES in all are hashed whole; of more, blocks of 64 KiB with about that many in
    all: the first and the last of every file and, at even distances, at least one between. So a change is
    missed only where it keeps a file's size and lies wholly between two of them.
    """
    total = sum(sizes)
    for file, size in zip(files, sizes, strict=True):
        blocks = max(3, -(-size * min(total, HASHED_BYTES) // (total * _BLOCK)))
        yield size, _digest(file, size, blocks)


def _digest(file: str, size: int, blocks: int) -> str:
    with open(file, "rb") as opened:
        if blocks * _BLOCK >= size:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha256()
        for number in range(blocks):
            opened.seek(number * (size - _BLOCK) // (blocks - 1))
            digest.update(opened.read(_BLOCK))
    return digest.hexdigest()


def _saved(folder: Path, spec: SourceConfig) -> datasets.IterableDataset:
    """What `save_to_disk` wrote: a single data set counts as the split 'train'."""
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if spec.split not in splits:
        raise ValueError(f"no such split; it has: {', '.join(splits)}")
    return splits[spec.split].to_iterable_dataset()


def _hub(spec: SourceConfig, invalid_utf8: str, streaming: bool) -> Reader:
    with _one_line_errors(spec, []):
        version = datasets.load_dataset_builder(spec.source, spec.config_name).hash
        dataset = datasets.load_dataset(spec.source, spec.config_name, split=spec.split, streaming=streaming)
    if not streaming:
        dataset = dataset.to_iterable_dataset()
    return Reader(
        name=spec.source if spec.config_name is None else f"{spec.source} ({spec.config_name})",
        licence=dataset.info.license or "see the data set's card",
        fingerprint=json_sha256([spec.source, version, *_reading(spec, invalid_utf8)]),
        chunks=_dataset_chunks(dataset, spec, [], invalid_utf8),
    )


@contextmanager
def _one_line_errors(spec: SourceConfig, files: list[str]) -> Iterator[None]:
    """What can go wrong while `files` or a hub id are opened and read, as a UserError."""
    where = f"data.source: {spec.source!r} (split {spec.split!r}, config_name {spec.config_name!r})"
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(_invalid_utf8_message(spec, files, error)) from None
    except ConnectionError as error:
        raise Unreachable(
            f"data.source: {spec.source!r} is no local path, and the hub cannot be reached "
            f"({_first_line(error)}); check the spelling or the network, or download it first"
        ) from None
    except StopIteration:  # the library's JSON reader on a file of no bytes
        raise UserError(f"{where} is empty; give a file or folder that holds text") from None
    except _READ_ERRORS as error:
        line = f"{where} cannot be read: {_first_line(error)}"
        # The disk or the hub has a number; a damaged file, of which nothing can be used, has none.
        if isinstance(error, HfHubHTTPError) or (isinstance(error, OSError) and error.errno is not None):
            raise Unreachable(f"{line}; run the same command again when it can") from None
        raise UserError(line) from None


def _text_files(path: Path, spec: SourceConfig, arguments: dict[str, Any]) -> list[str] | None:
    """The files of a folder's split in the library's order; None where some are of another kind."""
    builder = datasets.load_dataset_builder(str(path.resolve()), spec.config_name, **arguments)
    files = list(map(str, builder.config.data_files[spec.split]))
    other = next((file for file in files if _builder(file) != "text" or not os.path.isfile(file)), None)
    if other is not None and spec.document_separator is not None:
        raise UserError(
            f"data.document_separator: {other!r} is no plain text file; unpack it, or leave out the key"
        )
    return files if other is None else None


def _text_chunks(text_files: list[str], spec: SourceConfig, searched: list[str], errors: str) -> Chunks:
    """Chunks of about BLOCK_CHARACTERS; the place is that in a file."""

    def guarded(iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            with _one_line_errors(spec, searched):
                found = next(iterator, None)
            if found is None:
                return
            yield found

    def placed(state: State) -> Iterator[tuple[State, Text]]:
        begin = state or {"file": 0, "cookie": 0, "skip": 0}
        place: Place | None = Place(begin["cookie"], begin["skip"])
        for number in range(begin["file"], len(text_files)):
            file = TextFile(Path(text_files[number]), spec.document_separator, errors)
            for here, text in guarded(file.documents(place)):
                yield {"file": number, "cookie": here.cookie, "skip": here.skip}, text
            place = None

    def chunks(state: State) -> Iterator[tuple[State, list[Text]]]:
        first: State = None
        chunk: list[Text] = []
        size = 0
        for place, text in placed(state):
            first = place if not chunk else first
            chunk.append(text if isinstance(text, str) else text.read_by(guarded))
            size += len(text) if isinstance(text, str) else 0
            if size >= BLOCK_CHARACTERS or len(chunk) == CHUNK_ROWS:
                yield first, chunk
                chunk, size = [], 0
        if chunk:
            yield first, chunk

    return chunks


def _dataset_chunks(
    dataset: datasets.IterableDataset, spec: SourceConfig, files: list[str], invalid_utf8: str
) -> Chunks:
    """Chunks of the text column; the place is the library's own state."""

    def chunks(state: State) -> Iterator[tuple[State, list[Text]]]:
        rows = dataset.with_format("arrow")
        if state is not None:
            rows.load_state_dict(state)
        tables = iter(rows.iter(batch_size=CHUNK_ROWS))
        while True:
            with _one_line_errors(spec, files):
                table = next(tables, None)
                if table is None:
                    return
                texts = _texts(table, spec, invalid_utf8)
            yield state, texts
            state = rows.state_dict()

    return chunks


def _texts(table: pa.Table, spec: SourceConfig, invalid_utf8: str) -> list[Text]:
    if spec.text_column not in table.column_names:
        raise UserError(
            f"data.text_column: {spec.source!r} has no column {spec.text_column!r}; "
            f"it has: {', '.join(table.column_names)}"
        )
    column = table.column(spec.text_column)
    if pa.types.is_null(column.type):
        return [""] * len(column)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise UserError(
            f"data.text_column: {spec.text_column!r} of {spec.source!r} holds {column.type}, not text; "
            f"columns: {', '.join(f'{field.name} ({field.type})' for field in table.schema)}"
        )
    if invalid_utf8 == "replace":
        values = column.cast(pa.large_binary()).to_pylist()
        return ["" if value is None else value.decode("utf-8", errors="replace") for value in values]
    return ["" if value is None else value for value in column.to_pylist()]


def _counted(texts: Callable[[], Iterator[str]]) -> Chunks:
    """Chunks of a source that is cheap to read again: the place is the number of documents before it."""

    def chunks(state: State) -> Iterator[tuple[State, list[Text]]]:
        done = state["documents"] if state else 0
        rest: Iterator[Text] = itertools.islice(texts(), done, None)
        while chunk := list(itertools.islice(rest, CHUNK_ROWS)):
            yield {"documents": done}, chunk
            done += len(chunk)

    return chunks


def _invalid_utf8_message(spec: SourceConfig, files: list[str], error: UnicodeDecodeError) -> str:
    where = f"{spec.source!r}"
    for file in files:
        offset = _invalid_utf8_offset(file)
        if offset is not None:
            unpacked = " of the unpacked text" if file.endswith(_COMPRESSIONS) else ""
            where = f"{file!r}, byte {offset}{unpacked}"
            break
    return (
        f"data.source: {where}: not UTF-8 ({error.reason}); convert it, or set data.invalid_utf8=replace "
        "(kanlm eval: --invalid-utf8 replace) to read such bytes as U+FFFD"
    )


def _invalid_utf8_offset(file: str) -> int | None:
    """Position of the first byte that is not UTF-8; None where all are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with fsspec.open(file, "rb", compression="infer") as stream:
        while True:
            block = stream.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return position - pending + error.start
            if not block:
                return None
            position += len(block)


def _reading(spec: SourceConfig, invalid_utf8: str) -> list[str | None]:
    """What decides, besides the files, which documents are read."""
    return [spec.config_name, spec.split, spec.text_column, spec.document_separator, invalid_utf8]


def _builder(file: str | Path) -> str | None:
    """The `datasets` builder for a file of this name, compressed or not."""
    stem, ending = os.path.splitext(os.path.basename(file))
    return _ENDINGS.get(os.path.splitext(stem)[1] if ending in _COMPRESSIONS else ending)


def _commonest_builder(files: list[str]) -> str | None:
    names = (name for name in map(os.path.basename, files) if not name.startswith("README"))
    found = [kind for name in names if (kind := _builder(name))]
    return max(sorted(set(found)), key=found.count, default=None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
