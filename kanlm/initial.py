"""The architecture of the exported or converted model that a run begins with: `init_from`."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from kanlm.checksums import must_be_readable, verify
from kanlm.config import UserError, one_line
from kanlm.model import KanLMConfig
from kanlm.runs import RunDir


def initial_config(folder: str | Path) -> KanLMConfig:
    """The architecture of the kanlm model in `folder`.

    Raises:
        UserError: no folder of a kanlm model, or a damaged file in it.
    """
    folder = Path(folder)
    if RunDir(folder).record.is_file():
        raise UserError(
            f"init_from: {folder} is a run, not a model; run `kanlm export` and give {RunDir(folder).hf}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"init_from: {folder} has no config.json; give a folder written by `kanlm export`")
    must_be_readable(folder)
    verify(folder)
    settings, _ = KanLMConfig.get_config_dict(folder)
    if settings.get("model_type") != KanLMConfig.model_type:
        raise UserError(
            f"init_from: {folder} holds a {settings.get('model_type')!r} model; give a folder written by "
            "`kanlm export`"
        )
    try:
        return KanLMConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"init_from: {folder}/config.json: {one_line(error)}") from None
