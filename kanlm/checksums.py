"""SHA256SUMS beside an exported model, and folders that cannot be read: the damaged file is named.

The file has the form of `sha256sum`, so `sha256sum -c SHA256SUMS` checks a folder without kanlm. It covers
weights, code, tokenizer and configuration; the model card, which changes with each evaluation, is left out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from kanlm.config import UserError, one_line

NAME = "SHA256SUMS"
_LEFT_OUT = (NAME, "README.md")
_AGAIN = "copy or export it again"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> str:
    """The content of SHA256SUMS for the files that lie in `folder`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in _LEFT_OUT)
    return "".join(f"{sha256(path)}  {path.name}\n" for path in files)


def verify(folder: str | Path) -> bool:
    """Whether `folder` has a SHA256SUMS; where it has, its files are those that were exported.

    Raises:
        UserError: a file is missing or another one; names it.
    """
    folder = Path(folder)
    listed = folder / NAME
    if not listed.is_file():
        return False
    for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
        expected, _, name = line.partition("  ")
        if len(expected) != 64 or not name or Path(name).name != name:
            raise UserError(f"{listed}: damaged: {line[:80]!r} is no checksum and file name; {_AGAIN}")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, and {NAME} lists it; {_AGAIN}")
        if sha256(folder / name) != expected:
            raise UserError(
                f"{folder / name}: damaged or changed: not the file of {NAME}; {_AGAIN}, or delete {listed} "
                "if the change is yours"
            )
    return True


def must_be_readable(folder: str | Path) -> None:
    """Raise where a JSON, tokenizer or safetensors file of `folder` is truncated or otherwise not one.

    Raises:
        UserError: names the file.
    """
    folder = Path(folder)
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {one_line(error)}; {_AGAIN}") from None
    if (path := folder / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers has no type of its own for it
            raise UserError(f"{path}: not a tokenizer: {one_line(error)}; {_AGAIN}") from None
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path}: not whole: {one_line(error)}; {_AGAIN}") from None
