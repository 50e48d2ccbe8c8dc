"""Draws the functions that a run of a study learned."""

from __future__ import annotations

import torch

from kanlm.data import tokenizer_for
from kanlm.evaluation.perplexity import stream_blocks
from kanlm.kernels import functions_called
from kanlm.model.learned_function import LearnedFunction
from kanlm.study.plan import StudyFolder, run_config
from kanlm.study.runs import text_cache, trained_model


def draw(study: StudyFolder, out: str) -> None:
    """Draw the learned functions of the run of the phase `picture`, whose folder is kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    [trial] = study.trials_of(("picture",))
    config = run_config(trial)
    model = trained_model(config)
    cache = text_cache(config, tokenizer_for(config), "valid")
    inputs, *_ = stream_blocks(cache, range(0, 32 * 128, 128), 128, 32 * 128, True)
    seen: dict[str, torch.Tensor] = {}
    functions = {name: m for name, m in model.named_modules() if isinstance(m, LearnedFunction)}
    for name, module in functions.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    with torch.no_grad(), functions_called(model):
        model(input_ids=inputs, use_cache=False)
    groups = next(iter(functions.values())).groups
    figure, axes = plt.subplots(len(functions), groups, figsize=(1.5 * groups, 1.6 * len(functions)), dpi=110)
    x = torch.linspace(-4, 4, 400)
    for row, (name, module) in zip(axes, functions.items(), strict=True):
        start = LearnedFunction(
            groups, groups=groups, grid_size=module.basis.grid_size, initial=module.initial
        )
        learned = LearnedFunction(groups, groups=groups, grid_size=module.basis.grid_size)
        learned.load_state_dict(module.state_dict())
        points = x[:, None].expand(-1, groups)
        with torch.no_grad():
            curves, begun = learned(points), start(points)
        values = seen[name].reshape(-1, groups, module.channels // groups)
        for group, axis in enumerate(row):
            axis.hist(
                values[:, group].flatten().numpy(), bins=60, range=(-4, 4), density=True, color="#d4d4dc"
            )
            axis.plot(x, begun[:, group], ":", color="#374151", linewidth=1)
            axis.plot(x, curves[:, group], color="#c2410c", linewidth=1.6)
            axis.set(xlim=(-4, 4), ylim=(-1.2, 3.2), xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_color("#e5e7eb")
        row[0].set_ylabel(f"layer {name.split('.')[2]}", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(out)
