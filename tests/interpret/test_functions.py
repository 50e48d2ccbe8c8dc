"""Learned functions as numbers: read through the layer as a black box, checked against its own basis."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kanlm.interpret.functions import (
    edge_values,
    importance_of,
    kan_layers,
    layer_inputs,
    learned_functions,
    middle_quantiles,
)
from kanlm.interpret.inspect import layer_table
from kanlm.interpret.pictures import learned_functions_svg, spread
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.kan import KANLinear


class Letters:
    """A tokenizer of letters, enough for what reads only ids."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 64 for letter in text]}


TEXT = ["".join(chr(97 + (i * i + 3 * i) % 26) for i in range(700))]


def model(ffn_type: str, **settings) -> KanLMForCausalLM:
    torch.manual_seed(3)
    config = KanLMConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        ffn_type=ffn_type,
        kan_num_groups=4,
        kan_grid_size=5,
        **settings,
    )
    network = KanLMForCausalLM(config).eval()
    with torch.no_grad():  # learned functions that are no longer what they started as
        for name, parameter in network.named_parameters():
            if name.endswith(("spline.weight", "coefficients")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return network


def test_edge_values_are_the_edges_functions():
    torch.manual_seed(0)
    layer = KANLinear(5, 3, "bspline", grid_size=4, spline_share=0.5)
    points = torch.randn(7, 5)
    found = edge_values(layer, points)  # [I, P, O]
    K = layer.num_functions
    coefficients = layer.spline.weight.view(3, K, 5)

    def phi(x):  # [P, I] -> [I, P, O]
        spline = torch.einsum("pki,oki->ipo", layer.basis.values(x), coefficients)
        return spline + torch.einsum("pi,oi->ipo", F.silu(x), layer.base.weight)

    assert found.shape == (5, 7, 3)
    expected = phi(points) - phi(torch.zeros(1, 5))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_importance_is_variance_and_a_line_has_no_nonlinear_share():
    x = torch.linspace(-2, 2, 33).expand(3, -1)
    y = torch.stack([3 * x[0] + 1, x[1].square(), x[2] + x[2].square()])
    variance, left = importance_of(x, y)
    torch.testing.assert_close(variance, y.var(-1, correction=0))
    assert left[0] < 1e-5 * variance[0]
    assert left[1] == pytest.approx(variance[1].item(), rel=1e-4)
    assert left[2] == pytest.approx(variance[1].item(), rel=1e-4)


def test_quantiles_stand_for_the_inputs():
    rows = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0])
    found = middle_quantiles(rows)
    assert found.shape == (33, 2)
    torch.testing.assert_close(found.std(0), rows.std(0), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("ffn_type", "per_layer"),
    [("kan", 2), ("kan_mixed", 1), ("kan_glu", 1), ("kan_grouped", 2)],
)
def test_every_kan_arm_yields_curves_and_a_row_for_each_layer(ffn_type, per_layer):
    network = model(ffn_type)
    found = learned_functions(network, Letters(), TEXT, per_module=2)
    assert len(found["layers"]) == 2 * per_layer and len(found["curves"]) == 4 * per_layer
    for row in found["layers"]:
        assert 0 < row["share_for_90_percent"] <= 1 and 0 <= row["nonlinear_share"] <= 1
        assert row["importance"] > 0 and 0 <= row["outside_grid"] <= 1
    for curve in found["curves"]:
        assert len(curve["x"]) == len(curve["y"]) == len(curve["density"]) == 61
        assert max(curve["density"]) == 1 and np.isfinite(curve["y"]).all() and np.std(curve["y"]) > 0
    assert "gated" not in vars(next(iter(kan_layers(network).values())))
    assert f"| {found['layers'][0]['module']} |" in layer_table(found["layers"])


def test_an_mlp_has_no_learned_functions():
    assert learned_functions(model("swiglu"), Letters(), TEXT) == {"caption": "", "curves": [], "layers": []}


def test_drawn_channel_function_is_the_layers_own():
    network = model("kan_glu")
    found = learned_functions(network, Letters(), TEXT, per_module=4)
    layer = next(iter(kan_layers(network).values()))
    for curve in found["curves"][:4]:
        group = int(curve["label"].split()[-1])
        x = torch.tensor(curve["x"]).unsqueeze(1).expand(-1, layer.channels)
        y = layer(x)[:, group * (layer.channels // layer.groups)]
        np.testing.assert_allclose(curve["y"], y.detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(curve["start"], F.silu(x[:, 0]).numpy(), atol=1e-4)


def test_inputs_are_those_of_the_forward_pass():
    network = model("kan_glu")
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    seen = []
    block = network.model.layers[0].mlp
    handle = block.gate_proj.register_forward_hook(lambda _, __, output: seen.append(output))
    found = layer_inputs(network, ids)
    handle.remove()
    name = next(iter(found))
    torch.testing.assert_close(found[name], seen[0].reshape(-1, block.phi.channels))


def test_panels_cover_all_layers_before_second_choices():
    curves = [{"module": f"layer {layer}", "rank": rank} for layer in range(5) for rank in range(3)]
    chosen = spread(curves, 7)
    assert [curve["rank"] for curve in chosen].count(0) == 5 and len(chosen) == 7
    few = spread(curves, 3)
    assert [(curve["module"], curve["rank"]) for curve in few] == [
        ("layer 0", 0),
        ("layer 2", 0),
        ("layer 4", 0),
    ]


def test_picture_is_one_svg_with_readable_text():
    found = learned_functions(model("kan"), Letters(), TEXT, per_module=1)
    svg = learned_functions_svg(found["curves"], "#c2410c", "functions")
    assert svg.startswith("<svg") and svg.count("<svg") == 1
    assert found["curves"][0]["label"] in svg
