"""Any causal LM as an ONNX graph with a KV cache, and the files that runtimes want beside it.

Legend: B batch, T new tokens, P tokens in the cache, C key-value heads, E head dim, V vocabulary.

model.onnx          input_ids [B, T], attention_mask [B, P + T], past_key_values.N.key/value [B, C, P, E]
                    to logits [B, T, V], present.N.key/value [B, C, P + T, E]; fp32
model_int8.onnx     the same with int8 weights and sampled functions
model_tables.onnx   fp32 with sampled functions, for a model that has some (functions.py)
genai_config.json   for ONNX Runtime GenAI
config.json         for transformers.js, which reads the sizes of the cache from it
tokenizer.json ...  the tokenizer, so that the folder is complete
SHA256SUMS          checked before the graph is run
index.html, web/    a page that runs the graphs in a browser (browser.py)

Positions are counted from the attention mask, so padding on the left changes nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from kanlm import checksums
from kanlm.config import UserError, one_line
from kanlm.edge.browser import add_page, vendor
from kanlm.edge.functions import MAX_SAMPLED, can_be_sampled, translations, with_graph_functions
from kanlm.model.modeling_kanlm import CACHE
from kanlm.runs import new_folder, save_tokenizer, write_json, write_text

FP32, INT8, TABLES = "model.onnx", "model_int8.onnx", "model_tables.onnx"
ONE_FILE_BYTES = 1_500_000_000
"""Weights beyond this lie in a file of their own: a protobuf message ends at 2 GiB."""


def needs(*packages: str) -> None:
    """UserError where one of the `packages` of the extra `onnx` is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not installed, and ONNX files need it; run: pip install 'kanlm[onnx]'"
        )


class CachedDecoder(nn.Module):
    """`model` with its cache as plain tensors: the graph's inputs and outputs in the module docstring."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache: Any = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE: cache},
        )
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)


def write_onnx(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    int8: bool = False,
    page_title: str | None = None,
    tables: bool = False,
) -> Path:
    """Write the files of the module docstring to the new folder `folder`.

    The graphs `int8` and `tables`, and with a `page_title` the page of browser.py, only where asked for.

    Raises:
        UserError: what `graph` and `vendor` refuse; `folder` exists; `tables` of a model that has none.
    """
    folder = Path(folder)
    must_be_new(folder)
    has_tables = any(can_be_sampled(module) for module in model.modules())
    if tables and not has_tables:
        raise UserError(
            f"--tables: {type(model).__name__} has no learned functions that at most {MAX_SAMPLED} groups "
            "share; leave --tables away"
        )
    with new_folder(folder) as made:
        if page_title is not None:
            vendor(made / "web")  # a missing npm is told before the minutes of tracing
        proto = stripped(graph(model).model_proto)
        save(proto, made / FP32)
        if has_tables and (int8 or tables):
            proto = stripped(graph(model, sampled=True).model_proto)
        if tables:
            save(proto, made / TABLES)
        if int8:
            from kanlm.edge.int8 import with_int8_weights

            save(with_int8_weights(proto), made / INT8)
        save_tokenizer(tokenizer, made)
        sizes = model_sizes(model, tokenizer)
        write_json(made / "config.json", transformers_js_config(sizes))
        write_json(made / "genai_config.json", genai_config(sizes))
        if page_title is not None:
            add_page(made, model, page_title)
        write_text(made / checksums.NAME, checksums.checksums(made))
    return folder


def must_be_new(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder}: exists already; delete it to write the ONNX files again")


def stripped(proto: Any) -> Any:
    """`proto` without the exporter's notes on every node, a third of a small model's bytes."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    return proto


def save(proto: Any, path: Path) -> None:
    import onnx

    if proto.ByteSize() <= ONE_FILE_BYTES:
        onnx.save(proto, path)
    else:
        onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}_data")


def model_sizes(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What runtimes have to know of `model`, under the names of Llama's configuration."""
    shapes = cache_shapes(model)
    config = model.config
    heads = getattr(config, "num_attention_heads", shapes[0][0])
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": model.get_input_embeddings().weight.shape[1],
        "num_hidden_layers": len(shapes),
        "num_attention_heads": heads,
        "num_key_value_heads": shapes[0][0],
        "head_dim": shapes[0][1],
        "max_position_embeddings": config.max_position_embeddings,
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for holder in (model.generation_config, config, tokenizer):
            if sizes.get(name) is None:
                sizes[name] = getattr(holder, name, None)
    if sizes["pad_token_id"] is None:
        sizes["pad_token_id"] = sizes["eos_token_id"]
    return sizes


def transformers_js_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """config.json: the graph's inputs are those of a Llama, so transformers.js may take it for one."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "transformers.js_config": {"dtype": "fp32"},
    }


def genai_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """genai_config.json of ONNX Runtime GenAI's generic decoder."""
    tokens = {name: sizes[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": sizes["vocab_size"],
            "context_length": sizes["max_position_embeddings"],
            **{name: value for name, value in tokens.items() if value is not None},
            "decoder": {
                "filename": FP32,
                "session_options": {"provider_options": []},
                "hidden_size": sizes["hidden_size"],
                "head_size": sizes["head_dim"],
                "num_attention_heads": sizes["num_attention_heads"],
                "num_key_value_heads": sizes["num_key_value_heads"],
                "num_hidden_layers": sizes["num_hidden_layers"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": sizes["max_position_embeddings"],
            "past_present_share_buffer": False,
        },
    }


def cache_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(C, E) of each layer of `model`, read off the cache of two tokens."""
    cache: Any = DynamicCache()
    device = next(model.parameters()).device
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), **{CACHE: cache})
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]


def past_names(layers: int, prefix: str = "past_key_values") -> list[str]:
    return [f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def graph(model: nn.Module, sampled: bool = False) -> Any:
    """`model`, in eval mode on the CPU, as a `torch.onnx.ONNXProgram`; `sampled`: see `with_graph_functions`.

    Raises:
        UserError: onnx or onnxscript missing, a model that is no decoder with keys and values in its cache.
    """
    needs("onnx", "onnxscript")
    try:
        shapes = cache_shapes(model)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(not_a_decoder(model, one_line(error))) from error
    if not shapes:
        raise UserError(not_a_decoder(model, "its cache stays empty"))
    batch, new, seen = 2, 3, 4  # any but 0 and 1, which torch.export takes for constants
    past = [torch.zeros(batch, *shape[:1], seen, *shape[1:]) for shape in shapes for _ in range(2)]
    inputs = (
        torch.zeros(batch, new, dtype=torch.int64),
        torch.ones(batch, seen + new, dtype=torch.int64),
        *past,
    )
    free = (
        {0: "batch", 1: "length"},
        {0: "batch", 1: "total"},
        tuple({0: "batch", 2: "past"} for _ in past),
    )
    decoder = CachedDecoder(with_graph_functions(model, sampled)).eval()
    with quiet(), torch.no_grad():
        return torch.onnx.export(
            decoder,
            inputs,
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask", *past_names(len(shapes))],
            output_names=["logits", *past_names(len(shapes), "present")],
            dynamic_shapes=free,
            custom_translation_table=translations(),
        )


def not_a_decoder(model: nn.Module, reason: str) -> str:
    return (
        f"{type(model).__name__}: not a decoder with a cache of keys and values, and no other can be written "
        f"as ONNX: {reason}"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter's notes to its own developers are not for our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
