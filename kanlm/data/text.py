"""Plain text files as documents; one that is long stays on the disk, so memory does not grow with it.

A file is one document, or several between lines that equal `separator`. Text is UTF-8, plain or compressed,
read with universal newlines (CRLF and CR become LF).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from kanlm.config import UserError

BLOCK_CHARACTERS = 1 << 20
LONG_CHARACTERS = 1 << 22
"""A document of more characters is a `LongText`."""
WORD_CHARACTERS = 1 << 22
"""The longest text without a place to cut: one word of a tokenizer."""
WORD_BEGINS = re.compile(r"[ \n](?=\S)")
_NUMBER_BEGINS = re.compile(r"(?<=[A-Za-z])(?=[0-9])")
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


class LongText:
    """A document, or a slice of one, that is read from its file each time it is iterated over.

    `read(start)` gives its consecutive parts from character `start` of the document on. Length, slices
    without steps, `find` of one character and `str` are those of a string.
    """

    def __init__(self, read: Callable[[int], Iterator[str]], start: int, stop: int):
        self._read, self._start, self._stop = read, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[str]:
        left = len(self)
        for block in self._read(self._start) if left else ():
            yield block[:left]
            left -= len(block)
            if left <= 0:
                return

    def __getitem__(self, place: slice) -> LongText:
        start, stop, step = place.indices(len(self))
        assert step == 1
        return LongText(self._read, self._start + start, self._start + max(start, stop))

    def __str__(self) -> str:
        return "".join(self)

    def read_by(self, guard: Callable[[Iterator[str]], Iterator[str]]) -> LongText:
        """The same, with `guard` around each reading."""
        read = self._read
        return LongText(lambda start: guard(read(start)), self._start, self._stop)

    def find(self, character: str, start: int = 0) -> int:
        assert len(character) == 1
        for block in self[start:]:
            if (found := block.find(character)) >= 0:
                return start + found
            start += len(block)
        return -1


Text = str | LongText


@dataclass(frozen=True)
class Place:
    """Where a document begins: `skip` characters after the place `cookie` (of `tell`) of an open file."""

    cookie: int = 0
    skip: int = 0


@dataclass(frozen=True)
class TextFile:
    """The documents of one file."""

    path: Path
    separator: str | None
    errors: str
    """`strict` or `replace`, for bytes that are not UTF-8."""

    def documents(self, place: Place | None = None) -> Iterator[tuple[Place, Text]]:
        """Every document from `place` on, where one begins, with its own place; empty ones too."""
        begun: list[str] = []
        size = 0
        here = place or Place()
        with self._opened() as file:
            for text, following in self._parts(file, here):
                size += len(text)
                if size <= LONG_CHARACTERS:
                    begun.append(text)
                else:
                    begun.clear()
                if following is not None:
                    long = size > LONG_CHARACTERS
                    yield here, LongText(partial(self._from, here), 0, size) if long else "".join(begun)
                    here, begun, size = following, [], 0
        # Whatever follows the last separator, and a file without one.
        long = size > LONG_CHARACTERS
        yield here, LongText(partial(self._from, here), 0, size) if long else "".join(begun)

    def _parts(self, file: TextIO, place: Place) -> Iterator[tuple[str, Place | None]]:
        """Consecutive text, and where it ends a document the place of the next one."""
        separator = None
        if self.separator is not None:
            # A line that equals it; the last line of a file needs no newline, but then a character.
            separator = re.compile(rf"^{re.escape(self.separator)}(?:\n|(?<=.)\Z)", re.MULTILINE)
        file.seek(place.cookie)
        cookie, line_begins, skip = place.cookie, True, place.skip
        while block := file.read(BLOCK_CHARACTERS):
            if separator is None:
                yield block[skip:], None
            else:
                if block[-1] != "\n":  # up to the line's end, or far enough to know it for no separator
                    block += file.readline(len(self.separator or "") + 2)
                done = skip
                # A document's place begins a line, so a part of a line to be passed by comes only with skip
                # = 0.
                search = skip if line_begins or skip else block.find("\n") + 1
                if line_begins or skip or search:
                    for found in separator.finditer(block, search):
                        yield block[done : found.start()], Place(cookie, found.end())
                        done = found.end()
                yield block[done:], None
                line_begins, cookie = block[-1] == "\n", file.tell()
            skip = 0

    def _from(self, place: Place, start: int) -> Iterator[str]:
        with self._opened() as file:
            file.seek(place.cookie)
            skip = place.skip + start
            while block := file.read(BLOCK_CHARACTERS):
                if skip < len(block):
                    yield block[skip:]
                skip = max(0, skip - len(block))

    def _opened(self) -> TextIO:
        return _OPEN.get(self.path.suffix, open)(self.path, "rt", encoding="utf-8", errors=self.errors)


def cut_at_words(text: Text, size: int, *, strict: bool) -> Iterator[str]:
    """`text` in parts of about `size` characters; the places depend on the text alone.

    GPT-2's pattern (Radford et al. 2019) gives the last white-space character before a word to that word or a
    token of its own, and lets no token hold letters and digits, so no token spans a cut. A stretch of
    WORD_CHARACTERS without such a place is a UserError where `strict`, and else cut anywhere.
    """
    blocks = (
        (text[at : at + size] for at in range(0, len(text), size)) if isinstance(text, str) else iter(text)
    )
    rest = ""
    for block in blocks:
        rest += block
        if len(rest) >= size and (cut := _last_cut(rest)):
            yield rest[:cut]
            rest = rest[cut:]
        elif len(rest) > WORD_CHARACTERS:
            if strict:
                raise UserError(
                    f"data.source: a document has {WORD_CHARACTERS:,} characters in which no word begins "
                    f"({rest[:30]!r}...), and a tokenizer takes a word whole; put line ends into it"
                )
            yield rest
            rest = ""
    yield rest


def _last_cut(text: str) -> int:
    """The last place in `text` where a word or a number begins; 0 = none."""
    for pattern in (WORD_BEGINS, _NUMBER_BEGINS):
        for start in (max(1, len(text) - (1 << 12)), 1):
            found = 0
            for match in pattern.finditer(text, start):
                found = match.start()
            if found:
                return found
    return 0
