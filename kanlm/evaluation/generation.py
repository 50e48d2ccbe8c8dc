"""Continue texts with any causal language model: streamed, several at once, or one after another by hand.

Legend: B prompts, T tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
    set_seed,
)

from kanlm import kernels
from kanlm.config import UserError
from kanlm.edge.runtime import generate as generate_onnx
from kanlm.edge.runtime import onnx_file
from kanlm.evaluation import decoding
from kanlm.evaluation.loading import load_causal_lm
from kanlm.kernels import recompute
from kanlm.kernels.decode import NativeDecoder, Weights


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest, top_k 0 and top_p 1 leave all in."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Of `model.generate`."""
        if not self.temperature:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }

    def warpers(self) -> LogitsProcessorList | None:
        """The same as transformers applies for `arguments`; None where the likeliest token is taken."""
        if not self.temperature:
            return None
        steps: list[Any] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_k:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList(steps)


def generate(
    model: str,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    device: str | None = None,
    weights: Weights = "float32",
    trust_remote_code: bool = False,
    out: TextIO | None = None,
    **sampling: Any,
) -> list[str]:
    """`prompts` with their continuations, also written to `out` (standard output).

    A single prompt is streamed; several run as one batch. Ends with a line of tokens/s on standard error.
    Models of kanlm use the fused kernels of the machine, for a single prompt on a CPU the native decoder.
    weights: "int8" for one that reads a quarter of the bytes.

    Raises:
        UserError: no model, an empty prompt, prompts that leave no room for the new tokens, or int8 weights
            where the native decoder does not serve.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    settings = Sampling(**sampling)
    must_have_text(prompts)
    if (file := onnx_file(model)) is not None:
        must_be_plain(device, weights)
        return [by_onnx(file, prompt, settings, seed, out) for prompt in prompts]
    network, tokenizer = ready(model, device, trust_remote_code)
    decoder = native(network, weights, len(prompts))
    set_seed(seed)
    texts, tokens, seconds = generate_texts(network, tokenizer, prompts, settings, decoder, out=out)
    if len(prompts) > 1:
        print("\n\n".join(texts), file=out)
    print(speed(tokens, seconds, network, decoder), file=sys.stderr)
    return texts


def converse(
    model: str,
    lines: Iterator[str],
    *,
    seed: int = 0,
    device: str | None = None,
    weights: Weights = "float32",
    trust_remote_code: bool = False,
    out: TextIO | None = None,
    **sampling: Any,
) -> None:
    """Continue each of `lines` when it comes; the model is loaded once. A mistake ends no session."""
    settings = Sampling(**sampling)
    if (file := onnx_file(model)) is not None:
        must_be_plain(device, weights)
        for line in lines:
            if line.strip():
                by_onnx(file, line, settings, seed, out)
        return
    network, tokenizer = ready(model, device, trust_remote_code)
    decoder = native(network, weights)
    set_seed(seed)
    for line in lines:
        if line.strip():
            try:
                _, tokens, seconds = generate_texts(network, tokenizer, [line], settings, decoder, out=out)
                print(speed(tokens, seconds, network, decoder), file=sys.stderr)
            except UserError as error:
                print(error, file=sys.stderr)


def by_onnx(file: Path, prompt: str, settings: Sampling, seed: int, out: TextIO | None) -> str:
    """`prompt` and its continuation by ONNX Runtime, streamed to `out`."""

    def say(text: str) -> None:
        print(text, end="", flush=True, file=out)

    drawn = {key: getattr(settings, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    text, measured = generate_onnx(file, prompt, seed=seed, say=say, **drawn)
    print(measured or "no new token", file=sys.stderr)
    return text


def must_be_plain(device: str | None, weights: Weights) -> None:
    """Raise where options are given that an ONNX file has no use for."""
    if device not in (None, "cpu"):
        raise UserError(f"--device: ONNX files run on the CPU here, got {device!r}; leave the option out")
    if weights != "float32":
        raise UserError(f"--weights: {weights} is a file of its own in ONNX; give model_int8.onnx instead")


def typed_lines() -> Iterator[str]:
    """Lines from the keyboard until its end (Ctrl-D)."""
    print("a text to continue, then Enter; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def must_have_text(prompts: Sequence[str]) -> None:
    if not prompts or not all(prompts):
        raise UserError(
            "--prompt: expected at least one character, got an empty string; give the text to continue"
        )


def ready(model: str, device: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """(network, tokenizer), with kernels chosen and a padding on the left."""
    network, tokenizer = load_causal_lm(model, device=device, trust_remote_code=trust_remote_code)
    kernels.select(network)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return network, tokenizer


def native(network: Any, weights: Weights, prompts: int = 1) -> NativeDecoder | None:
    """The native decoder, for one prompt on a CPU.

    Raises:
        UserError: int8 weights without it.
    """
    serves = prompts == 1 and network.device.type == "cpu"
    if not serves:
        what = f"{prompts} prompts" if prompts > 1 else f"a model on {network.device.type}"
        decoding.say_once(f"decoding: transformers' generate ({what}; the native decoder takes one on a CPU)")
    decoder = decoding.decoder_for(network, weights) if serves else None
    if decoder is None and weights != "float32":
        raise UserError(
            f"--weights: {weights} needs the native decoder: one prompt, a model of kanlm on a CPU, a C++ "
            "compiler; leave the option out"
        )
    return decoder


@torch.inference_mode()
def generate_texts(
    network: Any,
    tokenizer: Any,
    prompts: list[str],
    settings: Sampling,
    decoder: NativeDecoder | None = None,
    out: TextIO | None = None,
) -> tuple[list[str], int, float]:
    """(texts, number of new tokens, seconds); one prompt is streamed to `out`.

    Raises:
        UserError: the model has too few positions.
    """
    inputs = tokenizer(
        prompts,
        return_tensors="pt",
        padding=len(prompts) > 1,
        add_special_tokens=False,
        return_token_type_ids=False,
        verbose=False,
    ).to(network.device)
    longest = inputs["input_ids"].shape[1]  # [B, T]
    new = settings.max_new_tokens
    limit = getattr(network.config, "max_position_embeddings", None) or longest + new
    if longest + new > limit:
        room = limit - longest
        remedy = f"ask for at most {room}" if room > 0 else "give a shorter prompt"
        raise UserError(
            f"--max-new-tokens: the prompt's {longest} tokens and {new} new ones exceed the model's {limit} "
            f"positions; {remedy}"
        )
    start = time.perf_counter()
    streamer = Streamer(tokenizer, out) if len(prompts) == 1 else None
    if decoder is not None:
        output = by_decoder(decoder, inputs["input_ids"], settings, stop_tokens(network), streamer)
    else:
        output = network.generate(
            **inputs, **settings.arguments(), pad_token_id=tokenizer.pad_token_id, streamer=streamer
        )
    seconds = time.perf_counter() - start
    tokens = sum(new_tokens(row, network) for row in output[:, longest:].tolist())
    return tokenizer.batch_decode(output, skip_special_tokens=True), tokens, seconds


def sample_rows(network: Any, tokenizer: Any, ids: Tensor, seed: int, **arguments: Any) -> Tensor:
    """`ids` [B, T] and what the model goes on with, [B, T + new]; torch's generator is as it was afterwards.

    arguments: of `network.generate`.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        return network.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, **arguments)


def by_decoder(
    decoder: NativeDecoder, ids: Tensor, settings: Sampling, stop: set[int], streamer: TextStreamer | None
) -> Tensor:
    """`ids` [1, T] and what comes after them, as `network.generate` gives it."""

    def show(token: int) -> None:
        if streamer is not None:
            streamer.put(torch.tensor([token]))

    if streamer is not None:
        streamer.put(ids)
    new = decoding.continue_tokens(
        *(decoder, ids[0].tolist(), settings.max_new_tokens),
        warpers=settings.warpers(),
        stop=stop,
        shown=show,
    )
    if streamer is not None:
        streamer.end()
    return torch.cat((ids, torch.tensor([new])), dim=1)


class Streamer(TextStreamer):
    """Writes finished text to `out`, standard output where it is None."""

    def __init__(self, tokenizer: Any, out: TextIO | None):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, flush=True, end="\n" if stream_end else "", file=self.out)


def stop_tokens(network: Any) -> set[int]:
    """The ids that end a text."""
    stop = network.generation_config.eos_token_id
    return set() if stop is None else set(stop) if isinstance(stop, list) else {stop}


def new_tokens(row: list[int], network: Any) -> int:
    """Tokens of `row` up to its stop token; what follows is padding."""
    stops = stop_tokens(network)
    return next((place + 1 for place, token in enumerate(row) if token in stops), len(row))


def speed(tokens: int, seconds: float, network: Any, decoder: NativeDecoder | None = None) -> str:
    chosen = [module.kernel for module in network.modules() if hasattr(module, "kernel")]
    fused = any(kernel not in (None, recompute.edge, recompute.learned) for kernel in chosen)
    how = ", fused kernels" if fused else ", reference kernels" if chosen else ""
    if decoder is not None:
        how = ", native decoder"
        if decoder.weight_error:
            how += f", int8 weights with an rms error of {decoder.weight_error:.2%}"
    return f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s ({network.device}{how})"
