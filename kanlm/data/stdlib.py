"""The embedded default corpus: the Python standard library's own sources, read where Python is installed.

Nothing is downloaded and nothing is shipped. The text differs between Python versions and builds, so its
sha256 is printed: losses compare only where it is the same.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sysconfig
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


@dataclass(frozen=True)
class StandardLibrary:
    """Texts of the files in the order of their paths, with what identifies them."""

    texts: tuple[str, ...]
    bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"stdlib: {len(self.texts)} files, {self.bytes:,} bytes, sha256 {self.sha256[:16]}, {LICENCE}"


@cache
def standard_library(folder: str | None = None) -> StandardLibrary:
    """The .py files below `folder` (default: this Python's library) that every installation has.

    Files that are not UTF-8 are left out. sha256 covers the relative paths and the bytes of all files.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    digest, texts, total = hashlib.sha256(), [], 0
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
        total += len(content)
    library = StandardLibrary(tuple(texts), total, digest.hexdigest())
    logger.info("%s", library)
    return library
