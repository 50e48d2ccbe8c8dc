"""Sizes before training: the architecture of a run, parameters, FLOPs, memory, and matched widths.

D hidden_size, h intermediate_size, L layers, H heads of E channels, C key-value heads, V vocabulary, T block
size, K basis functions of a KAN function, I and O inputs and outputs of a layer. "Matrix parameters" take
part in a matrix product for every token: attention, FFN, and the output head (V D, tied or not), but not the
embedding lookup.

FLOPs (a multiply-add is 2), per token, forward and backward (twice the forward), without recomputation:
    matrix        6 x matrix parameters; a full-edge KAN layer is a matrix of I (K + 1) inputs
    attention     12 L H E T: scores and weighted values, causal mask not discounted
                  (Chowdhery et al. 2022, app. B)
    elementwise   3 x FLOPs of activations and basis functions, which each arm's class states;
                  exp, tanh and erf count as 1
The sum is what arms are matched by, so a KAN pays for the evaluation of its basis.

A converted model of another family is counted as a whole on a model built without memory, and of its
elementwise work learned functions and the activations beside them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from kanlm.config import MATCHING_TOLERANCE, RunConfig, UserError, did_you_mean, one_line
from kanlm.initial import decoder_layers, initial_config, kan_coefficient_names, model_class
from kanlm.model import KanLMConfig
from kanlm.model.ffn import FeedForward, arm_names, build_ffn, find_arm
from kanlm.model.kan import KANLinear
from kanlm.model.learned_function import SILU_FLOPS, LearnedFunction


def architecture(config: RunConfig, vocab_size: int | None = None, **token_ids: int | None) -> Any:
    """The `KanLMConfig` of a run whose tokenizer has `vocab_size` entries, or before it has a tokenizer; with
    `init_from` a converted model, the config of its family.

    `[model]` keys are checked against the fields of KanLMConfig. `vocab_size` defaults to the tokenizer's
    size and `max_position_embeddings` to `data.block_size`; `token_ids` (bos_token_id, eos_token_id,
    pad_token_id) are defaults too. UserError for an unknown key, a wrong type or shape, a tokenizer larger
    than the vocabulary, or blocks longer than the positions.
    """
    if config.init_from:
        return started_from(config, vocab_size)
    if vocab_size is None:
        vocab_size = planned_vocab_size(config)
    return new_architecture(config, vocab_size, **token_ids)


def new_architecture(config: RunConfig, vocab_size: int, **token_ids: int | None) -> KanLMConfig:
    """`architecture` of a run that begins with a model of its own."""
    refuse_unknown_keys(config)
    values: dict[str, Any] = {
        **token_ids,
        "vocab_size": vocab_size,
        "max_position_embeddings": config.data.block_size,
        **config.model,
    }
    try:
        found = KanLMConfig(**values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        where = "model." if isinstance(error, ValueError) else "model: "
        raise UserError(where + one_line(error)) from None
    refuse_what_does_not_fit(found, config, vocab_size)
    return found


def started_from(config: RunConfig, vocab_size: int | None) -> Any:
    """The architecture of `init_from`; UserError where `[model]` asks for another."""
    assert config.init_from is not None
    refuse_unknown_keys(config)
    found = initial_config(config.init_from)
    for key, value in config.model.items():
        if getattr(found, key, None) != value:
            raise UserError(
                f"model.{key}: got {value!r}, but the model of init_from has {getattr(found, key, None)!r}; "
                "leave the key out"
            )
    refuse_what_does_not_fit(found, config, vocab_size)
    return found


def refuse_unknown_keys(config: RunConfig) -> None:
    known = architecture_fields()
    for key in config.model:
        if key not in known:
            raise UserError(f"model.{key}: unknown key; {did_you_mean(key, known)}")


def refuse_what_does_not_fit(found: Any, config: RunConfig, vocab_size: int | None) -> None:
    """UserError for a tokenizer larger than the vocabulary, or blocks longer than the positions."""
    if vocab_size is not None and found.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size: got {found.vocab_size}, but the tokenizer has {vocab_size} entries; "
            f"leave the key out or set at least {vocab_size}"
        )
    if found.max_position_embeddings < config.data.block_size:
        raise UserError(
            f"data.block_size: got {config.data.block_size}, more than model.max_position_embeddings "
            f"{found.max_position_embeddings}; lower the one or raise the other"
        )


def planned_vocab_size(config: RunConfig) -> int:
    """`model.vocab_size`, else that of the tokenizer at `tokenizer.path`, else the one asked for."""
    vocab_size = config.model.get("vocab_size")
    if isinstance(vocab_size, int):
        return vocab_size
    if config.tokenizer.path:
        from kanlm.data.tokenizer import loaded_tokenizer

        return len(loaded_tokenizer(config.tokenizer.path))
    return config.tokenizer.vocab_size


def architecture_fields() -> list[str]:
    """Names of KanLMConfig's own fields that a user may set, sorted."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    inherited |= {"format_version", "kanlm_version"}
    return sorted({field.name for field in dataclasses.fields(KanLMConfig)} - inherited)


@dataclass(frozen=True)
class Counts:
    """Parameters of a model; `embedding` is the input's and, where it is not tied, the output's."""

    total: int
    embedding: int
    non_embedding: int
    ffn: int


def _head_channels(config: KanLMConfig) -> tuple[int, int]:
    """Channels of the queries, and of the keys (as of the values): H E and C E."""
    assert config.head_dim is not None and config.num_key_value_heads is not None  # the config fills them in
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def _attention_parameters(config: KanLMConfig) -> int:
    """Of one layer: q, k, v, o projections."""
    return 2 * sum(_head_channels(config)) * config.hidden_size


@dataclass(frozen=True)
class BlockCounts:
    """Parameters of one feed-forward block."""

    total: int
    matrices: int
    """Those that take part in a matrix product for every token."""
    coefficients: int
    """Those of learned functions; of edge functions they are a matrix."""


def meta_block(config: KanLMConfig) -> FeedForward:
    """A feed-forward block of `config` without memory (meta device)."""
    with torch.device("meta"):
        return build_ffn(config)


def block_counts(config: KanLMConfig) -> BlockCounts:
    """The parameters of a block of `config`."""
    block = meta_block(config)
    sizes = {name: parameter.numel() for name, parameter in block.named_parameters()}
    matrices = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
    coefficients = sum(sizes[name] for name in kan_coefficient_names(block))
    return BlockCounts(sum(sizes.values()), matrices, coefficients)


def parameter_counts(config: Any) -> Counts:
    """Parameters; of a KanLMConfig without building the model, equal to the numbers of the built one."""
    if not isinstance(config, KanLMConfig):
        return built_counts(config)
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    attention = config.num_hidden_layers * _attention_parameters(config)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    ffn = config.num_hidden_layers * block_counts(config).total
    non_embedding = attention + ffn + norms
    return Counts(embedding + non_embedding, embedding, non_embedding, ffn)


def meta_model(config: Any) -> Any:
    """The model without memory (meta device)."""
    with torch.device("meta"):
        return model_class(config)(config)


def built_counts(config: Any) -> Counts:
    """The same numbers, counted on the built model."""
    model = meta_model(config)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings.add(model.get_output_embeddings().weight)
    total = sum(p.numel() for p in model.parameters())
    embedding = sum(p.numel() for p in embeddings)
    ffn = sum(p.numel() for layer in decoder_layers(model) for p in layer.mlp.parameters())
    return Counts(total, embedding, total - embedding, ffn)


@dataclass(frozen=True)
class Flops:
    """Training FLOPs per token; see the module's convention."""

    matrix: int
    attention: int
    elementwise: int

    @property
    def total(self) -> int:
        return self.matrix + self.attention + self.elementwise


def training_flops(config: KanLMConfig, block_size: int) -> Flops:
    """FLOPs per token of a training step on blocks of `block_size` tokens, by kind."""
    layers, head = config.num_hidden_layers, config.vocab_size * config.hidden_size
    attention = 12 * layers * _head_channels(config)[0] * block_size
    projections = _attention_parameters(config)
    matrices = layers * (projections + block_counts(config).matrices)
    elementwise = layers * meta_block(config).count_flops()
    return Flops(6 * (matrices + head), attention, 3 * elementwise)


def converted_flops(config: Any, block_size: int) -> Flops:
    """`training_flops` of a converted model of another family, read from the model."""
    model = meta_model(config)
    matrices = sum(
        parameter.numel()
        for name, parameter in decoder_layers(model).named_parameters()
        if parameter.ndim > 1 and not name.endswith(".coefficients")
    )
    elementwise = 0
    for module in model.modules():
        if isinstance(module, LearnedFunction):  # the function, and the activation that it is added to
            elementwise += module.channels * (module.flops + 1 + SILU_FLOPS)
        elif isinstance(module, KANLinear):
            elementwise += module.in_features * module.flops
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 12 * config.num_hidden_layers * width * block_size
    return Flops(6 * (matrices + config.vocab_size * config.hidden_size), attention, 3 * elementwise)


def training_flops_per_token(config: Any, block_size: int) -> int:
    """`training_flops(...)` in all."""
    if not isinstance(config, KanLMConfig):
        return converted_flops(config, block_size).total
    return training_flops(config, block_size).total


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one device in a training step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    """Communication: DDP's gradient buckets, FSDP2's gathered layers."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


def memory_bytes(
    config: KanLMConfig,
    *,
    micro_batch_size: int,
    block_size: int,
    devices: int = 1,
    sharding: Literal["none", "ddp", "fsdp2"] = "none",
    mixed_precision: bool = True,
    optimizer: Literal["adamw", "muon"] = "adamw",
    kan_optimizer: Literal["adamw", "muon"] = "adamw",
    gradient_checkpointing: bool = False,
) -> Memory:
    """Estimated peak of a training step on one device, without allocator slack and CUDA's own memory.

    fp32 parameters and gradients (4 + 4 bytes each), Adam's two moments (8; Muon keeps one), half-precision
    activations under autocast. `ddp` holds all of it on every device and a copy of the gradients in buckets;
    `fsdp2` keeps 1/devices of it, and two decoder layers gathered at once.
    """
    if devices < 1 or (sharding == "none" and devices != 1):
        raise UserError(
            f"devices: got {devices} with sharding {sharding!r}; several devices need ddp or fsdp2"
        )
    counts = parameter_counts(config)
    layer = counts.non_embedding // config.num_hidden_layers
    share = devices if sharding == "fsdp2" else 1
    parameters = 4 * counts.total
    coefficients = config.num_hidden_layers * block_counts(config).coefficients
    by_muon = counts.non_embedding - coefficients if optimizer == "muon" else 0
    by_muon += coefficients if kan_optimizer == "muon" else 0
    moments = 8 * counts.total - 4 * by_muon
    half = 2 if mixed_precision else 4
    buffers = {
        "none": 0,
        "ddp": 4 * counts.total,
        "fsdp2": 2 * half * layer + 4 * layer + half * config.vocab_size * config.hidden_size,
    }[sharding]
    # Autocast keeps a copy of every matrix until backward; recomputed KAN layers and FSDP2 do not.
    recomputed = 0 if find_arm(config.ffn_type).keeps_casts else counts.ffn
    casts = half * (counts.total - recomputed) if mixed_precision and sharding != "fsdp2" else 0
    tokens = micro_batch_size * block_size
    return Memory(
        parameters=math.ceil(parameters / share),
        gradients=math.ceil(parameters / share),
        optimizer=math.ceil(moments / share),
        activations=tokens * _activation_bytes(config, half, gradient_checkpointing) + casts,
        buffers=buffers,
    )


def _saved_bytes(config: KanLMConfig, half: int) -> tuple[int, int]:
    """Bytes that one token leaves for backward in a decoder layer, and in the final norm.

    An RMSNorm keeps its fp32 input and normalised values, and each matrix its input: under autocast every
    matrix has a cast of its own, without it those that read one tensor share it. Attention keeps q, k, v and
    its output; the FFN says by itself what it keeps.
    """
    width = config.hidden_size
    heads, key_values = _head_channels(config)
    block = meta_block(config)
    readers = 3 + (2 if block.gated else 1)  # matrices that read a norm's output
    norms = 2 * 8 * width + half * width * (readers if half < 4 else 2)
    attention = half * (2 * heads + 2 * key_values)
    return norms + attention + block.saved_bytes(half), (8 + half) * width


def _activation_bytes(config: KanLMConfig, half: int, gradient_checkpointing: bool) -> int:
    """Bytes of activations a token at the end of the forward pass: what backward needs, and the logits thrice
    (as computed, in fp32, as log-probabilities). With checkpointing one layer is alive beside all layers'
    inputs.
    """
    layer, end = _saved_bytes(config, half)
    logits = (half + 4 + 4) * config.vocab_size
    if gradient_checkpointing:
        return config.num_hidden_layers * 4 * config.hidden_size + layer + end + logits
    return config.num_hidden_layers * layer + end + logits


def matched_size(config: KanLMConfig, matching: Literal["parameters", "flops"], block_size: int) -> float:
    """What `matching` makes equal: non-embedding parameters, or training FLOPs of a token."""
    if matching == "parameters":
        return parameter_counts(config).non_embedding
    return training_flops(config, block_size).total


def matched_architectures(
    runs: Mapping[str, RunConfig],
    reference: str,
    vocab_size: int,
    matching: Literal["parameters", "flops"] = "parameters",
) -> dict[str, tuple[KanLMConfig, float]]:
    """The architectures of `runs`, each as wide as makes it equal to that of `reference`; the mismatches.

    UserError where no width fits (`matched_width`).
    """
    start = {}
    for name, run in runs.items():
        table = dict(run.model)
        if name != reference:  # a width that every arm can have stands in until it is solved
            table["intermediate_size"] = table.get("kan_num_groups", KanLMConfig().kan_num_groups)
        start[name] = new_architecture(run.model_copy(update={"model": table}), vocab_size)
    block_size = runs[reference].data.block_size
    target = matched_size(start[reference], matching, block_size)
    return {
        name: (model, 0.0)
        if name == reference
        else matched_width(model, model.ffn_type, target, matching, block_size)
        for name, model in start.items()
    }


def matched_width(
    config: KanLMConfig,
    ffn_type: str,
    target: float,
    matching: Literal["parameters", "flops"] = "parameters",
    block_size: int | None = None,
) -> tuple[KanLMConfig, float]:
    """`config` with `ffn_type` and the intermediate_size that fits `target`; the relative mismatch (signed).

    `target`: non-embedding parameters, or training FLOPs per token on blocks of `block_size` (default: the
    model's positions). Widths with a high power of two up to 64 are preferred where they fit within half the
    tolerance. UserError where no width fits within MATCHING_TOLERANCE.
    """
    if matching not in MATCHING_TOLERANCE:
        raise UserError(f"matching: expected parameters or flops, got {matching!r}")
    tolerance = MATCHING_TOLERANCE[matching]
    block_size = block_size or config.max_position_embeddings
    fields = {name: getattr(config, name) for name in architecture_fields()}
    step = find_arm(ffn_type).width_step(config)

    def candidate(width: int) -> KanLMConfig:
        return KanLMConfig(**{**fields, "ffn_type": ffn_type, "intermediate_size": width})

    def size(width: int) -> float:
        return matched_size(candidate(width), matching, block_size)

    # The size is linear in the width.
    one, two = size(step), size(2 * step)
    exact = step * (1 + (target - one) / (two - one))
    best: tuple[int, float] | None = None
    for alignment in (64, 32, 16, 8, 4, 2, 1):
        multiple = math.lcm(alignment, step)
        width = max(multiple, round(exact / multiple) * multiple)
        mismatch = size(width) / target - 1
        if abs(mismatch) <= tolerance / 2:
            return candidate(width), mismatch
        if best is None or abs(mismatch) < abs(best[1]):
            best = (width, mismatch)
    assert best is not None
    width, mismatch = best
    if abs(mismatch) <= tolerance:
        return candidate(width), mismatch
    if exact < step:
        reason = f"the parts outside the FFN and a width of {step} alone come to {one:,.0f}"
    else:
        reason = f"widths come in steps of {step}, each worth {(two - one) / target:.2%}"
    raise UserError(
        f"intermediate_size: no width of {ffn_type} comes within {tolerance:.1%} of {target:,.0f} {matching} "
        f"(closest {width}: {mismatch:+.2%}): {reason}; change the width, the grid or kan_num_groups"
    )


PEAK_FLOPS = 989e12
"""Dense bf16 peak of one NVIDIA H100 SXM (data sheet); days scale with 1 / (peak x utilisation)."""
UTILISATION = 0.4
"""Assumed model FLOPs utilisation of the plan's days."""
DEVICES = (1, 8, 64)


def plan(
    config: RunConfig,
    *,
    devices: tuple[int, ...] = DEVICES,
    peak_flops: float = PEAK_FLOPS,
    utilisation: float = UTILISATION,
) -> dict[str, Any]:
    """What `kanlm plan` prints: parameters (proved on the meta device), FLOPs, memory, days, matched arms.

    UserError for a converted model of another family.
    """
    model = architecture(config)
    if not isinstance(model, KanLMConfig):
        raise UserError(
            f"init_from: {config.init_from} is a converted {model.model_type!r} model, and only kanlm's "
            "own are planned; `kanlm train` trains it"
        )
    counts, on_meta = parameter_counts(model), built_counts(model)
    assert counts == on_meta, (counts, on_meta)
    block_size = config.data.block_size
    flops = training_flops(model, block_size)
    steps, step_tokens = config.total_steps, config.step_tokens
    tokens = steps * step_tokens
    return {
        "name": config.name,
        "ffn_type": model.ffn_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "intermediate_size": model.intermediate_size,
        "block_size": block_size,
        "parameters": dataclasses.asdict(counts),
        "parameters_built": dataclasses.asdict(on_meta),
        "flops_per_token": {**dataclasses.asdict(flops), "total": flops.total},
        "steps": steps,
        "tokens": tokens,
        "tokens_per_step": step_tokens,
        "tokens_per_parameter": tokens / counts.non_embedding,
        "training_flops": flops.total * tokens,
        "peak_flops": peak_flops,
        "utilisation": utilisation,
        "devices": [
            _device_plan(config, model, number, sharding, flops.total * tokens / (peak_flops * utilisation))
            for number in devices
            if can_train_on(config, number)
            for sharding in (("none",) if number == 1 else ("ddp", "fsdp2"))
        ],
        "matched": [
            _match(model, ffn_type, matching, block_size)
            for ffn_type in arm_names("kan" if find_arm(model.ffn_type).family == "mlp" else "mlp")
            for matching in MATCHING_TOLERANCE
        ],
    }


def can_train_on(config: RunConfig, devices: int) -> bool:
    """Whether a step's sequences divide among so many processes."""
    try:
        config.train.micro_batches(devices)
    except UserError:
        return False
    return True


def _device_plan(
    config: RunConfig, model: KanLMConfig, devices: int, sharding: Any, device_seconds: float
) -> dict[str, Any]:
    train = config.train
    micro_batch_size, accumulation_steps = train.micro_batches(devices)
    memory = memory_bytes(
        model,
        micro_batch_size=micro_batch_size,
        block_size=config.data.block_size,
        devices=devices,
        sharding=sharding,
        mixed_precision=train.mixed_precision != "no",
        optimizer=train.optimizer,
        kan_optimizer=train.kan_optimizer,
        gradient_checkpointing=train.gradient_checkpointing,
    )
    return {
        "devices": devices,
        "sharding": sharding,
        "micro_batch_size": micro_batch_size,
        "accumulation": accumulation_steps,
        "memory_bytes": {**dataclasses.asdict(memory), "total": memory.total},
        "days": device_seconds / devices / 86400,
    }


def _match(model: KanLMConfig, ffn_type: str, matching: Any, block_size: int) -> dict[str, Any]:
    """A row of the plan: the width of another arm that is as large as `model`, or why there is none."""
    row: dict[str, Any] = {"ffn_type": ffn_type, "matching": matching}
    target = matched_size(model, matching, block_size)
    try:
        matched, mismatch = matched_width(model, ffn_type, target, matching, block_size)
    except ValueError as error:
        return {**row, "error": str(error)}
    return {**row, "intermediate_size": matched.intermediate_size, "mismatch_percent": 100 * mismatch}


_MEMORY_KINDS = tuple(field.name for field in dataclasses.fields(Memory))


def plan_text(planned: dict[str, Any]) -> str:
    """`plan(...)` for a reader."""
    parameters, flops = planned["parameters"], planned["flops_per_token"]
    lines = [
        f"{planned['name']}: {planned['ffn_type']}, {planned['num_hidden_layers']} layers, width "
        f"{planned['hidden_size']}, FFN width {planned['intermediate_size']}, "
        f"vocabulary {planned['vocab_size']:,}, blocks of {planned['block_size']}",
        "",
        "parameters (sum of the parts = built model)",
        *(f"  {name.replace('_', '-'):<14}{number:>18,}" for name, number in parameters.items()),
        "",
        "training FLOPs per token (multiply-add = 2)",
        *(f"  {name:<14}{number:>18,}" for name, number in flops.items()),
        "",
        f"{planned['tokens']:,} tokens in {planned['steps']:,} steps of {planned['tokens_per_step']:,}: "
        f"{planned['tokens_per_parameter']:.1f} tokens per non-embedding parameter, "
        f"{planned['training_flops']:.3g} FLOPs",
        "",
        f"estimated peak memory a device in GiB, and days at {planned['utilisation']:.0%} of "
        f"{planned['peak_flops'] / 1e12:,.0f} TFLOP/s",
        "  devices  sharding  micro batch"
        + "".join(f"{name:>13}" for name in (*_MEMORY_KINDS, "total", "days")),
    ]
    for row in planned["devices"]:
        memory = row["memory_bytes"]
        gib = "".join(f"{memory[kind] / 2**30:>13.2f}" for kind in (*_MEMORY_KINDS, "total"))
        lines.append(
            f"  {row['devices']:>7}  {row['sharding']:<8}  {row['micro_batch_size']:>5} x "
            f"{row['accumulation']:<3}{gib}{row['days']:>13.3g}"
        )
    parameters_within, flops_within = MATCHING_TOLERANCE.values()
    lines += [
        "",
        f"arms of equal size (non-embedding parameters within {parameters_within:.1%}, training FLOPs within "
        f"{flops_within:.0%})",
    ]
    for row in planned["matched"]:
        fit = row.get("error") or f"{row['intermediate_size']:>6}  {row['mismatch_percent']:+.3f}%"
        lines.append(f"  {row['ffn_type']:<12}{row['matching']:<12}{fit}")
    return "\n".join(lines)
