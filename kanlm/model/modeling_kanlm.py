# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""The kanlm decoder: rotary attention and a feed-forward network (FFN) in pre-norm residual blocks.

Shapes: B batch, T new tokens, S tokens seen (cache included), D hidden size, H heads, C key-value heads, E
head dim, V vocabulary.

References: Vaswani et al. 2017 (attention), Su et al. 2021 (rotary embeddings), Zhang & Sennrich 2019
(RMSNorm), Ainslie et al. 2023 (grouped-query attention), Radford et al. 2019 (residual projections scaled by
depth).
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterator

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .basis import ExactBuffers
from .configuration_kanlm import KanLMConfig
from .ffn import build_ffn

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this transformers calls the keys and values seen: it was renamed in 5.24, and both names are taken."""


class KanLMRotaryEmbedding(ExactBuffers, LlamaRotaryEmbedding):
    """Llama's cosines and sines [B, T, E] of positions, and its scaled forms (`rope_parameters`)."""

    @staticmethod
    def compute_default_rope_parameters(config, *_, **__) -> tuple[torch.Tensor, float]:
        """Frequencies theta^(-2i/E), i < E/2 (Su et al. 2021, eq. 15), fp32 [E/2]; cos and sin unscaled."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0


class KanLMDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + FFN(norm(x)); [B, T, D] to [B, T, D]. The attention is Llama's."""

    def __init__(self, config: KanLMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)  # type: ignore[arg-type]
        self.mlp = build_ffn(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        # By position, as the cache has two names.
        attended, _ = self.self_attn(normed, position_embeddings, attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@contextlib.contextmanager
def draws_of(name: str, module: nn.Module) -> Iterator[None]:
    """Within, torch draws from generators seeded by `name`; afterwards they go on as if nothing was drawn."""
    devices = {parameter.device for parameter in module.parameters(recurse=False)} - {torch.device("meta")}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(cuda):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def declare_lora_targets():
    """Tell PEFT, where it has been imported, which layers its adapters of the LoRA kind take by default.

    They are those of the attention, which every architecture has.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, targets in vars(constants).items() if constants else ():
        if name.endswith("_TARGET_MODULES_MAPPING") and targets.get("llama") == ["q_proj", "v_proj"]:
            targets["kanlm"] = ["q_proj", "k_proj", "v_proj", "o_proj"]


class KanLMPreTrainedModel(PreTrainedModel):
    config: KanLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KanLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": KanLMDecoderLayer, "attentions": LlamaAttention}
    # Every key of a checkpoint must fit, but a base model may be read from under a head, or get a new head.
    # Not by _keys_to_ignore_on_load_unexpected: vLLM drops those keys, and with them an untied head.
    _required_prefixes: tuple[str, ...] = ("model.", "lm_head.")
    _optional_prefixes: tuple[str, ...] = ("lm_head.",)

    def __init__(self, config: KanLMConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # One number from torch's generator, before any layer draws from it: the seed of all named draws.
        self._draw_seed = int(torch.randint(2**62, (), device="cpu"))
        declare_lora_targets()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Normal weights of deviation `initializer_range`, unit norms, and what KAN modules ask for.

        Called children first. `transformers.initialization` skips what was loaded from a checkpoint. Each
        module draws from a generator of its own, seeded by its name: of two models built after the same
        `torch.manual_seed`, all modules that agree in name and shape start equal, whatever else differs.
        """
        with draws_of(f"{self._draw_seed} {self._name_of(module)}", module):
            super()._init_weights(module)
            if isinstance(module, KanLMDecoderLayer):
                depth = 2 * self.config.num_hidden_layers
                init.normal_(module.self_attn.o_proj.weight, std=self.config.initializer_range * depth**-0.5)
            elif hasattr(module, "reset_parameters") and not type(module).__module__.startswith("torch."):
                module.reset_parameters()  # type: ignore[operator]

    def _name_of(self, module: nn.Module) -> str:
        """The module's name in the model, or its class where it is not there (then nothing is shared)."""
        names = self.__dict__.get("_names")
        if names is None or id(module) not in names:
            names = {id(part): name for name, part in self.named_modules()}
            self.__dict__["_names"] = names
        return names.get(id(module), type(module).__name__)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # transformers skips modules without tensors of their own where the code was loaded with
        # trust_remote_code, to protect loaded weights from a careless _init_weights. Ours is careful, and a
        # layer's must not be skipped.
        super()._initialize_weights(module, is_custom_code=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, but a checkpoint whose parameters are not the model's is an error naming them.

        Raises:
            ValueError: parameters that the checkpoint lacks (they would be random), that the model has not,
                or of another shape. A new task head on the base model may be random; so may what differs in
                shape under `ignore_mismatched_sizes=True`, and what `output_loading_info=True` reports.
        """
        with_info = kwargs.pop("output_loading_info", False)
        ignore_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if pretrained_model_name_or_path is not None:
            reported = {"missing_keys": (), "unexpected_keys": ()} if with_info else {}
            cls._check_keys(pretrained_model_name_or_path, info | reported, ignore_sizes)
        return (model, info) if with_info else model

    @classmethod
    def _check_keys(cls, source, info: dict, ignore_sizes: bool):
        wrong = {
            "lacks": [key for key in info["missing_keys"] if key.startswith(cls._required_prefixes)],
            "has, and the model has not,": [
                key for key in info["unexpected_keys"] if not key.startswith(cls._optional_prefixes)
            ],
            "has in another shape": () if ignore_sizes else [key for key, *_ in info["mismatched_keys"]],
        }
        for what, keys in wrong.items():
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                raise ValueError(
                    f"{source}: the checkpoint {what} {', '.join(sorted(keys)[:3])}{more}; config.json and "
                    "weights must be of one model: export it again, or load it with the kanlm that wrote it"
                )


class KanLMModel(KanLMPreTrainedModel):
    """Embedding, decoder layers and final norm: input_ids [B, T] to last_hidden_state [B, T, D]."""

    _required_prefixes = ("",)

    def __init__(self, config: KanLMConfig):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            KanLMDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = KanLMRotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Exactly one of `input_ids` [B, T] and `inputs_embeds` [B, T, D]. Without an `attention_mask` and
        `past_key_values`, `position_ids` [B, T] that start anew within a row keep packed documents apart.

        Raises:
            ValueError: both inputs, neither of them, or no token.
        """
        pages = None
        if cache is not None and not isinstance(cache, Cache):
            # The pages of continuous batching: the attention's, or before 5.24 the attention function's.
            pages, cache = cache, None
            if CACHE != "cache":
                kwargs["cache"], pages = pages, None  # type: ignore[typeddict-unknown-key]
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of the two")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, D]
        if 0 in inputs_embeds.shape:
            raise ValueError("input_ids: no token; begin an empty text with bos_token_id")
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = positions.unsqueeze(0)

        # By position: what transformers 5.17 calls `past_key_values`, 5.24 calls `cache`.
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:  # after the mask, which sees packed documents without one
            past_key_values = DynamicCache(config=self.config)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:  # generation may leave early
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values if pages is None else pages,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)  # by position, as above


def kept_positions(hidden_states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The rows of hidden_states [B, T, D] whose logits are wanted: [B, K, D].

    `keep` is an int (the last positions; 0 = all), positions [K] of every sequence or [B, K] of each, or a
    boolean mask [B, T], which gives [number kept, D].
    """
    if isinstance(keep, int):
        return hidden_states[:, -keep:] if keep else hidden_states
    if keep.dtype == torch.bool and keep.dim() == 2:
        return hidden_states[keep]
    if keep.dim() == 2:
        return hidden_states.take_along_dim(keep.unsqueeze(-1), dim=1)
    return hidden_states[:, keep]


class KanLMForCausalLM(KanLMPreTrainedModel, GenerationMixin):
    """The decoder with a next-token head: input_ids [B, T] to logits [B, T, V]."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _optional_prefixes = ()

    def __init__(self, config: KanLMConfig):
        super().__init__(config)
        self.model = KanLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits, and with `labels` [B, T] (-100 = not scored) the loss in nats/token.

        The model shifts the labels itself; `shift_labels` are taken as they are. The loss is the mean over
        scored tokens, or their sum divided by `num_items_in_batch`. `logits_to_keep`: see `kept_positions`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        logits = self.lm_head(kept_positions(outputs.last_hidden_state, logits_to_keep))  # [B, T, V]
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss, logits, getattr(outputs, CACHE), outputs.hidden_states, outputs.attentions
        )


class KanLMForSequenceClassification(GenericForSequenceClassification, KanLMPreTrainedModel):
    """The decoder with a label for a text: input_ids [B, T] to logits [B, num_labels] of its last token."""

    def __init__(self, config: KanLMConfig):
        super(GenericForSequenceClassification, self).__init__(config)  # whose own would ask for trust again
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = KanLMModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


__all__ = ["KanLMForCausalLM", "KanLMForSequenceClassification", "KanLMModel", "KanLMPreTrainedModel"]
