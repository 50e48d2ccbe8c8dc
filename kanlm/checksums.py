"""SHA256SUMS beside an exported model, and folders that cannot be read: the damaged file is named.

The file has the form of `sha256sum`, so `sha256sum -c SHA256SUMS` checks a folder without kanlm. It covers
weights, code, tokenizer and configuration; the model card, which changes with each evaluation, is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from kanlm.config import UserError, one_line
from kanlm.runs import file_sha256, named_errors

NAME = "SHA256SUMS"
_LEFT_OUT = (NAME, "README.md")
_AGAIN = "copy or export it again"
_NOT_THERE = (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError)


def checksums(folder: Path) -> str:
    """The content of SHA256SUMS for the files that lie in `folder`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in _LEFT_OUT)
    return "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)


def verify(folder: str | Path, only_present: bool = False) -> bool:
    """Whether `folder` has a SHA256SUMS; where it has, its files are those that were exported.

    With `only_present` a file may be missing.

    Raises:
        UserError: a file is missing or another one; names it.
    """
    folder = Path(folder)
    listed = folder / NAME
    if not listed.is_file():
        return False
    for expected, name in _entries(listed):
        if not (folder / name).is_file():
            if only_present:
                continue
            raise UserError(f"{folder / name}: missing, and {NAME} lists it; {_AGAIN}")
        if file_sha256(folder / name) != expected:
            raise UserError(
                f"{folder / name}: damaged or changed: not the file of {NAME}; {_AGAIN}, or delete {listed} "
                "if the change is yours"
            )
    return True


def _entries(listed: Path) -> Iterator[tuple[str, str]]:
    """(sha256, file name) of every line; UserError where one is not that."""
    for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
        expected, _, name = line.partition("  ")
        if len(expected) != 64 or not name or Path(name).name != name:
            raise UserError(f"{listed}: damaged: {line[:80]!r} is no checksum and file name; {_AGAIN}")
        yield expected, name


def downloaded(model: str | Path) -> Path | None:
    """The folder of the hub's cache that holds `model`, OWNER/NAME, verified; None for a model without sums.

    What its SHA256SUMS lists is downloaded where it is not there yet. Without a network files that are not
    in the cache are passed over, and so is a model whose SHA256SUMS is not.

    Raises:
        UserError: a file is another one than listed; names it.
    """
    try:
        listed = Path(hf_hub_download(str(model), NAME))
    except _NOT_THERE:  # the caller says so, in the words for models of any kind
        return None
    for _, name in _entries(listed):
        try:
            hf_hub_download(str(model), name, revision=listed.parent.name)
        except _NOT_THERE:
            continue
    verify(listed.parent, only_present=True)
    return listed.parent


def must_be_readable(folder: str | Path) -> None:
    """Raise where a JSON, tokenizer or safetensors file of `folder` is truncated or otherwise not one.

    Raises:
        UserError: names the file.
    """
    folder = Path(folder)
    for path in sorted(folder.glob("*.json")):
        try:
            with named_errors(path):
                json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {one_line(error)}; {_AGAIN}") from None
    if (path := folder / "tokenizer.json").is_file():
        try:
            # Two tokens of one id can be read, but lose one of their names when they are copied.
            Tokenizer.from_str(Tokenizer.from_file(str(path)).to_str())
        except Exception as error:  # tokenizers has no type of its own for it
            raise UserError(f"{path}: not a tokenizer: {one_line(error)}; {_AGAIN}") from None
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path}: not whole: {one_line(error)}; {_AGAIN}") from None
