"""Any causal language model and its tokenizer, read from a folder or the Hub without running foreign code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kanlm.checksums import downloaded, must_be_readable, verify
from kanlm.config import UserError, one_line
from kanlm.model import KanLMConfig  # also registers the classes that serve kanlm's own folders
from kanlm.runs import RunDir, read_json, system_errors
from kanlm.trust import refuse_model_code


def load_causal_lm(
    model_path: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a folder or hub id through the Auto classes, on `device` (GPU, else CPU).

    `dtype` is a torch dtype's name or `auto` (as saved). The files have to be those of the model's
    SHA256SUMS, where it has one. Models of kanlm are built by the installed package, whatever code lies
    beside them; other code runs only if `trust_remote_code`.

    Raises:
        UserError: no model there, a run instead of a model, no causal language model, no tokenizer, weights
            missing, no such device, a file that is damaged or not that of the folder's SHA256SUMS, or code of
            its own without trust.
    """
    path = Path(model_path)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    must_be_model(model_path)
    place_to_run = usable_device(device)
    if path.exists():
        must_be_readable(path)
    place = path if path.exists() else downloaded(model_path) or model_path
    register_converted(Path(place))
    try:
        if not trust_remote_code:
            refuse_model_code(place)
        verify(path)
        with system_errors(path / "tokenizer.json"):
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
            config: Any = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
            must_be_causal(model_path, config)
            checks_itself = config.model_type == KanLMConfig.model_type
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                trust_remote_code=trust_remote_code,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=not checks_itself,
                ignore_mismatched_sizes=not checks_itself,  # they are refused below
            )
    except OSError as error:
        if error.errno is not None and error.filename is not None and path.exists():
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); run the same command again"
            ) from error
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {model_path}: neither a model folder nor a reachable hub id: {first_line}"
        ) from error
    except ValueError as error:
        reason = library_complaint(error)
        if reason is None:
            raise
        raise UserError(f"model {model_path}: {reason}") from error
    model, report = (loaded, {}) if checks_itself else loaded
    must_have_weights(model_path, model, report)
    return model.to(place_to_run).eval(), tokenizer


def library_complaint(error: ValueError) -> str | None:
    """What transformers says at length of a model of another kind, or without a tokenizer; else None."""
    said = one_line(error)
    if "Unrecognized configuration class" in said:
        return "no causal language model; looked for an architecture that AutoModelForCausalLM knows"
    if "instantiate the backend tokenizer" in said:
        return "has no tokenizer that can be read; looked for tokenizer.json and tokenizer_config.json"
    return None


def must_be_causal(model_path: str | Path, config: Any) -> None:
    """Raise UserError for an encoder, whose tokens see those that follow."""
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal:
        raise UserError(
            f"model {model_path}: {config.model_type} is an encoder, no causal language model; looked for "
            "is_decoder: true in its config.json"
        )


def must_have_weights(model_path: str | Path, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Raise UserError where transformers' `report` has parameters that are random: no weights, or no fit."""
    wrong = {*report.get("missing_keys", ()), *(name for name, *_ in report.get("mismatched_keys", ()))}
    if wrong:
        raise UserError(
            f"model {model_path}: no weights that fit for {len(wrong)} parameters of {type(model).__name__}, "
            f"{min(wrong)} for one; give a model that was saved as a causal language model"
        )


def usable_device(name: str | None) -> torch.device:
    """The device called `name`, by default the GPU where there is one.

    Raises:
        UserError: torch does not know it, or this machine has none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # the first: torch was built without it
        raise UserError(f"--device: {name!r} cannot be used here ({one_line(error)}); give cpu") from None


def must_be_model(model_path: str | Path) -> None:
    """Raise where `model_path` is neither the folder of a model nor what may be a hub id.

    Raises:
        UserError: no such folder, a run, or a folder without a config.json.
    """
    path = Path(model_path)
    if not path.exists() and (str(model_path).startswith((".", "/", "~")) or str(model_path).count("/") > 1):
        raise UserError(f"model {model_path}: no such folder; give an exported folder or a hub id")
    if RunDir(path).record.is_file():
        raise UserError(
            f"model {model_path}: a run, not a model; run `kanlm export` and give {RunDir(path).hf}"
        )
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(
            f"model {model_path}: no config.json there; expected a folder written by `kanlm export`"
        )


def register_converted(folder: Path) -> None:
    """Let models of `kanlm convert` be built by the installed package, as kanlm's own are."""
    config = folder / "config.json"
    if config.is_file() and str(read_json(config).get("model_type")).startswith("kanlm_"):
        from kanlm.model.modeling_converted import register

        register()
