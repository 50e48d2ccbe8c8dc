"""Continue token ids by the native decoder, with the sampling of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from kanlm.kernels.decode import NativeDecoder, Weights, native_decoder, say_once

SERVED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "output_attentions", "output_hidden_states"),
}
"""Fields of a generation config that `continue_tokens` follows, or that change no token."""


def decoder_for(model: Any, weights: Weights = "float32") -> NativeDecoder | None:
    """The native decoder of `model`, or None where it cannot do what transformers' `generate` would do.

    One line on standard error says why not.
    """
    if others := sorted(
        name
        for name in model.generation_config.to_diff_dict()
        if name not in SERVED and not name.startswith("_")
    ):
        say_once(f"decoding: transformers' generate (the model's generation_config sets {', '.join(others)})")
        return None
    return native_decoder(model, weights=weights)


def continue_tokens(
    decoder: NativeDecoder,
    ids: list[int],
    max_new_tokens: int,
    *,
    warpers: LogitsProcessorList | None = None,
    stop: set[int] | None = None,
    shown: Callable[[int], Any] = lambda token: None,
) -> list[int]:
    """New tokens after `ids`, a stop token included; `shown` gets each when it is there.

    warpers: what makes logits the distribution that tokens are drawn from; without, the likeliest is taken.
    """
    logits = decoder.prefill(ids)
    new: list[int] = []
    while True:
        new.append(draw_token(logits, warpers))
        shown(new[-1])
        if len(new) == max_new_tokens or new[-1] in (stop or ()):
            return new
        logits = decoder.step(new[-1])


def draw_token(logits: Tensor, warpers: LogitsProcessorList | None) -> int:
    """The next token, of logits [V]."""
    if warpers is None:
        return int(logits.argmax())
    scores = warpers(torch.empty(1, 0, dtype=torch.long), logits[None])  # type: ignore[arg-type]
    return int(torch.multinomial(scores.softmax(-1), 1))
