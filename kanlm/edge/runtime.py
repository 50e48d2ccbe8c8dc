"""Text from an exported ONNX folder by ONNX Runtime, without torch.

Legend: B batch, T new tokens, P tokens in the cache, V vocabulary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kanlm.checksums import verify
from kanlm.config import UserError, one_line
from kanlm.runs import read_json

FP32 = "model.onnx"


def onnx_file(model: str | Path) -> Path | None:
    """The graph that `model` names: a .onnx file, or a folder that `kanlm export --onnx` wrote; else None."""
    path = Path(model)
    if path.suffix == ".onnx":
        return path
    if not (path / "config.json").is_file() or not (path / "genai_config.json").is_file():
        return None
    found = sorted(path.glob("*.onnx"))
    return path / FP32 if path / FP32 in found else found[0] if found else None


class OnnxModel:
    """A graph with a KV cache, and the tokenizer beside it.

    `threads`: of ONNX Runtime; default OMP_NUM_THREADS, else all cores.

    Raises:
        UserError: onnxruntime missing, no such file, a damaged file, no config.json or tokenizer beside it.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                "onnxruntime: not installed, and ONNX files need it; run: pip install 'kanlm[onnx]'"
            ) from None
        from tokenizers import Tokenizer

        self.path = Path(path)
        beside = [self.path, *(self.path.with_name(name) for name in ("config.json", "tokenizer.json"))]
        for file in beside:
            if not file.is_file():
                raise UserError(f"{file}: no such file; give a folder that `kanlm export --onnx` wrote")
        verify(self.path.parent)
        self.config = read_json(beside[1])
        self.tokenizer = Tokenizer.from_file(str(beside[2]))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
        try:
            self.session = onnxruntime.InferenceSession(
                self.path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has no base class of its own errors
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise UserError(f"{self.path}: not a readable ONNX model: {one_line(error)}") from error
        self._values = onnxruntime.OrtValue
        self._past = [name for name in (i.name for i in self.session.get_inputs()) if name.startswith("past")]
        self._outputs = [output.name for output in self.session.get_outputs()]

    def empty_cache(self, batch: int = 1) -> list[Any]:
        """Keys and values of no token."""
        shape = (batch, self.config["num_key_value_heads"], 0, self.config["head_dim"])
        return [self._values.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in self._past]

    def step(
        self, ids: np.ndarray, cache: list[Any], attention_mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, list[Any]]:
        """Logits [B, T, V] of ids [B, T] after `cache`, and the cache with them; the mask is [B, P + T]."""
        if attention_mask is None:
            attention_mask = np.ones((len(ids), cache[0].shape()[2] + ids.shape[1]), np.int64)
        inputs = {
            "input_ids": self._values.ortvalue_from_numpy(np.ascontiguousarray(ids, np.int64)),
            "attention_mask": self._values.ortvalue_from_numpy(
                np.ascontiguousarray(attention_mask, np.int64)
            ),
            **dict(zip(self._past, cache, strict=True)),
        }
        logits, *cache = self.session.run_with_ort_values(self._outputs, inputs)
        return logits.numpy(), cache

    @property
    def stop_ids(self) -> set[int]:
        eos = self.config.get("eos_token_id")
        return set(eos) if isinstance(eos, list) else set() if eos is None else {eos}

    def tokens(self, prompt: list[int], count: int, choose: Callable[[np.ndarray], int]) -> Iterator[int]:
        """Up to `count` tokens after `prompt`, none of them end-of-text; `choose` takes logits [V]."""
        logits, cache = self.step(np.array([prompt]), self.empty_cache())
        for left in range(count, 0, -1):
            token = choose(logits[0, -1])
            if token in self.stop_ids:
                return
            yield token
            if left > 1:
                logits, cache = self.step(np.array([[token]]), cache)


def sampler(temperature: float, top_k: int, seed: int, top_p: float = 1.0) -> Callable[[np.ndarray], int]:
    """Draws from softmax(logits / temperature); temperature 0 is greedy.

    Over the `top_k` largest (0: all), and of these the likeliest that have the share `top_p` together.
    """
    random = np.random.default_rng(seed)

    def draw(logits: np.ndarray) -> int:
        if temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / temperature
        if 0 < top_k < len(scaled):
            scaled[scaled < np.partition(scaled, -top_k)[-top_k]] = -np.inf
        odds = np.exp(scaled - scaled.max())
        odds /= odds.sum()
        if top_p < 1:
            order = np.argsort(-odds)
            before = np.cumsum(odds[order]) - odds[order]
            odds[order[before >= top_p]] = 0
        return int(random.choice(len(odds), p=odds / odds.sum()))

    return draw


@dataclass(frozen=True)
class Speed:
    """Wall-clock of one generation."""

    tokens: int
    first_token_seconds: float
    """From the prompt to its first new token."""
    seconds: float
    """Of all of them."""

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; of one token alone, its own."""
        after = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else self.tokens / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.tokens_per_second:,.0f} tokens/s after a first token in "
            f"{1000 * self.first_token_seconds:,.1f} ms"
        )


def generate(
    file: str | Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    top_p: float = 1.0,
    say: Callable[[str], Any] = lambda text: print(text, end="", flush=True),
) -> tuple[str, Speed | None]:
    """The prompt and its continuation, said as it comes, and its speed (None: no token).

    Raises:
        UserError: see `OnnxModel`; a prompt without tokens, or more tokens than the model has positions.
    """
    model = OnnxModel(file)
    ids = model.tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise UserError("--prompt: expected at least one token; give the text to continue")
    limit = model.config["max_position_embeddings"]
    if len(ids) + max_new_tokens > limit:
        raise UserError(
            f"--max-new-tokens: the prompt's {len(ids)} tokens and {max_new_tokens} new ones exceed the "
            f"model's {limit} positions; ask for at most {limit - len(ids)}"
        )
    start = time.perf_counter()
    times: list[float] = []
    new: list[int] = []
    said = ""
    say(prompt)
    for token in model.tokens(ids, max_new_tokens, sampler(temperature, top_k, seed, top_p)):
        times.append(time.perf_counter() - start)
        new.append(token)
        text = model.tokenizer.decode(ids + new)[len(prompt) :]
        if not text.endswith("\ufffd"):  # part of a character
            say(text[len(said) :])
            said = text
    text = model.tokenizer.decode(ids + new)
    say(text[len(prompt) + len(said) :] + "\n")
    return text, Speed(len(new), times[0], times[-1]) if times else None
