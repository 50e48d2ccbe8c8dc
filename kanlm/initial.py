"""What a run can train: kanlm's own models, and those that `kanlm convert` made of other families.

`init_from` names the exported or converted folder that a run begins with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from kanlm.checksums import must_be_readable, verify
from kanlm.config import UserError, one_line
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.kan import KANLinear, LearnedFunction
from kanlm.model.modeling_converted import CONVERTED, register
from kanlm.runs import RunDir

CLASSES: dict[str, Any] = {
    kind.config_class.model_type: kind for kind in (KanLMForCausalLM, *CONVERTED.values())
}
"""Class of a model that can be trained, by its `model_type`."""
DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")


def initial_config(folder: str | Path) -> Any:
    """The architecture of the exported or converted model in `folder`: KanLMConfig, or that of its family.

    Raises:
        UserError: no folder of such a model, or a damaged file in it.
    """
    folder = Path(folder)
    if RunDir(folder).record.is_file():
        raise UserError(
            f"init_from: {folder} is a run, not a model; run `kanlm export` and give {RunDir(folder).hf}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"init_from: {folder} has no config.json; give a folder written by `kanlm export`")
    verify(folder)
    must_be_readable(folder)
    settings, _ = PreTrainedConfig.get_config_dict(folder)
    kind = settings.get("model_type")
    if kind not in CLASSES:
        raise UserError(
            f"init_from: {folder} holds a {kind!r} model; give a folder written by `kanlm export` or "
            "`kanlm convert`"
        )
    try:
        return config_of(settings)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"init_from: {folder}/config.json: {one_line(error)}") from None


def config_of(settings: dict[str, Any]) -> Any:
    """The config that `settings`, a config.json or a checkpoint's model.json, describe."""
    kind = settings.get("model_type", KanLMConfig.model_type)
    if kind != KanLMConfig.model_type:
        register()  # what is saved of a converted model then has its code beside it
    return CLASSES[kind].config_class.from_dict(settings)


def model_class(config: Any) -> Any:
    """The class of causal language models with this config."""
    return CLASSES[config.model_type]


def decoder_layers(model: nn.Module) -> Any:
    """The decoder layers of a causal language model, each with its feed-forward block as `mlp`."""
    decoder = cast(Any, model).base_model
    return decoder.layers if hasattr(decoder, "layers") else decoder.h  # GPT-2's


def tied_weights(config: Any) -> dict[str, str]:
    """The parameter that a state dict repeats and a file leaves out, and the one that it is tied to."""
    return dict(model_class(config)._tied_weights_keys) if config.tie_word_embeddings else {}


def has_dropout(config: Any) -> bool:
    """Whether a training step draws random numbers."""
    return any((getattr(config, name, None) or 0.0) > 0 for name in DROPOUTS)


def kan_coefficient_names(model: nn.Module) -> set[str]:
    """Names of the parameters of `model` that are coefficients of learned functions.

    They get no weight decay and their own learning rate: decay pulls a function to zero, not to a simpler
    one.
    """
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, KANLinear | LearnedFunction):
            child = "spline.weight" if isinstance(module, KANLinear) else "coefficients"
            names.add(f"{prefix}.{child}" if prefix else child)
    return names
