"""`kanlm bench eval`: exported models read text, against the forward pass that trains them.

Four measurements of every arm: `forward`, model and loss as in training, gradients recorded, on a batch;
`eval`, what `kanlm eval` does with an exported folder, tokenizer and sums included, on two such batches;
`row`, the forward pass of training on one row; `prefill`, what `kanlm generate` does with a prompt of that
length. The ratios are those of tokens a second: of `eval` to `forward`, of `prefill` to `row`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kanlm.bench.measure import Arm, report
from kanlm.bench.train import SIZES, VOCAB_SIZE, build_arm, passing
from kanlm.config import UserError
from kanlm.data.stdlib import standard_library
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.evaluation.generation import native, ready
from kanlm.evaluation.perplexity import load_fast, score
from kanlm.export import export_model
from kanlm.sizing import parameter_counts, training_flops_per_token

DEFAULT_ARMS = ("swiglu", "gelu", "kan_glu", "kan_act", "kan_grouped", "kan", "gelu_norm", "kan_act_norm")


def some_text(characters: int) -> str:
    """The beginning of Python's standard library."""
    text = ""
    for part in standard_library().texts:
        text += part
        if len(text) >= characters:
            break
    return text[:characters]


def reading_arms(
    name: str, size: str, backend: str, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> list[Arm]:
    """The four measurements of the arm `name`, whose model is exported to `folder`."""
    made, chosen = build_arm(name, size, backend, "cpu")
    model: Any = made.model
    *_, sequences, positions = SIZES[size]
    text = some_text(12 * sequences * positions)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: 2 * sequences * positions]
    text = str(tokenizer.decode(ids))
    batch = torch.tensor(ids[: sequences * positions]).view(sequences, positions)
    exported = str(export_model(model, tokenizer, folder, {"name": name}))
    scorer, its_tokenizer = load_fast(exported, "float32", "cpu", False)
    reader, _ = ready(exported, "cpu", False)
    decoder = native(reader, "float32")
    if decoder is None:
        raise UserError(f"--arm: the native decoder does not serve {name!r}; leave it out")
    prompt = batch[0, : positions - 1]
    counts = parameter_counts(model.config)

    def forward(rows: Tensor) -> Callable[[], Any]:
        return lambda: model(input_ids=rows, labels=rows, use_cache=False).loss

    def measured(what: str, step: Callable[[], Any], tokens: int, baseline: str, kernels: str) -> Arm:
        flops = training_flops_per_token(model.config, positions) / 3 * tokens
        return Arm(
            f"{name} {what}",
            step,
            tokens,
            counts.non_embedding,
            flops,
            baseline=f"{name} {baseline}",
            kernels=kernels,
        )

    def evaluate() -> None:
        score(scorer, its_tokenizer, [text], context_length=positions, batch_size=sequences)

    return [
        measured("forward", forward(batch), batch.numel(), "forward", chosen),
        measured(
            "eval",
            evaluate,
            len(its_tokenizer(text, add_special_tokens=False)["input_ids"]),
            "forward",
            chosen,
        ),
        measured("row", forward(prompt[None]), len(prompt), "row", chosen),
        measured("prefill", lambda: decoder.prefill(prompt), len(prompt), "row", chosen),
    ]


def run(
    size: str = "1m",
    arms: tuple[str, ...] = (),
    backend: str = "auto",
    device: str = "cpu",
    seconds: float = 60.0,
    memory: bool = False,
    out: str | None = None,
    echo: Callable[[str], Any] = print,
) -> list[dict]:
    """Measure `arms` (default: the usual ones); prints a table, writes JSON, returns the records.

    Peak memory is not measured.

    Raises:
        UserError: an unknown size, arm or backend, or a device other than the CPU.
    """
    if device != "cpu":
        raise UserError(f"--device: kanlm bench eval measures a CPU, got {device!r}; leave the option out")
    try:
        names, red = passing(list(arms or DEFAULT_ARMS), size, backend, device)
    except ValueError as error:
        raise UserError(str(error)) from None
    tokenizer = trained_tokenizer(iter([some_text(200_000)]), VOCAB_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        measured = [
            arm for name in names for arm in reading_arms(name, size, backend, Path(folder) / name, tokenizer)
        ]
        settings = {"size": size, "backend": backend, "vocab_size": VOCAB_SIZE}
        return report(
            f"eval-{size}", settings, measured, {}, red, seconds=seconds, device=device, out=out, echo=echo
        )
