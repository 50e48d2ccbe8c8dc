# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""Causal language models of other families with learned functions in their feed-forward blocks.

The original class is kept, with its attention, norms and biases. Its activation, a module of its own in
these families, becomes activation + a learned function that starts at zero, so the model starts unchanged.
`config.kan` is a dict: `arm` and the fields of `functions` or `edges`.

| arm | block | where |
|---|---|---|
| `kan_glu` | down(phi(gate u) * up u) | gated blocks (Llama's) |
| `kan_act` | down(phi(up u)) | plain blocks (GPT-2's) |
| `kan_grouped` | down(phi2(up phi1(u))) | plain blocks |
| `kan` | two layers of edge functions in the place of the block | both |

Shapes: B batch, T time, C channels.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from .ffn import FeedForward
from .ffn_kan import FullKAN
from .kan import KANLinear
from .learned_function import LearnedFunction

GATED_ARMS = ("kan_glu", "kan")
PLAIN_ARMS = ("kan_act", "kan_grouped", "kan")


class LearnedActivation(nn.Module):
    """act(x) + phi(x), [..., C] to [..., C]; phi starts at zero."""

    def __init__(self, act: nn.Module, phi: LearnedFunction):
        super().__init__()
        self.act, self.phi = act, phi

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) + self.phi(x)


class LearnedInput(nn.Module):
    """linear(x + phi(x)); phi starts at zero."""

    def __init__(self, linear: nn.Module, phi: LearnedFunction):
        super().__init__()
        self.linear, self.phi = linear, phi

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.phi(x))


def is_gated(block: Any) -> bool:
    """Whether `block` is down(act(gate u) * up u), as in Llama."""
    return all(hasattr(block, name) for name in ("act_fn", "gate_proj", "up_proj", "down_proj"))


def is_plain(block: Any) -> bool:
    """Whether `block` is c_proj(act(c_fc u)), as in GPT-2."""
    return all(hasattr(block, name) for name in ("act", "c_fc", "c_proj"))


def feed_forward_blocks(model: nn.Module) -> dict[str, Any]:
    """The blocks of either kind by name, in the order of the layers."""
    return {name: module for name, module in model.named_modules() if is_gated(module) or is_plain(module)}


def functions(kan: dict, channels: int) -> LearnedFunction:
    """Functions of `channels` that start at zero."""
    fields = ("groups", "basis", "grid_size", "order", "grid_min", "grid_max")
    return LearnedFunction(channels, initial="zero", **{name: kan[name] for name in fields})


def edges(kan: dict, hidden_size: int, layers: int, initializer_range: float) -> FullKAN:
    """A block of edge functions, `kan["intermediate_size"]` wide, whitened, each with a SiLU branch."""
    fields = {f"kan_{name}": kan[name] for name in ("basis", "grid_size", "order", "grid_min", "grid_max")}
    settings = SimpleNamespace(
        hidden_size=hidden_size,
        intermediate_size=kan["intermediate_size"],
        num_hidden_layers=layers,
        initializer_range=initializer_range,
        rms_norm_eps=1e-6,
        hidden_norm=False,
        kan_base="silu",
        kan_conditioning="whitened",
        **fields,
    )
    return FullKAN(settings)


def with_learned_functions(model: Any, kan: dict):
    """Put the functions of `kan` into every feed-forward block of `model`.

    Raises:
        ValueError: an arm that the blocks cannot take, or what `LearnedFunction` and `KANLinear` refuse.
    """
    blocks = feed_forward_blocks(model)
    for name, block in blocks.items():
        known = GATED_ARMS if is_gated(block) else PLAIN_ARMS
        if kan["arm"] not in known:
            raise ValueError(
                f"arm: {kan['arm']!r} does not fit the {'gated' if is_gated(block) else 'plain'} blocks of "
                f"{type(model).__name__}; choose one of {', '.join(known)}"
            )
        if kan["arm"] == "kan":
            config = model.config
            model.set_submodule(
                name, edges(kan, config.hidden_size, config.num_hidden_layers, config.initializer_range)
            )
        elif is_gated(block):
            block.act_fn = LearnedActivation(block.act_fn, functions(kan, block.gate_proj.out_features))
        else:
            width, hidden = block.c_fc.weight.shape  # transformers' Conv1D: [in, out]
            block.act = LearnedActivation(block.act, functions(kan, hidden))
            if kan["arm"] == "kan_grouped":
                block.c_fc = LearnedInput(block.c_fc, functions(kan, width))


class LearnedFunctionsMixin:
    """Before the class of a causal LM: the same model with the learned functions of `config.kan`."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        with_learned_functions(self, config.kan)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, (KANLinear, LearnedFunction, FeedForward)):
            module.reset_parameters()


class KanLlamaConfig(LlamaConfig):
    model_type = "kanlm_llama"


class KanMistralConfig(MistralConfig):
    model_type = "kanlm_mistral"


class KanQwen2Config(Qwen2Config):
    model_type = "kanlm_qwen2"


class KanQwen3Config(Qwen3Config):
    model_type = "kanlm_qwen3"


class KanSmolLM3Config(SmolLM3Config):
    model_type = "kanlm_smollm3"


class KanGPT2Config(GPT2Config):
    model_type = "kanlm_gpt2"


class KanLlamaForCausalLM(LearnedFunctionsMixin, LlamaForCausalLM):
    config_class = KanLlamaConfig


class KanMistralForCausalLM(LearnedFunctionsMixin, MistralForCausalLM):
    config_class = KanMistralConfig


class KanQwen2ForCausalLM(LearnedFunctionsMixin, Qwen2ForCausalLM):
    config_class = KanQwen2Config


class KanQwen3ForCausalLM(LearnedFunctionsMixin, Qwen3ForCausalLM):
    config_class = KanQwen3Config


class KanSmolLM3ForCausalLM(LearnedFunctionsMixin, SmolLM3ForCausalLM):
    config_class = KanSmolLM3Config


class KanGPT2LMHeadModel(LearnedFunctionsMixin, GPT2LMHeadModel):
    config_class = KanGPT2Config


CONVERTED: dict[str, Any] = {
    "llama": KanLlamaForCausalLM,
    "mistral": KanMistralForCausalLM,
    "qwen2": KanQwen2ForCausalLM,
    "qwen3": KanQwen3ForCausalLM,
    "smollm3": KanSmolLM3ForCausalLM,
    "gpt2": KanGPT2LMHeadModel,
}
"""Class of a converted model by the `model_type` of the original."""


def register():
    """Make transformers' Auto classes know converted models, and save_pretrained copy this code."""
    for kind in CONVERTED.values():
        AutoConfig.register(kind.config_class.model_type, kind.config_class, exist_ok=True)
        AutoModelForCausalLM.register(kind.config_class, kind, exist_ok=True)
        kind.config_class.register_for_auto_class()
        kind.register_for_auto_class("AutoModelForCausalLM")
