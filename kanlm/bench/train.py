"""`kanlm bench train`: whole training steps (forward, loss, backward, AdamW) at equal parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from kanlm.bench.measure import (
    PARITY,
    Arm,
    cuda_peak_memory,
    parity_error,
    peak_memory,
    report,
    require_device,
)
from kanlm.config import TrainConfig, UserError, parse_table
from kanlm.model.configuration_kanlm import KanLMConfig
from kanlm.model.modeling_kanlm import KanLMForCausalLM
from kanlm.sizing import matched_width, parameter_counts, training_flops_per_token
from kanlm.train.build import Trainable, build
from kanlm.train.parallel import keep_freed_memory

SIZES = {
    # name: hidden_size, SwiGLU's intermediate_size, layers, heads, sequences x positions of a step
    "0.3m": (96, 240, 3, 3, 8, 128),
    "1m": (128, 344, 5, 4, 8, 256),
    "10m": (320, 856, 8, 5, 4, 256),
    "100m": (768, 2048, 14, 12, 8, 1024),
}
"""Named after SwiGLU's non-embedding parameters, which all arms have within 0.5%."""
FITTING: dict[tuple[str, str], dict[str, Any]] = {("0.3m", "kan_linear"): {"kan_grid_size": 6}}
"""Fields of an arm at a size whose few widths all miss that with the arm's own."""
GLU = {"kan_grid_size": 16, "kan_order": 3, "kan_grid_min": -4.0, "kan_grid_max": 4.0, "kan_num_groups": 8}
EDGE = {"kan_grid_size": 5, "kan_order": 3, "kan_grid_min": -3.0, "kan_grid_max": 3.0}
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: baseline, ffn_type, KAN fields
    "swiglu": ("swiglu", "swiglu", {}),
    "gelu": ("gelu", "gelu", {}),
    "kan_glu": ("swiglu", "kan_glu", GLU),
    "kan_glu_linear": ("swiglu", "kan_glu", GLU | {"kan_basis": "linear", "kan_grid_size": 15}),
    "kan_grouped": ("gelu", "kan_grouped", GLU),
    "kan_grouped_rational": ("gelu", "kan_grouped", GLU | {"kan_basis": "rational"}),
    "kan": ("gelu", "kan", EDGE),
    "kan_linear": ("gelu", "kan", EDGE | {"kan_basis": "linear"}),
    "kan_mixed": ("gelu", "kan_mixed", EDGE),
    "kan_mixed_linear": ("gelu", "kan_mixed", EDGE | {"kan_basis": "linear"}),
    "kan_act": ("gelu", "kan_act", GLU),
    "kan_product": ("swiglu", "kan_product", GLU),
    "gelu_norm": ("gelu_norm", "gelu", {"hidden_norm": True}),
    "swiglu_norm": ("swiglu_norm", "swiglu", {"hidden_norm": True}),
    "kan_act_norm": ("gelu_norm", "kan_act", GLU | {"hidden_norm": True}),
    "kan_grouped_norm": ("gelu_norm", "kan_grouped", GLU | {"hidden_norm": True}),
    "kan_glu_norm": ("swiglu_norm", "kan_glu", GLU | {"hidden_norm": True}),
    "kan_product_norm": ("swiglu_norm", "kan_product", GLU | {"hidden_norm": True}),
    "geglu": ("swiglu", "geglu", {}),
    "relu2": ("gelu", "relu2", {}),
    "polynorm": ("gelu", "polynorm", {}),
    "xielu": ("gelu", "xielu", {}),
}
COMPILED = " compiled"
"""After the name of an arm whose layers torch.compile has compiled; its baseline is the arm itself."""
VOCAB_SIZE = 1024
BATCHES_AT_KNOTS = 8


def architecture(arm: str, size: str) -> KanLMConfig:
    """The arm's model, with as many non-embedding parameters as SwiGLU of this size."""
    if arm not in ARMS:
        raise UserError(f"--arm: unknown arm {arm!r}; choose from {', '.join(ARMS)}")
    if size not in SIZES:
        raise UserError(f"--size: unknown size {size!r}; choose one of {', '.join(SIZES)}")
    hidden, width, layers, heads, _, positions = SIZES[size]
    _, ffn_type, fields = ARMS[arm]
    config = KanLMConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        ffn_type="swiglu",
        **fields | FITTING.get((size, arm), {}),
    )
    return matched_width(config, ffn_type, parameter_counts(config).non_embedding)[0]


def build_arm(
    arm: str,
    size: str,
    backend: str,
    device: str,
    compiled: bool = False,
    seed: int = 0,
    optimizer: str = "adamw",
) -> tuple[Trainable, str]:
    """The arm's model and optimiser as training builds them, and which kernels it uses."""
    config = architecture(arm, size)
    config._attn_implementation = "sdpa"
    *_, sequences, positions = SIZES[size]
    settings = parse_table(
        TrainConfig,
        {
            "max_tokens": sequences * positions,  # a step
            "batch_size": sequences,
            "learning_rate": 1e-4,
            "kernels": backend,
            "compile": compiled,
            "optimizer": optimizer,
        },
        "kanlm bench",
    )
    made = build(config, settings, torch.device(device), seed=seed)
    return made, "+".join(sorted(set(made.kernels.values()))) or "-"


def training_arm(
    name: str, size: str, backend: str, device: str = "cpu", compiled: bool = False, optimizer: str = "adamw"
) -> Arm:
    """One optimizer step on random tokens; bf16 autocast on a GPU."""
    made, chosen = build_arm(name, size, backend, device, compiled, optimizer=optimizer)
    model = made.model
    *_, sequences, positions = SIZES[size]
    ids = torch.randint(0, VOCAB_SIZE, (sequences, positions), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    optimizing: list[float] = []
    """Seconds of the optimisers, a number a step; on a GPU those of starting their kernels."""

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        start = time.perf_counter()
        for optimizer in made.optimizers:
            optimizer.step()
        optimizing.append(time.perf_counter() - start)
        for optimizer in made.optimizers:
            optimizer.zero_grad(set_to_none=True)

    config = architecture(name, size)
    counts = parameter_counts(config)
    tokens = sequences * positions
    return Arm(
        name + COMPILED if compiled else name,
        step,
        tokens,
        counts.non_embedding,
        flops=training_flops_per_token(config, positions) * tokens,
        # AdamW reads and writes weight and both moments, reads the gradient, which is written once before.
        least_bytes=32.0 * counts.total,
        baseline=name if compiled else ARMS[name][0],
        kernels=chosen,
        details={"intermediate_size": config.intermediate_size},
        measured={"optimizer_seconds": optimizing},
    )


class Logits(nn.Module):
    """A model as a function of token ids [B, T] to logits [B, T, V], without a cache."""

    def __init__(self, model: KanLMForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def parity_case(name: str, size: str, backend: str, device: str) -> tuple[KanLMForCausalLM, torch.Tensor]:
    """The arm's whole model, all FFN weights and coefficients away from their start, and ids [2, 24]."""
    model = cast(KanLMForCausalLM, build_arm(name, size, backend, device)[0].model)
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mlp.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, device=device))
    ids = torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(2))
    return model, ids.to(device)


def arm_parity(name: str, size: str, backend: str, device: str = "cpu") -> float:
    """Worst relative error of the whole model's logits and of every parameter's gradient, in fp32.

    The derivative of a piecewise-linear function jumps at its knots, so an input which rounding moves across
    one has another gradient, also in the reference when it runs in fp32. Such arms are therefore judged by
    the best of `BATCHES_AT_KNOTS` batches; a wrong kernel is wrong on each of them.
    """
    model, ids = parity_case(name, size, backend, device)
    errors = [parity_error(Logits(model), ids)]
    kinked = ARMS[name][2].get("kan_basis") == "linear"
    while kinked and errors[-1] >= PARITY[torch.float32] and len(errors) < BATCHES_AT_KNOTS:
        generator = torch.Generator().manual_seed(2 + len(errors))
        ids = torch.randint(0, VOCAB_SIZE, ids.shape, generator=generator).to(device)
        errors.append(parity_error(Logits(model), ids))
    return min(errors)


def passing(
    names: list[str], size: str, backend: str, device: str, parity: Callable[..., float] = arm_parity
) -> tuple[list[str], dict[str, str]]:
    """The arms whose parity is green, and a line for each of the others."""
    green, red = [], {}
    for name in names:
        error = parity(name, size, backend, device)
        if error < PARITY[torch.float32]:
            green.append(name)
        else:
            red[name] = f"parity is red: relative error {error:.2g} >= {PARITY[torch.float32]}"
    return green, red


def run(
    size: str = "1m",
    arms: tuple[str, ...] = (),
    backend: str = "auto",
    device: str = "cpu",
    compiled: bool = False,
    optimizer: str = "adamw",
    seconds: float = 60.0,
    memory: bool = True,
    out: str | None = None,
    echo: Callable[[str], Any] = print,
) -> list[dict]:
    """Compare training steps of `arms` (default: all); prints a table, writes JSON, returns the records.

    `compiled`: each arm once more with compiled layers, against itself in eager mode.

    Raises:
        UserError: an unknown size, arm, backend or optimizer, or a device that is not there.
    """
    require_device(device)
    try:
        names, red = passing(list(arms or ARMS), size, backend, device)
    except ValueError as error:
        raise UserError(str(error)) from None
    modes = (False, True) if compiled else (False,)
    built_arms = [
        training_arm(name, size, backend, device, mode, optimizer) for mode in modes for name in names
    ]
    peaks: dict[str, dict[str, int] | None] = {}
    if memory:
        for arm in built_arms:
            if device == "cuda":
                peaks[arm.name] = cuda_peak_memory(arm)
            elif not arm.name.endswith(COMPILED):
                peaks[arm.name] = peak_memory(training_arm, arm.name, size, backend, "cpu", False, optimizer)
    if device == "cpu":
        keep_freed_memory()  # as training does
    settings = {
        "size": size,
        "backend": backend,
        "device": device,
        "compiled": compiled,
        "optimizer": optimizer,
        "vocab_size": VOCAB_SIZE,
    }
    return report(
        f"train-{size}", settings, built_arms, peaks, red, seconds=seconds, device=device, out=out, echo=echo
    )
