"""Optimisers over four groups of parameters: matrices, KAN coefficients, embeddings, and vectors.

| group      | what                                            | weight decay | learning rate               |
|------------|-------------------------------------------------|--------------|-----------------------------|
| matrices   | attention and FFN weights with two or more axes | weight_decay | learning_rate               |
| kan        | KAN coefficients                                | 0            | kan_learning_rate, or       |
|            |                                                 |              | x kan_lr_multiplier         |
| embeddings | token embedding and untied output head          | 0            | learning_rate               |
| vectors    | norm scales, biases, learned scalars            | 0            | learning_rate               |

`muon` gives the matrices to Muon (muon.py; Jordan et al. 2024) with updates scaled to AdamW's RMS (Liu et
al. 2025, https://arxiv.org/abs/2502.16982), so that one learning rate serves both, and with `kan_optimizer`
"muon" the coefficients, a matrix [O, K*I] in a layer of edge functions; everything else stays with AdamW.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from kanlm.config import TrainConfig
from kanlm.initial import kan_coefficient_names
from kanlm.train.muon import BatchedMuon

GROUPS = ("matrices", "kan", "embeddings", "vectors")


def parameter_groups(model: PreTrainedModel) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every trainable parameter of a causal LM, exactly once, as (name, parameter) by its group's name."""
    kan = kan_coefficient_names(model)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        embeddings.add(id(head.weight))
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in kan:
            group = "kan"
        elif id(parameter) in embeddings:
            group = "embeddings"
        else:
            group = "matrices" if parameter.ndim >= 2 else "vectors"
        groups[group].append((name, parameter))
    return groups


def kan_peak(config: TrainConfig) -> float:
    """Peak learning rate of the KAN coefficients."""
    return config.kan_learning_rate or config.learning_rate * config.kan_lr_multiplier


def optimizers(
    model: PreTrainedModel, config: TrainConfig, device: torch.device
) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the matrices and AdamW for the rest.

    Each torch group carries `name` (of the table above) and `peak_lr`; the loop sets `lr` = `peak_lr` *
    schedule. AdamW is fused on CUDA and CPU, which both have the kernel.
    """
    groups = parameter_groups(model)

    def settings_of(name: str) -> dict:
        peak = kan_peak(config) if name == "kan" else config.learning_rate
        betas = config.kan_betas if name == "kan" and config.kan_betas else config.betas
        return {
            "name": name,
            "params": [parameter for _, parameter in groups[name]],
            "lr": peak,
            "peak_lr": peak,
            "betas": betas,
            "weight_decay": config.weight_decay if name == "matrices" else 0.0,
        }

    muon_names = {"matrices"} if config.optimizer == "muon" else set()
    if config.kan_optimizer == "muon":
        muon_names.add("kan")
    present = [settings_of(name) for name in GROUPS if groups[name]]
    fused = device.type in ("cuda", "cpu")
    rest = [group for group in present if group["name"] not in muon_names]
    made: list[torch.optim.Optimizer] = []
    if rest:  # where functions alone train, Muon may have them all
        made.append(torch.optim.AdamW(rest, lr=config.learning_rate, eps=config.eps, fused=fused))
    for_muon = [
        {key: value for key, value in group.items() if key != "betas"}
        for group in present
        if group["name"] in muon_names
    ]
    if for_muon:
        made.insert(0, BatchedMuon(for_muon, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw"))
    return made
