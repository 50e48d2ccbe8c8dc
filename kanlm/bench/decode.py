"""`kanlm bench decode`: cached decoding, batch 1, of the models that `kanlm bench train` compares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch

from kanlm import kernels
from kanlm.bench.measure import Arm, peak_memory, relative_error, report, require_device
from kanlm.bench.train import ARMS, VOCAB_SIZE, built, parity_case, passing
from kanlm.config import UserError
from kanlm.model.modeling_kanlm import KanLMForCausalLM
from kanlm.sizing import parameter_counts

PROMPT, NEW = 32, 32
"""Tokens read before the measured ones, and measured."""


def decoding_arm(name: str, size: str, backend: str, device: str = "cpu") -> Arm:
    """Greedy decoding of NEW tokens one at a time after a prompt of PROMPT tokens, whose time is included."""
    made, chosen = built(name, size, backend, device)
    model = cast(KanLMForCausalLM, made.model)
    model.eval()
    prompt = torch.randint(0, VOCAB_SIZE, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)

    @torch.inference_mode()
    def step() -> None:
        output = model(input_ids=prompt, use_cache=True)
        for _ in range(NEW):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)

    counts = parameter_counts(model.config)
    return Arm(
        name,
        step,
        NEW,
        counts.non_embedding,
        flops=2.0 * counts.total * (NEW + PROMPT),
        least_bytes=4.0 * counts.total * NEW,
        baseline=ARMS[name][0],
        kernels=chosen,
        details={"intermediate_size": model.config.intermediate_size},
    )


@torch.no_grad()
def decoding_parity(name: str, size: str, backend: str, device: str = "cpu") -> float:
    """Worst relative error of the logits of cached decoding against the fp64 reference's, read at once."""
    model, ids = parity_case(name, size, backend, device)
    model.eval()
    reference = copy.deepcopy(model).double()
    kernels.select(reference, "reference")
    expected = reference(input_ids=ids[:1], use_cache=False).logits
    output = model(input_ids=ids[:1, :16], use_cache=True)
    logits = [output.logits]
    for at in range(16, ids.shape[1]):
        output = model(input_ids=ids[:1, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return relative_error(torch.cat(logits, dim=1), expected)


def run(
    size: str = "1m",
    arms: tuple[str, ...] = (),
    backend: str = "auto",
    device: str = "cpu",
    seconds: float = 40.0,
    memory: bool = False,
    out: str | None = None,
    echo: Callable[[str], Any] = print,
) -> list[dict]:
    """Compare decoding of `arms` (default: all); prints a table, writes JSON, returns the records.

    Raises:
        UserError: an unknown size, arm or backend, or a device that is not there.
    """
    require_device(device)
    try:
        names, red = passing(list(arms or ARMS), size, backend, device, decoding_parity)
    except ValueError as error:
        raise UserError(str(error)) from None
    built_arms = [decoding_arm(name, size, backend, device) for name in names]
    peaks = {name: peak_memory(decoding_arm, name, size, backend) for name in names} if memory else {}
    settings = {
        "size": size,
        "backend": backend,
        "device": device,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "batch": 1,
    }
    return report(
        f"decode-{size}", settings, built_arms, peaks, red, seconds=seconds, device=device, out=out, echo=echo
    )
