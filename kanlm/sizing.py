"""Sizes before training: the architecture of a run, parameters, FLOPs, memory, and matched widths."""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any

from kanlm.config import RunConfig, UserError

if TYPE_CHECKING:
    from kanlm.model.configuration_kanlm import KanLMConfig


def architecture(config: RunConfig, vocab_size: int, **token_ids: int | None) -> KanLMConfig:
    """The `KanLMConfig` of a run whose tokenizer has `vocab_size` entries.

    `[model]` keys are checked against the fields of KanLMConfig. `vocab_size` defaults to the tokenizer's
    size and `max_position_embeddings` to `data.block_size`; `token_ids` (bos_token_id, eos_token_id,
    pad_token_id) are defaults too. UserError for an unknown key, a wrong type or shape, a tokenizer larger
    than the vocabulary, or blocks longer than the positions.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PreTrainedConfig

    from kanlm.model.configuration_kanlm import KanLMConfig

    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"format_version"}
    known = sorted({field.name for field in dataclasses.fields(KanLMConfig)} - inherited)
    for key in config.model:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"model.{key}: unknown key; {hint}")
    values: dict[str, Any] = {
        **token_ids,
        "vocab_size": vocab_size,
        "max_position_embeddings": config.data.block_size,
        **config.model,
    }
    try:
        architecture = KanLMConfig(**values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        where = "model." if isinstance(error, ValueError) else "model: "
        raise UserError(where + message) from None
    if architecture.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size: got {architecture.vocab_size}, but the tokenizer has {vocab_size} entries; "
            f"leave the key out or set at least {vocab_size}"
        )
    if architecture.max_position_embeddings < config.data.block_size:
        raise UserError(
            f"data.block_size: got {config.data.block_size}, more than model.max_position_embeddings "
            f"{architecture.max_position_embeddings}; lower the one or raise the other"
        )
    return architecture
