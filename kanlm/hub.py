"""Exported models on the Hugging Face Hub: `kanlm export RUN --push-to-hub OWNER/NAME`.

One commit a model, so that a broken connection leaves no half of one. A comparison becomes one model for each
arm, the first seed's so that none is picked by its result, and a collection of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from kanlm.checksums import verify
from kanlm.compare.artifacts import CompareDir, load
from kanlm.config import UserError, one_line
from kanlm.export import EVALUATION, card_of, export
from kanlm.runs import RunDir, read_json

HTTP_ERRORS = (OSError, *HfHubHTTPError.__bases__)
"""OSError, and what the HTTP library of this huggingface_hub raises, which changed between versions."""


@dataclass(frozen=True)
class Upload:
    """An exported folder and the repository that it goes to."""

    folder: Path
    repo: str

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def push(
    source: str | Path,
    repo: str,
    *,
    out: str | Path | None = None,
    private: bool = True,
    dry_run: bool = False,
    echo: Callable[[str], Any] = print,
) -> list[str]:
    """Push `source` (a run, an exported folder or a comparison) to the Hub as `repo`; the addresses.

    A run that is not exported yet is exported to `out` first. With `dry_run` the files are listed and nothing
    is sent.

    Raises:
        UserError: no token, an impossible or public repository, a folder that is not as it was exported, or
            what the Hub answered.
    """
    check_name(repo)
    if not dry_run and not get_token():
        raise UserError(
            "--push-to-hub: no token of the Hub here; run `hf auth login`, set HF_TOKEN, or see what would "
            "be sent with --dry-run"
        )
    compared = CompareDir(source).plan.is_file()
    uploads = arm_uploads(source, repo) if compared else [Upload(exported_folder(source, out), repo)]
    for upload in uploads:
        verify(upload.folder)
        if dry_run:
            echo(listing(upload, private))
        if "Not evaluated yet" in evaluation_of(upload.folder):
            echo(f"{upload.folder}: not evaluated yet; kanlm eval {upload.folder} --data ... --card")
    if dry_run:
        return []
    try:
        addresses = [sent(upload, private) for upload in uploads]
        if compared:
            title = read_json(CompareDir(source).compare)["config"]["name"]
            addresses.append(collected(title, addresses, private))
    except HTTP_ERRORS as error:  # type: ignore[misc]
        raise UserError(f"--push-to-hub: {repo}: {one_line(error)}") from None
    for address in addresses:
        echo(address)
    return addresses


def check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        rule = one_line(error).partition(" Use `repo_type`")[0].rstrip(".")
        raise UserError(f"--push-to-hub: {repo!r}: {rule}; write OWNER/NAME") from None


def exported_folder(source: str | Path, out: str | Path | None) -> Path:
    """The exported folder of the run `source`, written now where it is missing, or `source` itself."""
    if (Path(source) / "config.json").is_file() and "model_type" in read_json(Path(source) / "config.json"):
        return Path(source)
    folder = RunDir(source).hf if out is None else Path(out)
    return folder if folder.exists() else export(source, out)


def arm_uploads(source: str | Path, repo: str) -> list[Upload]:
    """One for each arm of the comparison in `source`, of its first seed that finished."""
    artifacts = load(source)
    final = [result for result in artifacts.results if result.trial.kind == "final"]
    matchings = {result.trial.matching for result in final}
    sizes = {result.trial.size for result in final}
    uploads: dict[str, Upload] = {}
    for result in sorted(final, key=lambda result: result.trial.seed):
        trial = result.trial
        folder = artifacts.directory.run(trial.name).hf
        if result.state != "finished" or not folder.is_dir():
            continue
        parts = [repo, trial.arm]
        parts += [trial.matching] if len(matchings) > 1 else []
        parts += [trial.size] if len(sizes) > 1 else []
        uploads.setdefault("-".join(parts), Upload(folder, "-".join(parts)))
    if not uploads:
        raise UserError(f"{source}: no arm has finished; run kanlm compare again to go on")
    return list(uploads.values())


def evaluation_of(folder: Path) -> str:
    """The evaluation section of the card in `folder`."""
    return card_of(folder).read_text(encoding="utf-8").partition(EVALUATION)[2]


def listing(upload: Upload, private: bool) -> str:
    total = sum(path.stat().st_size for path in upload.files)
    lines = [f"{upload.repo} ({'private' if private else 'public'}), {total:,} bytes; nothing is sent:"]
    return "\n".join(
        [
            *lines,
            *(f"  {path.stat().st_size:>12,}  {path.relative_to(upload.folder)}" for path in upload.files),
        ]
    )


def sent(upload: Upload, private: bool) -> str:
    """Send one model; its address. A repository that is public is used only where `private` is off."""
    api = HfApi()
    try:
        if private and not api.model_info(upload.repo).private:
            raise UserError(f"--push-to-hub: {upload.repo} is public already; add --public, or take another")
    except RepositoryNotFoundError:
        pass
    created = api.create_repo(upload.repo, private=private, exist_ok=True)
    api.upload_folder(
        folder_path=upload.folder, repo_id=created.repo_id, commit_message="Model exported by kanlm"
    )
    return str(created)


def collected(title: str, addresses: list[str], private: bool) -> str:
    """A collection of the models at `addresses`; its address."""
    api = HfApi()
    repos = ["/".join(address.rstrip("/").split("/")[-2:]) for address in addresses]
    owner = repos[0].partition("/")[0]
    collection = api.create_collection(
        f"{title}: arms of one comparison", namespace=owner, private=private, exists_ok=True
    )
    for repo in repos:
        api.add_collection_item(collection.slug, item_id=repo, item_type="model", exists_ok=True)
    return collection.url
