"""Names that pykan's users know, for small networks: an `nn.Sequential` of KANLinear layers.

    network = nn.Sequential(KANLinear(2, 5), KANLinear(5, 1))
    attribute(network, x), plot(network, x), prune(network, x), refine(network, 10)
    suggest_symbolic(network, 0, 0, 0, x), auto_symbolic(network, x), symbolic_formula(network)

None changes its argument: what returns a network returns a new one. x [N, I] are samples of the inputs; pykan
remembers those of the last call, here they are an argument. docs/from-pykan.md: one regression in both.

Shapes: N samples, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kanlm import fitting
from kanlm.fitting.knots import KnotSpline
from kanlm.interpret.functions import curves
from kanlm.interpret.layers import KIND, FunctionLayer
from kanlm.interpret.page import curve_svg, render
from kanlm.interpret.statistics import function_statistics
from kanlm.interpret.symbolic import LIBRARY, NAMES, THRESHOLD, WEIGHT, Formula, Formulas, fit_functions


class SymbolicLayer(nn.Module):
    """y_o = sum_i a f(b x_i + c) + d: a formula for every edge, whose four constants can be trained."""

    def __init__(self, forms: Formulas):
        super().__init__()
        self.in_features, self.out_features = forms.name.shape
        self.register_buffer("kind", forms.name.clone())
        self.r2, self.low, self.high = forms.r2, forms.low, forms.high
        for name in ("a", "b", "c", "d"):
            setattr(self, name, nn.Parameter(getattr(forms, name).float().clone()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.d.sum(0).expand(len(x), -1)
        for index in self.kind.unique().tolist():
            place, output = (self.kind == index).nonzero(as_tuple=True)
            inner = x[:, place] * self.b[place, output] + self.c[place, output]
            values = self.a[place, output] * LIBRARY[NAMES[index]].function(inner)
            y = y.index_add(1, output, values)
        return y

    def formula(self, place: int, output: int) -> Formula:
        numbers = (
            float(tensor.detach()[place, output]) for tensor in (self.a, self.b, self.c, self.d, self.r2)
        )
        return Formula(NAMES[int(self.kind[place, output])], *numbers)


@dataclass
class Attribution:
    """nodes[l]: scores of the inputs of layer l, the last those of the outputs; edges[l] [O, I]."""

    nodes: list[Tensor]
    edges: list[Tensor]


@torch.no_grad()
def _recorded(network: nn.Sequential, x: Tensor) -> list[FunctionLayer]:
    layers = []
    for place, module in enumerate(network):
        if KIND.get(type(module).__name__) != "edge":
            raise ValueError(
                f"network[{place}]: expected a KANLinear, got {type(module).__name__}; these functions read "
                "an nn.Sequential of KANLinear layers"
            )
        layers.append(FunctionLayer(f"layer {place}", module, x))
        x = module(x)
    return layers


def attribute(network: nn.Sequential, x: Tensor) -> Attribution:
    """How much of the outputs' variation goes through each node and edge, from the outputs back.

    An edge has the share std(phi_oi) / std(y_o) of its output's score, a node the sum of its edges'.
    """
    layers = _recorded(network, x)
    nodes = [torch.ones(layers[-1].outputs)]
    edges: list[Tensor] = []
    for layer in reversed(layers):
        values = layer.values(layer.x)  # [I, N, O]
        deviation = values.sum(0).std(0).clamp_min(1e-8)  # [O]
        score = (values.std(1) / deviation * nodes[0]).t()  # [O, I]
        edges.insert(0, score)
        nodes.insert(0, score.sum(0))
    return Attribution(nodes, edges)


@torch.no_grad()
def prune(
    network: nn.Sequential, x: Tensor, node_threshold: float = 1e-2, edge_threshold: float = 3e-2
) -> nn.Sequential:
    """A network without the hidden nodes and edges whose `attribute` scores are below the thresholds.

    Nodes are taken out of the layers, which get smaller; edges are set to zero. Each layer keeps a node.
    """
    scores = attribute(network, x)
    stays = [torch.arange(network[0].in_features)]
    for score in scores.nodes[1:-1]:
        chosen = (score >= node_threshold).nonzero().squeeze(1)
        stays.append(chosen if len(chosen) else score.argmax().unsqueeze(0))
    stays.append(torch.arange(network[-1].out_features))
    layers = []
    for place, layer in enumerate(network):
        into, out = stays[place], stays[place + 1]
        small = copy.deepcopy(layer)
        small.in_features, small.out_features = len(into), len(out)
        keep = (scores.edges[place] >= edge_threshold)[out][:, into].to(layer.spline.weight)
        coefficients = layer.spline.weight.unflatten(-1, (-1, layer.in_features))[out][:, :, into]
        small.spline = _linear((coefficients * keep.unsqueeze(1)).flatten(1))
        if layer.base is not None:
            small.base = _linear(layer.base.weight[out][:, into] * keep)
        if isinstance(layer.basis, KnotSpline):
            small.basis = layer.basis.with_knots(layer.basis.knots[:, into].clone())
        layers.append(small)
    return nn.Sequential(*layers)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def refine(network: nn.Sequential, grid: int) -> nn.Sequential:
    """The same functions on grids of `grid` intervals: a new network, whose optimiser must be built anew."""
    finer = copy.deepcopy(network)
    for layer in finer:
        fitting.refine(layer, grid)
    return finer


def plot(network: nn.Sequential, x: Tensor, path: str | Path | None = None) -> str:
    """Every function of a small network as one HTML page of inline SVG; also written to `path`.

    Functions are sorted by importance in each layer; their scores are those of `attribute`.
    """
    scores = attribute(network, x)
    sections = []
    for place, layer in enumerate(_recorded(network, x)):
        found = function_statistics(layer)
        pictures = []
        for index in range(layer.functions):
            i, o = divmod(index, layer.outputs)
            score = float(scores.edges[place][o, i])
            (curve,) = curves(layer, found, indices=[index])
            picture = curve_svg(curve | {"formula_y": curve["y"]})
            pictures.append({"label": f"{i} to {o}", "score": score, "svg": picture})
        pictures.sort(key=lambda picture: -picture["score"])
        sections.append({"name": layer.name, "pictures": pictures})
    text = render("network.html.j2", sections=sections)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def suggest_symbolic(
    network: nn.Sequential,
    l: int,  # noqa: E741 (pykan's name)
    i: int,
    j: int,
    x: Tensor,
    lib: Sequence[str] | None = None,
    topk: int = 5,
    weight_simple: float = WEIGHT,
) -> list[Formula]:
    """Formulas for the function of layer l from input i to output j, the best first.

    Ordered by weight_simple * complexity + (1 - weight_simple) * log2(1 + 1e-5 - R^2), as in pykan.
    """
    layer = _recorded(network, x)[l]
    found = function_statistics(layer)
    ends = {"low": layer.x[:, i].amin().view(1), "high": layer.x[:, i].amax().view(1)}
    tried = []
    for name in lib if lib is not None else NAMES:
        forms = fit_functions(
            found.x[i : i + 1], found.y[i : i + 1, :, j : j + 1], library=[name], refine=True, **ends
        )
        tried.append(forms.formula(0, 0))

    def cost(formula: Formula) -> float:
        bits = float(torch.log2(torch.tensor(1 + 1e-5 - formula.r2)))
        return weight_simple * LIBRARY[formula.name].complexity + (1 - weight_simple) * bits

    return sorted(tried, key=cost)[:topk]


@torch.no_grad()
def auto_symbolic(
    network: nn.Sequential,
    x: Tensor,
    lib: Sequence[str] | None = None,
    weight_simple: float = WEIGHT,
    r2_threshold: float = THRESHOLD,
) -> nn.Sequential:
    """A network of formulas, one for every function, each fitted on the range that its inputs visit.

    A function that is zero stays zero. The constants can be trained on. The result's loss is not the
    network's: measure it again.

    Raises:
        ValueError: a function that no formula explains to `r2_threshold`; its layer, input, output and R^2.
    """
    layers = []
    for layer in _recorded(network, x):
        found = function_statistics(layer)
        forms = fit_functions(
            found.x,
            found.y,
            low=layer.x.amin(0),
            high=layer.x.amax(0),
            library=lib,
            weight=weight_simple,
            refine=True,
        )
        absent = found.variance < 1e-12
        forms.a[absent], forms.name[absent] = 0.0, NAMES.index("x")
        forms.d[absent] = found.y.mean(1)[absent].double()
        bad = ((forms.r2 < r2_threshold) & ~absent).nonzero().tolist()
        if bad:
            place, output = bad[0]
            raise ValueError(
                f"{layer.name}: no formula for the function from input {place} to output {output} reaches "
                f"R^2 {r2_threshold}, the best has {forms.r2[place, output]:.4f}; lower r2_threshold, or "
                "prune first"
            )
        layers.append(SymbolicLayer(forms))
    return nn.Sequential(*layers)


def symbolic_formula(network: nn.Sequential, var: Sequence[str] | None = None, digits: int = 4) -> list[Any]:
    """SymPy expressions of the outputs of a network of formulas (`auto_symbolic`).

    Raises:
        ValueError: a layer that still has learned functions.
    """
    import sympy

    for place, layer in enumerate(network):
        if not isinstance(layer, SymbolicLayer):
            raise ValueError(f"network[{place}]: has learned functions, no formulas; use auto_symbolic first")
    names = var or [f"x_{place + 1}" for place in range(network[0].in_features)]
    values = [sympy.Symbol(name) for name in names]
    for layer in network:
        values = [
            sympy.Add(
                *(
                    layer.formula(place, output).sympy(values[place], digits)
                    for place in range(layer.in_features)
                )
            )
            for output in range(layer.out_features)
        ]
    return values
