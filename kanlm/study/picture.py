"""The functions that a run of a study learned, as numbers that the report draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kanlm.config import UserError
from kanlm.data import tokenizer_for
from kanlm.evaluation.perplexity import stream_blocks
from kanlm.kernels import functions_called
from kanlm.model.learned_function import LearnedFunction
from kanlm.runs import RunDir, write_json
from kanlm.study.plan import StudyFolder, key_of, run_config
from kanlm.study.runs import text_cache, trained_model

FROM, TO, POINTS, BINS = -4.0, 4.0, 81, 40
BLOCKS = 32
"""Of validation text, whose inputs of the functions are counted."""


def write_functions(study: StudyFolder) -> Path:
    """functions.json of the study: the learned functions of the run of its phase `picture`, which is kept.

    `x` [POINTS]; for each layer and group `start` and `learned`, the function there before and after
    training, and `density` [BINS], the share of its inputs by their value over a bin's width.
    """
    trial, *others = study.trials_of(("picture",))
    if others:
        raise UserError(
            f"{study.plan}: phase picture: {len(others) + 1} trials, where the functions of one are drawn; "
            "give it one arm, one seed and one value of each key"
        )
    config = run_config(trial)
    if not RunDir(config.run_dir).checkpoint_folders():
        raise UserError(
            f"{config.run_dir}: no checkpoint of the phase `picture`, whose functions these are; "
            f"`kanlm study run --folder {study.path} picture` trains it"
        )
    model = trained_model(config)
    cache = text_cache(config, tokenizer_for(config), "valid")
    tokens = BLOCKS * 128
    inputs, *_ = stream_blocks(cache, range(0, tokens, 128), 128, tokens, True)
    seen: dict[str, torch.Tensor] = {}
    functions = {name: m for name, m in model.named_modules() if isinstance(m, LearnedFunction)}
    if not functions:
        raise UserError(
            f"{study.plan}: phase picture: arm {trial['arm']} has no learned activations; kan_act has"
        )
    for name, module in functions.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    with torch.no_grad(), functions_called(model):
        model(input_ids=inputs, use_cache=False)
    x = torch.linspace(FROM, TO, POINTS)
    layers = [{"name": name, "groups": curves(module, x, seen[name])} for name, module in functions.items()]
    path = study.path / "functions.json"
    write_json(path, {"trial": key_of(trial), "x": rounded(x), "layers": layers})
    return path


@torch.no_grad()
def curves(module: LearnedFunction, x: torch.Tensor, inputs: torch.Tensor) -> list[dict[str, Any]]:
    """For each group of the function."""
    groups, grid_size = module.groups, module.basis.grid_size
    start = LearnedFunction(groups, groups=groups, grid_size=grid_size, initial=module.initial)
    learned = LearnedFunction(groups, groups=groups, grid_size=grid_size)
    learned.load_state_dict(module.state_dict())
    points = x[:, None].expand(-1, groups)
    values = inputs.reshape(-1, groups, module.channels // groups)
    width = (TO - FROM) / BINS
    return [
        {
            "start": rounded(start(points)[:, group]),
            "learned": rounded(learned(points)[:, group]),
            "density": rounded(
                torch.histc(values[:, group].float(), BINS, FROM, TO) / values[:, group].numel() / width
            ),
        }
        for group in range(groups)
    ]


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
