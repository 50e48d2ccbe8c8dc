"""Continue a text with any causal language model, streamed."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from kanlm.config import UserError
from kanlm.edge.runtime import generate as generate_onnx
from kanlm.edge.runtime import onnx_file
from kanlm.evaluation.loading import load_causal_lm


def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    *,
    trust_remote_code: bool = False,
) -> str:
    """The continuation of `prompt`, also streamed to standard output; temperature 0 is greedy."""
    if not prompt:
        raise UserError(
            "--prompt: expected at least one character, got an empty string; give the text to continue"
        )
    if (file := onnx_file(model)) is not None:
        text, speed = generate_onnx(file, prompt, max_new_tokens, temperature, top_k, seed)
        print(speed or "no new token", file=sys.stderr)
        return text
    network: Any
    network, tokenizer = load_causal_lm(model, device="cpu", trust_remote_code=trust_remote_code)
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    length = inputs["input_ids"].shape[1] + max_new_tokens
    limit = getattr(network.config, "max_position_embeddings", length)
    if length > limit:
        raise UserError(
            f"--max-new-tokens: the prompt's {length - max_new_tokens} tokens and {max_new_tokens} new ones "
            f"exceed the model's {limit} positions; ask for at most {limit - length + max_new_tokens}"
        )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k}
        if temperature
        else {"do_sample": False}
    )
    with torch.inference_mode():
        output = network.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
