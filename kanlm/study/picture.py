"""The functions that runs of a study learned, as numbers that the report draws and compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kanlm.config import RunConfig, UserError
from kanlm.data import tokenizer_for
from kanlm.evaluation.perplexity import stream_blocks
from kanlm.kernels import functions_called
from kanlm.model.learned_function import LearnedFunction
from kanlm.model.modeling_kanlm import KanLMForCausalLM
from kanlm.runs import write_json
from kanlm.sizing import architecture
from kanlm.study.plan import StudyFolder, key_of, run_config
from kanlm.study.runs import text_cache, trained_model
from kanlm.train.loop import train

FROM, TO, POINTS, BINS = -4.0, 4.0, 81, 40
BLOCKS = 32
"""Of validation text, whose inputs of the functions are counted."""


def write_functions(study: StudyFolder) -> Path:
    """functions.json of the study: what the runs of its phases `picture` and `picture-...` learned.

    Their folders are kept; a run whose folder is gone is trained again. `x` [POINTS]. `layers`, of the first
    run: for each layer and group `start` and `learned`, the function there before and after training, and
    `density` [BINS], the share of its inputs by their value over a bin's width. `runs`: of each run `means`,
    for each layer the mean of its groups' functions, `learned` alone.
    """
    named = tuple(phase["name"] for phase in study.phases() if phase["name"].split("-")[0] == "picture")
    if not named:
        raise UserError(
            f"{study.plan}: no phase `picture`, whose functions are drawn; add it, with keep = true"
        )
    trials = study.trials_of(named)
    for trial in trials:
        if not trial.get("keep"):
            raise UserError(
                f"{study.plan}: phase picture: keep: absent; set it to true, as its runs are read"
            )
        model = KanLMForCausalLM(architecture(run_config(trial)))
        if not any(isinstance(module, LearnedFunction) for module in model.modules()):
            raise UserError(
                f"{study.plan}: phase picture: arm {trial['arm']} has no learned activations; kan_act has"
            )
    x = torch.linspace(FROM, TO, POINTS)
    layers: list[dict[str, Any]] = []
    runs = []
    for trial in trials:
        config = run_config(trial)
        train(config)  # a run that is finished stays as it is
        model = trained_model(config)
        functions = {name: m for name, m in model.named_modules() if isinstance(m, LearnedFunction)}
        if not layers:
            seen = inputs_of(functions, model, config)
            layers = [{"name": name, "groups": curves(m, x, seen[name])} for name, m in functions.items()]
        means = [rounded(learned(module, x).mean(dim=1)) for module in functions.values()]
        runs.append({"trial": key_of(trial), "corpus": trial["corpus"], "means": means})
    path = study.path / "functions.json"
    write_json(path, {"trial": key_of(trials[0]), "x": rounded(x), "layers": layers, "runs": runs})
    return path


def inputs_of(
    functions: dict[str, LearnedFunction], model: KanLMForCausalLM, config: RunConfig
) -> dict[str, torch.Tensor]:
    """By its name, each function's inputs on the first BLOCKS of validation text."""
    cache = text_cache(config, tokenizer_for(config), "valid")
    tokens = BLOCKS * 128
    inputs, *_ = stream_blocks(cache, range(0, tokens, 128), 128, tokens, True)
    seen: dict[str, torch.Tensor] = {}
    for name, module in functions.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    with torch.no_grad(), functions_called(model):
        model(input_ids=inputs, use_cache=False)
    return seen


@torch.no_grad()
def learned(module: LearnedFunction, x: torch.Tensor) -> torch.Tensor:
    """[points, groups]: the function of each group."""
    alone = LearnedFunction(module.groups, groups=module.groups, grid_size=module.basis.grid_size)
    alone.load_state_dict(module.state_dict())
    return alone(x[:, None].expand(-1, module.groups))


@torch.no_grad()
def curves(module: LearnedFunction, x: torch.Tensor, inputs: torch.Tensor) -> list[dict[str, Any]]:
    """For each group of the function."""
    groups, grid_size = module.groups, module.basis.grid_size
    start = LearnedFunction(groups, groups=groups, grid_size=grid_size, initial=module.initial)
    began = start(x[:, None].expand(-1, groups))
    found = learned(module, x)
    values = inputs.reshape(-1, groups, module.channels // groups)
    width = (TO - FROM) / BINS
    return [
        {
            "start": rounded(began[:, group]),
            "learned": rounded(found[:, group]),
            "density": rounded(
                torch.histc(values[:, group].float(), BINS, FROM, TO) / values[:, group].numel() / width
            ),
        }
        for group in range(groups)
    ]


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
