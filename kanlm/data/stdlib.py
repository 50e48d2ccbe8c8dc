"""The embedded default corpus: the Python standard library's own sources, read where Python is installed.

Nothing is downloaded and nothing is shipped. The text differs between Python versions and builds, so the
version and the text's sha256 are said: losses compare only where they are the same. Files are held out by
their path, so that the same ones are in every version, and a file much like one of them is not trained on.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import sysconfig
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

LICENCE = "PSF-2.0"
MINIMUM_BYTES = 2_000_000
"""With less text than this (a zipped or stripped Python) the corpus is not worth training on."""

# Parts that distributions leave out, that are built on the machine, or that hold tables instead of text.
_LEFT_OUT_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}
_LEFT_OUT_FILES = re.compile(
    r"^(_sysconfigdata.*|_?sysconfig_vars.*|sitecustomize|turtle"
    r"|encodings/(cp\d+\w*|iso8859_\d+|mac_\w+|koi8_\w|tis_620|hp_roman8|ptcp154|kz1048|palmos))\.py$"
)


LINE_CHARACTERS = 20
"""Shorter lines say nothing of where a text comes from."""
COMMON_LINES = 5
"""Lines that stand in more files than this are idioms, not copies."""
ALIKE = 0.5
"""Files are much alike where they share this part of the lines of the smaller one, and ten lines or more."""


@dataclass(frozen=True)
class StandardLibrary:
    """Texts of the files in the order of their paths, with what identifies them."""

    texts: tuple[str, ...]
    bytes: int
    sha256: str
    paths: tuple[str, ...] = ()
    """Relative to the library's folder, with `/`."""

    def __str__(self) -> str:
        return (
            f"stdlib: Python {platform.python_version()}, {len(self.texts)} files, {self.bytes:,} bytes, "
            f"sha256 {self.sha256[:16]}, {LICENCE}"
        )

    def keys(self) -> dict[str, tuple[str, ...]]:
        """By text: the keys it is held out by, its own first, then those of the files much like it."""
        own = {text: module_of(path) for path, text in zip(self.paths, self.texts, strict=True)}
        return {
            text: (key, *(own[other] for other in alike))
            for (text, key), alike in zip(own.items(), much_alike(list(own)), strict=True)
        }


def module_of(path: str) -> str:
    """`re` for re.py and re/__init__.py: what a module became a package in a later version keeps its key."""
    return path.removesuffix(".py").removesuffix("/__init__")


def much_alike(texts: list[str]) -> list[list[str]]:
    """For each of `texts` the others that are much like it (`ALIKE`)."""
    lines = [
        {line.strip() for line in text.splitlines() if len(line.strip()) >= LINE_CHARACTERS} for text in texts
    ]
    holders: dict[str, list[int]] = defaultdict(list)
    for place, found in enumerate(lines):
        for line in found:
            holders[line].append(place)
    shared: Counter[tuple[int, int]] = Counter()
    for places in holders.values():
        if 1 < len(places) <= COMMON_LINES:
            shared.update((a, b) for a in places for b in places if a != b)
    alike: list[list[str]] = [[] for _ in texts]
    for (a, b), count in sorted(shared.items()):
        if count >= max(10, ALIKE * min(len(lines[a]), len(lines[b]))):
            alike[a].append(texts[b])
    return alike


@cache
def standard_library(folder: str | None = None) -> StandardLibrary:
    """The .py files below `folder` (default: this Python's library) that every installation has.

    Files that are not UTF-8 are left out. sha256 covers the relative paths and the bytes of all files.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    digest, texts, paths, total = hashlib.sha256(), [], [], 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not _LEFT_OUT_FOLDERS.isdisjoint(relative.parts[:-1]) or _LEFT_OUT_FILES.match(
            relative.as_posix()
        ):
            continue
        if any(part.startswith("config-") for part in relative.parts[:-1]):
            continue
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        digest.update(relative.as_posix().encode() + b"\0" + hashlib.sha256(content).digest())
        texts.append(text)
        paths.append(relative.as_posix())
        total += len(content)
    library = StandardLibrary(tuple(texts), total, digest.hexdigest(), tuple(paths))
    logger.info("%s", library)
    return library
