"""Code that comes with a model or tokenizer is named and refused, unless its user has said that he trusts it.

transformers runs such code where a folder's config.json or tokenizer_config.json has an `auto_map` and the
caller trusts it. Classes of transformers, and those an imported package has registered (kanlm's own after
`import kanlm.model`), need no trust and are preferred to a copy in the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kanlm.config import UserError

FLAG = "read it, and pass --trust-remote-code (in Python trust_remote_code=True) if you trust it"


def refuse_model_code(model: str | Path) -> None:
    """Raise where loading the causal language model or the tokenizer in `model` needs code of its own.

    `model` is a folder or a hub id, of which only JSON is read.

    Raises:
        UserError: it does; the one line names the file.
        OSError: no model there.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings, _ = PreTrainedConfig.get_config_dict(str(model))
    kind = str(settings.get("model_type"))
    served = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    for file in [] if served else _files(settings.get("auto_map")):
        raise UserError(f"model {model}: its config.json wants to run {_place(model, file)}; {FLAG}")
    attention = str(settings.get("attn_implementation") or settings.get("_attn_implementation") or "")
    if "/" in attention:
        raise UserError(f"model {model}: its config.json wants to run the hub's {attention}; {FLAG}")
    refuse_tokenizer_code(model, f"model {model}", FLAG)


def refuse_tokenizer_code(folder: str | Path, where: str, remedy: str) -> None:
    """Raise where the tokenizer in `folder` (or hub id) needs code of its own; `where` begins the line.

    Raises:
        UserError: it does; the one line names the file.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    for file in _files(get_tokenizer_config(str(folder)).get("auto_map")):
        raise UserError(f"{where}: its tokenizer_config.json wants to run {_place(folder, file)}; {remedy}")


def _files(auto_map: Any) -> Iterator[str]:
    """The Python files of an auto_map, whose values are `[other/repository--]module.Class`, or lists."""
    if isinstance(auto_map, dict):
        auto_map = list(auto_map.values())
    if isinstance(auto_map, (list, tuple)):
        for value in auto_map:
            yield from _files(value)
    elif auto_map:
        repository, _, reference = str(auto_map).rpartition("--")
        file = reference.rpartition(".")[0].replace(".", "/") + ".py"
        yield f"{repository}: {file}" if repository else file


def _place(folder: str | Path, file: str) -> str:
    return file if ":" in file or not Path(folder).is_dir() else str(Path(folder) / file)
