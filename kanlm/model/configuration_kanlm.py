# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a kanlm model: its architecture, and nothing about how it is run.

Every mistake is an error at construction that names the field, its value, the rule and a remedy.
"""

import difflib
import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .basis import check_choice
from .ffn import arm_names, find_arm
from .ffn_kan import KAN_TYPES

FORMAT_VERSION = 1
"""Meaning of the fields and names of the parameters. Raised where an older checkpoint would load wrongly."""

POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "kan_grid_size", "kan_num_groups"),
)
"""Fields that are at least 1."""

FFN_TYPES = arm_names("mlp") + KAN_TYPES + arm_names("control")
"""The arms that kanlm brings; other packages may register more (ffn.py)."""


@strict
class KanLMConfig(PreTrainedConfig):
    r"""
    Decoder-only transformer: pre-norm blocks of rotary attention and a feed-forward network (FFN).

    Sizes: `vocab_size`, `hidden_size` (D), `intermediate_size` (h, the FFN's width), `num_hidden_layers`,
    `num_attention_heads`, `num_key_value_heads` (fewer = grouped-query attention; default: all heads),
    `head_dim` (default `hidden_size / num_attention_heads`), `max_position_embeddings` (tokens).

    FFN: `ffn_type` is one of `gelu`, `relu2` (plain MLP), `swiglu`, `geglu` (gated MLP), `kan_act` (MLP whose
    activation is learned), `kan_grouped` (learned functions before both matrices), `kan_glu` (gated, the
    gate's activation is learned), `kan_product` (the product of two learned functions), `kan` (two layers of
    edge functions), `kan_mixed` (mix, then edge functions), and the controls `polynorm` and `xielu`.
    `hidden_norm` puts an RMSNorm without parameters before the hidden activations, of both branches in a
    gated arm; `kan` and `kan_mixed` have it in either case.

    KAN: `kan_basis` with `kan_grid_size` (G intervals or functions) of order `kan_order` (B-splines: the
    degree) on [`kan_grid_min`, `kan_grid_max`]; `kan_base` (`silu` or `none`) adds a fixed branch beside the
    edge functions; `kan_conditioning` (`none` or `whitened`) is the form of the edge coefficients;
    `kan_num_groups` functions serve the channels of a layer of `kan_act`, `kan_grouped`, `kan_glu` and
    `kan_product`; `kan_glu_form` (`interpolated` or `residual`) says whether the gate's function starts as a
    spline fitted to SiLU or as SiLU plus a zero correction; `kan_initial` (`default`, `silu`, `gelu` or
    `gelu_wave`) what the function in the activation's place is at first, `default` the arm's own.

    `format_version` must be the one that this code reads; `kanlm_version` names the kanlm that exported it.

    Raises:
        ValueError: sizes that do not fit each other, unknown names, a key that is nearly one of these fields
            (other unknown keys are kept, as transformers does), another `format_version`.
        huggingface_hub.errors.StrictDataclassError: a field of the wrong type.
    """

    model_type = "kanlm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_tp_plan = {
        f"layers.*.self_attn.{name}_proj": "rowwise" if name == "o" else "colwise" for name in "qkvo"
    }
    """Of the attention; `__post_init__` adds the FFN where its channels do not depend on each other."""
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    attention_bias = False  # transformers' LlamaAttention reads it

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 680
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    ffn_type: str = "kan_glu"
    hidden_norm: bool = False
    kan_basis: str = "bspline"
    kan_grid_size: int = 16
    kan_order: int = 3
    kan_grid_min: float | int = -4.0
    kan_grid_max: float | int = 4.0
    kan_base: str = "silu"
    kan_conditioning: str = "none"
    kan_num_groups: int = 8
    kan_glu_form: str = "interpolated"
    kan_initial: str = "default"

    format_version: int = FORMAT_VERSION
    kanlm_version: str | None = None

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_kanlm.KanLMConfig",
                "AutoModel": "modeling_kanlm.KanLMModel",
                "AutoModelForCausalLM": "modeling_kanlm.KanLMForCausalLM",
                "AutoModelForSequenceClassification": "modeling_kanlm.KanLMForSequenceClassification",
            },
        )
        # Before the base class, so that a mistake is a plain one-line ValueError.
        self.validate_architecture()
        self.base_model_tp_plan = self.base_model_tp_plan | {
            f"layers.*.mlp.{name}": split for name, split in find_arm(self.ffn_type).tp_plan.items()
        }
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raise ValueError where fields contradict each other; `@strict` runs it again on saving."""
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: the checkpoint, by kanlm {self.kanlm_version or 'of unknown version'}, has "
                f"{self.format_version}, this code reads {FORMAT_VERSION}; load it with the kanlm "
                "that wrote it, or with trust_remote_code=True and the code beside the weights"
            )
        for field in POSITIVE:
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be at least 1, got {getattr(self, field)}")
        self._validate_attention()
        find_arm(self.ffn_type).check(self)
        for field in ("initializer_range", "rms_norm_eps"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field}: must be a finite number above 0, got {value}")

    def _refuse_misspelt(self, unknown):
        """ValueError for a key of `unknown` that must be a slip: transformers would keep it and read nothing.

        Names of transformers' own, such as `sep_token_id`, are near to a field too and stay.
        """
        if unknown.get("attention_bias"):
            raise ValueError("attention_bias: no layer of kanlm has a bias; leave it out")
        own = [name for name in vars(type(self)).get("__annotations__", {}) if not name.endswith("_token_id")]
        for key in unknown:
            cutoff = 0.5 if key.startswith("kan_") else 0.88  # such a key can be no one else's
            close = difflib.get_close_matches(key, own, n=1, cutoff=cutoff)
            if not hasattr(type(self), key) and (close or key.startswith("kan_")):
                hint = f"did you mean {close[0]!r}?" if close else "leave it out"
                raise ValueError(f"{key}: unknown field; {hint}")

    def _validate_attention(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim == self.hidden_size // heads and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads {heads}; "
                f"write {self.hidden_size // heads * heads or heads}, or set head_dim"
            )
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}; each "
                "key-value head serves the same number of heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: rotary embeddings turn pairs, so it is even, got {self.head_dim}")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        check_choice("rope_parameters: rope_type", rope_type, ("default", *sorted(ROPE_INIT_FUNCTIONS)))
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout: must lie in [0, 1), got {self.attention_dropout}")


__all__ = ["KanLMConfig"]
