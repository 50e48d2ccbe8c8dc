"""What the functions of a layer do on real text, as numbers, and the same of controls.

Shapes: N tokens, F inputs, O functions of each, Q quantiles, S parts of the text.

Importance is measured twice, because each misleads alone. `variance`: of the function's output over the
inputs that the text gives it (the "activation norm" of Liu et al. 2024, arXiv:2404.19756, sec. 2.5.1, without
its mean, which a later layer can absorb). It knows nothing of what follows. `effect`: root mean square over
tokens of g (phi(x) - mean phi), g the gradient of the loss by the function's output: how far the loss moves,
to first order, when the function is replaced by its mean (Molchanov et al. 2019, arXiv:1906.10771). It knows
nothing of what a large change does.

Every number is also that of two controls, a model of the same configuration with random weights and the same
model with its learned parts set back to their start: what they show as well was not learned. The text is cut
into S parts; each gives one difference, with random weights of its own; the p-value is that of the exact
sign-flip test on the S differences, so it covers both which text and which random weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from kanlm.interpret.layers import CACHED_BYTES, FunctionLayer, edge_expansion
from kanlm.interpret.symbolic import fit_functions

QUANTILES = 33
SATURATED = 0.05
"""A function is flat where its slope is below this share of its largest slope on the text."""
FORMULAS = 64
"""Most important functions of a layer that the statistic `formula_r2` fits formulas to."""
DRIVEN = 16
"""Functions of a layer that `token_share` looks at."""
RANKED = 8192
"""Functions of a layer, evenly spaced, over which the two importances are compared: two digits are right."""

STATISTICS = {
    "importance": "variance of all outputs",
    "effect": "first-order effect on the loss",
    "agreement": "agreement of the two importances (Spearman)",
    "share_for_90_percent": "share of functions that carries 90%",
    "nonlinear_share": "nonlinear share",
    "saturated": "visited range that is flat",
    "outside_grid": "inputs off the grid",
    "formula_r2": "R² of the best simple formula",
    "token_share": "variance explained by the token itself",
}
"""Keys and what the page calls them."""


@dataclass
class FunctionStatistics:
    """x [F, Q] and y [F, Q, O]: the functions at Q equally likely inputs; the rest [F, O], see above.

    `left`: what the best straight line leaves of the variance. `saturated`: share of the inputs at which the
    function is flat.
    """

    x: Tensor
    y: Tensor
    variance: Tensor
    left: Tensor
    effect: Tensor | None
    saturated: Tensor
    outside_grid: float | None


def middle_quantiles(rows: Tensor) -> Tensor:
    """[N, F] to [Q, F]: the middles of Q equally likely parts of each column."""
    rows = rows[:: max(1, len(rows) // 16_384)]
    levels = (torch.arange(QUANTILES, device=rows.device) + 0.5) / QUANTILES
    return torch.quantile(rows, levels, dim=0)


def importance_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of y [F, Q, O] at equally likely x [F, Q]: the variance, and what the best line leaves of it [F, O]."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    variance = y.square().mean(1)
    covariance = torch.bmm(x.unsqueeze(1), y).squeeze(1) / x.shape[1]
    explained = covariance.square() / x.square().mean(1, keepdim=True).clamp_min(1e-12)
    return variance, (variance - explained).clamp_min(0)


@torch.no_grad()
def function_statistics(layer: FunctionLayer) -> FunctionStatistics:
    """The functions of one layer on the text it was recorded on."""
    samples = layer.samples()
    quantiles = middle_quantiles(samples)  # [Q, F]
    y = layer.values(quantiles)  # [F, Q, O]
    x = quantiles.t().contiguous()  # [F, Q]
    variance, left = importance_of(x, y)
    slope = y.diff(dim=1).abs() / x.diff(dim=1).clamp_min(1e-9).unsqueeze(-1)  # [F, Q-1, O]
    flat = slope <= SATURATED * slope.amax(1, keepdim=True)
    low, high = (getattr(getattr(layer.module, "basis", None), end, None) for end in ("grid_min", "grid_max"))
    knots = getattr(layer.module, "knots", None)
    if knots is not None:  # an adaptive grid: each input has its own
        low, high = knots[0], knots[-1]
    outside = None if low is None else ((layer.x < low) | (layer.x > high)).float().mean().item()
    return FunctionStatistics(x, y, variance, left, first_order_effect(layer), flat.float().mean(1), outside)


@torch.no_grad()
def first_order_effect(layer: FunctionLayer) -> Tensor | None:
    """Root mean square over tokens of g (phi(x) - mean phi), [F, O]; a group's channels count together."""
    if layer.gradient is None:
        return None
    gradient = layer.gradient if layer.factor is None else layer.gradient * layer.factor
    if layer.kind != "edge":
        phi = layer.module(layer.x.to(next(layer.module.parameters(), layer.x).dtype)).float()
        moved = gradient * (
            phi - phi.view(-1, layer.inputs, layer.size).mean((0, 2)).repeat_interleave(layer.size)
        )
        return moved.view(-1, layer.inputs, layer.size).sum(-1).square().mean(0).sqrt().unsqueeze(-1)
    # By parts that stay in a processor's cache: all values of phi are N F O numbers.
    features, coefficients = edge_expansion(layer.module, layer.x)
    centred = (features - features.mean(0)).permute(2, 0, 1).contiguous()  # [I, N, K]: phi without its mean
    c = coefficients.permute(2, 1, 0).contiguous()  # [I, K, O]
    weights = gradient.square() / len(layer.x)  # [N, O]
    total = torch.empty(layer.inputs, layer.outputs)
    step = max(1, CACHED_BYTES // (4 * weights.numel()))
    for start in range(0, layer.inputs, step):
        part = slice(start, start + step)
        phi = torch.bmm(centred[part], c[part])  # [i, N, O]
        total[part] = phi.square_().mul_(weights).sum(1)
    return total.sqrt()


def layer_summary(layer: FunctionLayer, found: FunctionStatistics, tokens: Tensor) -> dict[str, float | None]:
    """The numbers of STATISTICS for one layer; tokens [N] are the ids at which it was recorded."""
    total = found.variance.sum().item()
    weights = found.variance / max(total, 1e-30)
    return {
        "importance": total,
        "effect": None if found.effect is None else found.effect.square().sum().sqrt().item(),
        "agreement": agreement(found),
        "share_for_90_percent": share_for_90_percent(found.variance),
        "nonlinear_share": (found.left.sum() / total).item() if total > 0 else 0.0,
        "saturated": (found.saturated * weights).sum().item(),
        "outside_grid": found.outside_grid,
        "formula_r2": formula_r2(found),
        "token_share": token_share(layer, found, tokens),
    }


def largest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` largest in the flattened `values`, the largest first."""
    return values.flatten().topk(min(count, values.numel())).indices


def share_for_90_percent(variance: Tensor) -> float:
    """Of the functions, the fewest that carry 90% of the variance."""
    ordered = variance.flatten().sort(descending=True).values.double()
    total = ordered.sum()
    return (int((ordered.cumsum(0) < 0.9 * total).sum()) + 1) / variance.numel() if total > 0 else 0.0


def agreement(found: FunctionStatistics) -> float | None:
    """Spearman's rank correlation of `variance` and `effect` over the layer's functions, RANKED of them."""
    if found.effect is None or found.variance.numel() < 3:
        return None
    step = math.ceil(found.variance.numel() / RANKED)
    both = (values.flatten()[::step].numpy(force=True) for values in (found.variance, found.effect))
    deviations = [rank - rank.mean() for rank in map(rankdata, both)]
    norm = math.sqrt(float((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / norm if norm > 0 else None


def formula_r2(found: FunctionStatistics) -> float | None:
    """Mean R^2 of the best formulas of the most important functions, weighted by their variance."""
    chosen = largest(found.variance, FORMULAS)
    weights = found.variance.flatten()[chosen]
    if weights.sum() <= 0:
        return None
    outputs = found.y.shape[-1]
    x = found.x[chosen // outputs]
    y = found.y.transpose(1, 2).flatten(0, 1)[chosen]  # [T, Q]
    forms = fit_functions(x, y.unsqueeze(-1), refine=False)
    return float((forms.r2.flatten() * weights).sum() / weights.sum())


@torch.no_grad()
def token_share(layer: FunctionLayer, found: FunctionStatistics, tokens: Tensor) -> float | None:
    """Share of the variance of the most important functions that the current token explains.

    Epsilon squared, 1 - (within / (n - k)) / (total / (n - 1)): without the bias of the plain ratio, which is
    near one where most tokens occur once.
    """
    chosen = largest(found.variance, DRIVEN)
    outputs = function_outputs(layer, chosen.tolist()).flatten(1)  # [N, T size]
    _, kind = tokens.unique(return_inverse=True)
    kinds, count = int(kind.max()) + 1, len(tokens)
    if kinds >= count or kinds < 2:
        return None
    sums = outputs.new_zeros(kinds, outputs.shape[1]).index_add_(0, kind, outputs)
    sizes = torch.bincount(kind, minlength=kinds).unsqueeze(1)
    within = (outputs - (sums / sizes)[kind]).square().sum(0)
    total = (outputs - outputs.mean(0)).square().sum(0)
    if total.sum() <= 0:
        return None
    return float(1 - (within.sum() / (count - kinds)) / (total.sum() / (count - 1)))


@torch.no_grad()
def function_outputs(layer: FunctionLayer, indices: Sequence[int]) -> Tensor:
    """Outputs at every token of the functions at places `indices` of [F, O]: [N, T, sharing channels]."""
    module = layer.module
    if layer.kind != "edge":
        phi = module(layer.x.to(next(module.parameters(), layer.x).dtype)).float()
        return phi.view(len(phi), layer.inputs, layer.size)[:, list(indices)]
    places = [index // layer.outputs for index in indices]
    outputs = [index % layer.outputs for index in indices]
    features, coefficients = edge_expansion(module, layer.x)
    phi = torch.einsum("nkt,tk->nt", features[:, :, places], coefficients[outputs, :, places])
    return phi.unsqueeze(-1)


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of the mean of paired differences: the exact test over all 2^S signs.

    Its smallest value is 2 / 2^S. None for fewer than 3 differences.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 3:
        return None
    if np.all(values == 0):
        return 1.0
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) * (1 - 1e-9)))


def compare_with_control(
    trained: Sequence[dict[str, float | None]], control: Sequence[dict[str, float | None]]
) -> dict[str, dict[str, float | None]]:
    """For each statistic the control's mean over the parts of the text, and the p-value of the difference."""
    result: dict[str, dict[str, float | None]] = {}
    for key in STATISTICS:
        pairs = [
            (own[key], other[key])
            for own, other in zip(trained, control, strict=True)
            if own[key] is not None and other[key] is not None
        ]
        mean = sum(other for _, other in pairs) / len(pairs) if pairs else None
        result[key] = {"value": mean, "p": sign_flip_p([own - other for own, other in pairs])}
    return result
