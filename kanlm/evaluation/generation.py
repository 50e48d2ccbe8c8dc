"""Continue a text with any causal language model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

import torch
from transformers import TextStreamer, set_seed

from kanlm.config import UserError
from kanlm.evaluation.perplexity import load_causal_lm, max_context_length, prefix_token


class _Writer(TextStreamer):
    def __init__(self, tokenizer, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.out.write(text + ("\n" if stream_end else ""))
        self.out.flush()


def generate(
    model_path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    out: TextIO | None = None,
) -> str:
    """Write prompt and continuation to `out` (default: standard output) as it grows, and return the text.

    temperature 0 is greedy; top_k 0 samples from all tokens. An empty prompt starts a new document.
    """
    out = out or sys.stdout
    model, tokenizer = load_causal_lm(model_path)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [prefix_token(model, tokenizer)]
    positions = max_context_length(model)
    if len(ids) + max_new_tokens > positions:
        raise UserError(
            f"max_new_tokens: prompt ({len(ids)} tokens) and {max_new_tokens} new ones exceed the model's "
            f"{positions} positions; ask for at most {max(positions - len(ids), 0)}"
        )
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else
    {"do_sample": False} out.write(prompt)
    out.flush()
    input_ids = torch.tensor([ids], device=model.device)
    tokens = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=prefix_token(model, tokenizer),
        streamer=_Writer(tokenizer, out),
        **sampling,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
