"""Token caches on a shared file system: published once, copied to the local disk where they are used.

    URL/recipes/KEY.json        which folders are those of a `[data]` and `[tokenizer]` table
    URL/tokenizers/NAME/        the tokenizer
    URL/tokens/SPLIT-KEY/       a token cache as in `kanlm.data.cache`

KEY is that of the tables alone, so a machine without the text can use them. The recipe is written last and
read first. URL is any that fsspec knows; a data set repository of the hub (hf://datasets/OWNER/NAME) gets
one commit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock
from fsspec import AbstractFileSystem
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from kanlm.config import RunConfig, SourceConfig, UserError, one_line
from kanlm.runs import file_sha256, fsync_folder, fsync_one, json_sha256, read_json, write_json

HUB = "hf://datasets/"
_FIELDS = (
    *(name for name in SourceConfig.model_fields if name != "weight"),
    "validation_source",
    "validation_split",
    "validation_fraction",
    "mixture",
    "invalid_utf8",
    "max_documents",
)
"""Of `[data]`: what decides the text."""
_FAILURES = (OSError, ValueError, ImportError, HfHubHTTPError, HFValidationError)


@dataclass(frozen=True)
class Published:
    """Folders of one recipe, on the local disk."""

    tokenizer: Path
    train: tuple[Path, ...]
    validation: Path

    def folders(self, split: str) -> tuple[Path, ...]:
        return self.train if split == "train" else (self.validation,)


def recipe_key(config: RunConfig) -> str:
    """Of the tables that decide tokenizer and text."""
    table = config.data.model_dump(mode="json", include=set(_FIELDS))
    tokenizer = [config.init_from, config.tokenizer.model_dump(mode="json")]
    return json_sha256([table, tokenizer], sort_keys=True)[:16]


def must_be_place(url: str) -> None:
    """Raise, before anything is tokenised, where `url` can be no place to publish at.

    Raises:
        UserError: fsspec does not know the protocol, its driver is missing, or it names half a repository.
    """
    if url.startswith(HUB) and len([part for part in url.removeprefix(HUB).split("/") if part]) < 2:
        raise UserError(f"--push: {url!r} names no repository; write {HUB}OWNER/NAME")
    with _one_line_errors(f"--push: {url!r}", "written"):
        fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0] or "file")


def publish(config: RunConfig, url: str, local: Published) -> str:
    """Copy `local` to `url`, but for shards that are there already; the recipe's address there."""
    recipe = {
        "tokenizer": f"tokenizers/{local.tokenizer.name}",
        "train": [f"tokens/{folder.name}" for folder in local.train],
        "validation": f"tokens/{local.validation.name}",
        "data": config.data.model_dump(mode="json", include=set(_FIELDS)),
        "tokenizer_config": config.tokenizer.model_dump(mode="json"),
    }
    folders = dict(
        zip((recipe["tokenizer"], *recipe["train"], recipe["validation"]), _all(local), strict=True)
    )
    files = [
        (path, f"{there}/{path.name}")
        for there, folder in folders.items()
        for path in sorted(folder.iterdir())
    ]
    name = f"recipes/{recipe_key(config)}.json"
    record = Path(config.data.cache_dir) / name
    write_json(record, recipe)
    with _one_line_errors(f"--push: {url!r}", "written"):
        if url.startswith(HUB):
            _commit(url.removeprefix(HUB), [*files, (record, name)])
        else:
            system, root = fsspec.url_to_fs(url)
            for path, there in [*files, (record, name)]:
                _put(system, path, f"{root}/{there}")
    return f"{url}/{name}"


def _all(local: Published) -> tuple[Path, ...]:
    return (local.tokenizer, *local.train, local.validation)


def _put(system: AbstractFileSystem, path: Path, there: str) -> None:
    """Shards never change under their name; the small files are written each time, the recipe last."""
    size = path.stat().st_size
    if path.suffix == ".bin" and system.exists(there) and system.size(there) == size:
        return
    system.makedirs(there.rpartition("/")[0], exist_ok=True)
    system.put_file(str(path), there)


def _commit(repository: str, files: list[tuple[Path, str]]) -> None:
    owner, name, *rest = repository.strip("/").split("/")
    folder = "".join(f"{part}/" for part in rest)
    hub, where = HfApi(), f"{owner}/{name}"
    hub.create_repo(where, repo_type="dataset", private=True, exist_ok=True)
    additions = [
        CommitOperationAdd(path_in_repo=folder + there, path_or_fileobj=path) for path, there in files
    ]
    hub.create_commit(where, additions, commit_message="Token caches of kanlm", repo_type="dataset")


def published(config: RunConfig) -> Published:
    """The folders of `config`, copied from `data.cache_url` into `data.cache_dir` where they are not there.

    UserError where nothing is published for these tables, a driver is missing, the place cannot be reached,
    or a file that arrives is not what its manifest says.
    """
    url, here = config.data.cache_url, Path(config.data.cache_dir)
    assert url is not None
    name = f"recipes/{recipe_key(config)}.json"
    here.mkdir(parents=True, exist_ok=True)
    with FileLock(here / "published.lock"):
        record = here / name
        recipe = read_json(record) if record.is_file() else None
        if recipe is None or not all((here / folder).is_dir() for folder in _folders(recipe)):
            with _one_line_errors(f"data.cache_url: {url!r}", "read"):
                system, root = fsspec.url_to_fs(url)
                if not system.exists(f"{root}/{name}"):
                    raise UserError(
                        f"data.cache_url: {url!r} holds no tokens of this [data] and [tokenizer] ({name}); "
                        f"publish them first: kanlm tokenize CONFIG --push {url}"
                    )
                system.invalidate_cache()
                recipe = json.loads(system.cat_file(f"{root}/{name}"))
                for folder in _folders(recipe):
                    _get(system, f"{root}/{folder}", here / folder)
            write_json(record, recipe)
    return Published(
        here / recipe["tokenizer"],
        tuple(here / folder for folder in recipe["train"]),
        here / recipe["validation"],
    )


def _folders(recipe: dict[str, Any]) -> list[str]:
    return [recipe["tokenizer"], *recipe["train"], recipe["validation"]]


def _get(system: AbstractFileSystem, there: str, folder: Path) -> None:
    """Copy one folder; files of a copy that was stopped are kept where they are whole."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.copy")
    partial.mkdir(parents=True, exist_ok=True)
    files = [path for path in system.ls(there, detail=False) if not path.endswith("/")]
    if f"{there}/manifest.json" in files or any(path.endswith("/manifest.json") for path in files):
        system.get_file(f"{there}/manifest.json", str(partial / "manifest.json"))
        shards = {shard["file"]: shard["sha256"] for shard in read_json(partial / "manifest.json")["shards"]}
    else:
        shards = {}
    for path in files:
        name = path.rpartition("/")[2]
        local = partial / name
        if name in shards and local.is_file() and file_sha256(local) == shards[name]:
            continue
        system.get_file(path, str(local))
        if name in shards and file_sha256(local) != shards[name]:
            local.unlink()
            raise UserError(
                f"data.cache_url: {path}: damaged (sha256 differs from its manifest); publish it again"
            )
    if missing := sorted(shards.keys() - {path.rpartition("/")[2] for path in files}):
        raise UserError(
            f"data.cache_url: {there}/{missing[0]}: missing, but listed in manifest.json; publish it again"
        )
    fsync_folder(partial)
    os.rename(partial, folder)
    fsync_one(folder.parent)


@contextmanager
def _one_line_errors(where: str, done: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ImportError as error:  # fsspec says which package has the driver
        raise UserError(f"{where} needs a driver: {one_line(error)}") from None
    except _FAILURES as error:
        raise UserError(f"{where} cannot be {done}: {one_line(error)}") from None
