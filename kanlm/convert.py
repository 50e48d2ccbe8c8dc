"""`kanlm convert`: a causal LM of another family with learned functions in its feed-forward blocks.

Arms that keep the activation start exactly equal, and are checked to. `kan` takes the blocks' place by layers
of edge functions, which first learn the blocks one by one, then the logits.

Legend: B sequences, T tokens, N rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kanlm.config import UserError
from kanlm.evaluation.loading import load_causal_lm
from kanlm.evaluation.perplexity import held_out_documents
from kanlm.export import export_model, plain
from kanlm.initial import kan_coefficient_names
from kanlm.interpret.functions import token_batch
from kanlm.interpret.removal import sequence_losses
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.modeling_converted import CONVERTED, feed_forward_blocks, register

ARMS = ("kan_glu", "kan_act", "kan_grouped", "kan")
LEARNING_RATE = 3e-3


def convert(
    model_path: str | Path,
    arm: str,
    out: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    tokens: int = 65_536,
    steps: int = 300,
    groups: int = 8,
    grid_size: int = 16,
    trust_remote_code: bool = False,
) -> str:
    """Write the converted model to the new folder `out`; returns what changed, as text.

    `data` is text as in `kanlm eval`: the perplexity before and after is measured on every second sequence
    of its first `tokens` tokens; `kan` is distilled on the others, `steps` steps a block and as many on the
    logits.

    Raises:
        UserError: no model, a model or arm that is not supported (says what is), `kan` without `data`,
            groups that do not divide the channels, `out` exists.
    """
    if Path(out).exists():
        raise UserError(f"{out}: exists already; delete it, or choose another folder with --out")
    if arm not in ARMS:
        raise UserError(f"--arm: unknown arm {arm!r}; choose one of {', '.join(ARMS)}")
    if arm == "kan" and data is None:
        raise UserError("--data: --arm kan is learned from text, and there is none; give e.g. --data stdlib")
    source: Any
    source, tokenizer = load_causal_lm(
        model_path, dtype="auto", device="cpu", trust_remote_code=trust_remote_code
    )
    try:
        converted = converted_model(source, arm, groups, grid_size)
    except ValueError as error:
        raise UserError(f"model {model_path}: {error}") from error
    batch = None if data is None else text_batch(source, tokenizer, data, split, tokens)
    if batch is not None and arm == "kan":
        distill(source, converted, batch[::2], steps)
    else:
        must_be_equal(source, converted)
    lines = [
        f"parameters         {parameters(source):,} -> {parameters(converted):,}",
        f"learned functions  {coefficients(converted):,} coefficients",
    ]
    if batch is not None:
        before, after = (perplexity(network, batch[1::2]) for network in (source, converted))
        lines.append(
            f"perplexity         {before:.4f} -> {after:.4f} ({batch[1::2].numel():,} tokens of {data})"
        )
    save(converted, tokenizer, Path(out), f"{Path(model_path).name}-{arm}", lines)
    return "\n".join([*lines, f"written            {out}"])


def converted_model(source: Any, arm: str, groups: int = 8, grid_size: int = 16) -> Any:
    """`source` with the functions of `arm`, everything else with its weights, in its dtype and in eval mode.

    Raises:
        ValueError: a family, a block or an arm that is not supported.
    """
    kind = source.config.model_type
    if isinstance(source, KanLMForCausalLM):
        return converted_kanlm(source, arm, groups, grid_size)
    if kind not in CONVERTED:
        raise ValueError(
            f"architecture {type(source).__name__} ({kind}) cannot be converted; supported are "
            f"{', '.join(CONVERTED)} and kanlm's swiglu: decoders whose activation is a module (act_fn or "
            "act) in a block of dense layers; no mixtures of experts"
        )
    register()
    found = feed_forward_blocks(source)
    if len(found) != source.config.num_hidden_layers:
        raise ValueError(
            f"{len(found)} feed-forward blocks for {source.config.num_hidden_layers} layers; looked for "
            "modules with act_fn, gate_proj, up_proj, down_proj, or act, c_fc, c_proj"
        )
    kan = {
        "arm": arm,
        "groups": groups,
        "basis": "bspline",
        "grid_size": grid_size,
        "order": 3,
        "grid_min": -4.0,
        "grid_max": 4.0,
    }
    if arm == "kan":
        kan |= {"grid_size": 5, "grid_min": -3.0, "grid_max": 3.0}
        kan["intermediate_size"] = equal_width(next(iter(found.values())), source.config.hidden_size)
    settings = source.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        settings.pop(name, None)
    target = CONVERTED[kind]
    model: Any = target(target.config_class(**settings, kan=kan)).to(source.dtype)
    load_all(model, renamed(source.state_dict(), model), source)
    if source.generation_config is not None:
        model.generation_config = source.generation_config
    return model.eval()


def converted_kanlm(source: KanLMForCausalLM, arm: str, groups: int, grid_size: int) -> KanLMForCausalLM:
    """A swiglu model of kanlm as `kan_glu` whose functions are SiLU plus a spline from zero.

    Raises:
        ValueError: another ffn_type or arm.
    """
    if (source.config.ffn_type, arm) != ("swiglu", "kan_glu"):
        raise ValueError(
            f"ffn_type {source.config.ffn_type} to arm {arm}: of kanlm's own models swiglu becomes kan_glu"
        )
    settings = source.config.to_dict() | {
        "ffn_type": arm,
        "kan_glu_form": "residual",
        "kan_num_groups": groups,
        "kan_grid_size": grid_size,
    }
    model: Any = KanLMForCausalLM(KanLMConfig(**settings))
    model = model.to(source.dtype)
    load_all(model, source.state_dict(), source)
    return model.eval()


def equal_width(block: nn.Module, width: int) -> int:
    """Hidden width of two edge layers of 9 numbers an edge with the parameters of `block`."""
    return max(1, round(sum(parameter.numel() for parameter in block.parameters()) / (2 * width * 9)))


def renamed(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`weights` under the names of `model`, where a matrix may lie a level deeper, as `linear`."""
    own = model.state_dict().keys()
    moved = {}
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        deeper = f"{path}.linear.{leaf}"
        moved[deeper if deeper in own else name] = weight
    return moved


def load_all(model: nn.Module, weights: dict[str, Tensor], source: nn.Module) -> None:
    """Load `weights`; only learned functions may be missing, and only replaced blocks left over."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    blocks = tuple(feed_forward_blocks(source))
    replaced = not feed_forward_blocks(model)
    wrong = [
        name
        for name in (*missing, *unexpected)
        if not name.endswith("coefficients") and not (replaced and name.startswith(blocks))
    ]
    assert not wrong, wrong


@torch.no_grad()
def must_be_equal(source: Any, converted: Any) -> None:
    """Raise AssertionError where logits on random tokens differ: a conversion that changed the model."""
    ids = torch.randint(source.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    before, after = source(input_ids=ids).logits, converted(input_ids=ids).logits
    difference = float((before - after).abs().max())
    assert difference <= 1e-5 * float(before.abs().max()), f"logits differ by {difference}"


def distill(source: Any, converted: Any, ids: Tensor, steps: int) -> None:
    """Teach the edge blocks of `converted` those of `source`, then all of them its logits, on ids [B, T].

    A block learns by mean squared error on the inputs that it has in `source`; logits by the Kullback-Leibler
    divergence. Adam, with a cosine to zero.
    """
    converted.requires_grad_(False)
    names = list(feed_forward_blocks(source))
    with tqdm(total=steps * (len(names) + 1), desc="distilling", disable=None) as bar:
        for name in names:
            inputs, outputs = block_pairs(source, name, ids)
            block = converted.get_submodule(name).requires_grad_(True)
            scale = outputs.square().mean()

            def block_loss(rows: Tensor, block=block, inputs=inputs, outputs=outputs, scale=scale) -> Tensor:
                return F.mse_loss(block(inputs[rows]), outputs[rows]) / scale

            descend(block_loss, block, len(inputs), 1024, steps, bar)
        teacher = torch.cat([source(input_ids=row[None]).logits.detach() for row in ids])

        def logit_loss(rows: Tensor) -> Tensor:
            logits = converted(input_ids=ids[rows]).logits
            return F.kl_div(
                logits.log_softmax(-1).flatten(0, 1),
                teacher[rows].log_softmax(-1).flatten(0, 1),
                reduction="batchmean",
                log_target=True,
            )

        descend(logit_loss, converted, len(ids), 4, steps, bar, LEARNING_RATE / 3)
    converted.requires_grad_(True)


def descend(
    loss, module: nn.Module, rows: int, size: int, steps: int, bar: Any, rate: float = LEARNING_RATE
) -> None:
    """`steps` steps of Adam on loss(random rows) for the parameters of `module` that are to learn."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=rate)
    random = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(torch.randint(rows, (min(size, rows),), generator=random))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        bar.update()
        bar.set_postfix_str(f"loss {value.item():.4f}", refresh=False)


@torch.no_grad()
def block_pairs(model: Any, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs [N, D] of the block `name` on ids [B, T]."""
    pairs: list[tuple[Tensor, Tensor]] = []
    block = model.get_submodule(name)
    handle = block.register_forward_hook(
        lambda module, given, output: pairs.append((given[0].flatten(0, -2), output.flatten(0, -2)))
    )
    try:
        for rows in chunks(ids):
            model(input_ids=rows)
    finally:
        handle.remove()
    return torch.cat([given for given, _ in pairs]), torch.cat([output for _, output in pairs])


def chunks(ids: Tensor, rows: int = 8) -> Iterator[Tensor]:
    yield from ids.split(rows)


def perplexity(model: Any, ids: Tensor) -> float:
    return math.exp(float(sequence_losses(model, ids).mean()))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def coefficients(model: nn.Module) -> int:
    named = dict(model.named_parameters())
    return sum(named[name].numel() for name in kan_coefficient_names(model))


def text_batch(model: Any, tokenizer: Any, data: str, split: str | None, tokens: int) -> Tensor:
    """The first `tokens` tokens of the data as [B, T].

    Raises:
        UserError: fewer than 128.
    """
    documents, name, _ = held_out_documents(data, split)
    try:
        batch = token_batch(model, tokenizer, documents, tokens, rows=2)
    except ValueError as error:
        raise UserError(f"data {name}: has no text to measure on: {error}") from error
    if batch.numel() < 128:
        raise UserError(f"data {name}: {batch.numel()} tokens are too few to measure on; give at least 128")
    return batch


def save(model: Any, tokenizer: Any, out: Path, name: str, lines: list[str]) -> None:
    """The converted `model` with its code, tokenizer, card and checksums as the new folder `out`."""
    facts = {"Made by": "`kanlm convert`"}
    for line in lines:
        key, _, value = line.partition("  ")
        facts[key.capitalize()] = plain(value)
    export_model(model, tokenizer, out, {"name": name, "training": facts})
