"""The exported or converted model that a run begins with: `init_from` in its configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from kanlm.checksums import must_be_readable, verify
from kanlm.config import UserError, one_line
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.runs import RunDir, read_json


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
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != KanLMConfig.model_type:
        raise UserError(
            f"init_from: {folder} holds a {settings.get('model_type')!r} model; give a folder written by "
            "`kanlm export`"
        )
    try:
        return KanLMConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"init_from: {folder}/config.json: {one_line(error)}") from None


def initial_model(folder: str | Path, architecture: KanLMConfig) -> KanLMForCausalLM:
    """The fp32 model of `architecture` with the weights in `folder`.

    Raises:
        UserError: weights of another model.
    """
    try:
        return KanLMForCausalLM.from_pretrained(str(folder), config=architecture, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"init_from: {one_line(error)}") from None
