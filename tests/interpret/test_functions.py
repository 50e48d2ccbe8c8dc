"""Learned functions as numbers: read from the layer's formula, checked against the layer as a black box."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from kanlm.interpret.functions import learned_functions, token_batch
from kanlm.interpret.layers import (
    function_layers,
    function_values,
    kan_layers,
    record_layers,
    with_random_weights,
    without_learned_part,
)
from kanlm.interpret.pictures import learned_functions_svg, spread
from kanlm.model.kan import KANLinear, LearnedFunction


@pytest.mark.parametrize("conditioning", ["none", "whitened"])
@pytest.mark.parametrize("base", ["silu", None])
def test_edge_values_add_up_to_the_layers_output(conditioning, base):
    torch.manual_seed(0)
    layer = KANLinear(5, 3, "bspline", grid_size=4, spline_share=0.5, conditioning=conditioning, base=base)
    x = torch.randn(7, 5)
    values = function_values(layer, x)  # [I, P, O]
    assert values.shape == (5, 7, 3)
    torch.testing.assert_close(values.sum(0), layer(x), atol=1e-5, rtol=1e-5)
    moved = x.clone()
    moved[:, 2] += 0.5
    only = function_values(layer, moved)[2] - values[2]
    torch.testing.assert_close(layer(moved) - layer(x), only, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("basis", ["bspline", "rational", "chebyshev"])
def test_group_values_are_the_groups_functions(basis):
    layer = LearnedFunction(6, groups=3, basis=basis)
    with torch.no_grad():
        layer.coefficients.add_(torch.randn_like(layer.coefficients), alpha=0.1)
    points = torch.randn(5, 3)
    values = function_values(layer, points)  # [groups, P, 1]
    torch.testing.assert_close(
        values[:, :, 0].t().repeat_interleave(2, 1), layer(points.repeat_interleave(2, 1))
    )


@pytest.mark.parametrize(
    ("ffn_type", "per_layer"),
    [("kan", 2), ("kan_mixed", 1), ("kan_glu", 1), ("kan_grouped", 2)],
)
def test_every_kan_arm_yields_curves_and_a_row_for_each_layer(ffn_type, per_layer, model, letters, text):
    found = learned_functions(model(ffn_type), letters, text, per_module=2)
    assert len(found["layers"]) == 2 * per_layer and len(found["curves"]) == 4 * per_layer
    for row in found["layers"]:
        assert 0 < row["share_for_90_percent"] <= 1 and 0 <= row["nonlinear_share"] <= 1
        assert row["importance"] > 0 and 0 <= row["outside_grid"] <= 1
    for curve in found["curves"]:
        assert len(curve["x"]) == len(curve["y"]) == len(curve["density"]) == len(curve["start"]) == 61
        assert max(curve["density"]) == 1 and np.isfinite(curve["y"]).all() and np.std(curve["y"]) > 0


def test_an_mlp_has_no_learned_functions(model, letters, text):
    expected = {"caption": "", "curves": [], "layers": []}
    assert learned_functions(model("swiglu"), letters, text) == expected


def test_drawn_channel_function_is_the_layers_own(model, letters, text):
    network = model("kan_glu")
    found = learned_functions(network, letters, text, per_module=4)
    layer = next(iter(kan_layers(network).values()))
    for curve in found["curves"][:4]:
        group = int(curve["label"].split()[-1])
        x = torch.tensor(curve["x"]).unsqueeze(1).expand(-1, layer.channels)
        y = layer(x)[:, group * (layer.channels // layer.groups)]
        np.testing.assert_allclose(curve["y"], y.detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(curve["start"], F.silu(x[:, 0]).numpy(), atol=2e-2)


def test_recorded_inputs_and_gradients_are_those_of_the_forward_pass(model):
    network = model("kan_glu")
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    seen = []
    block = network.model.layers[0].mlp
    handles = [
        block.gate_proj.register_forward_hook(lambda _, __, output: seen.append(output)),
        block.up_proj.register_forward_hook(lambda _, __, output: seen.append(output)),
    ]
    first = record_layers(network, ids)[0]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(first.x, seen[0].reshape(-1, block.phi.channels))
    torch.testing.assert_close(first.factor, seen[1].reshape(-1, block.phi.channels))
    assert all(parameter.requires_grad for parameter in network.parameters())

    def loss():
        logits = network(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").double()

    with torch.no_grad():  # moving the block's product moves the loss as the gradient says
        step = torch.zeros_like(first.gradient)
        step[5] = 1e-2 * first.gradient[5] / first.gradient[5].norm()
        before = loss()
        handle = block.phi.register_forward_hook(lambda _, __, output: output + step.view_as(output))
        after = loss()
        handle.remove()
    assert (after - before).item() == pytest.approx(1e-2 * first.gradient[5].norm().item(), rel=0.05)


@pytest.mark.parametrize("ffn_type", ["gelu", "swiglu", "relu2", "xielu"])
def test_activations_of_mlps_are_functions_of_channels(ffn_type, model):
    network = model(ffn_type)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    before = network(input_ids=ids).logits
    assert len(function_layers(network)) == 2
    assert torch.equal(network(input_ids=ids).logits, before)
    assert [layer.kind for layer in record_layers(network, ids)] == ["channel", "channel"]


def test_a_norm_over_channels_is_no_function_of_a_channel(model):
    assert function_layers(model("polynorm")) == {}


def test_experts_are_refused(model):
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    experts = MixtralConfig(num_local_experts=2, num_attention_heads=2, num_key_value_heads=1, **sizes)
    assert function_layers(MixtralForCausalLM(experts)) == {}
    network = model("kan_glu")
    block = network.model.layers[0].mlp
    whole = block.forward
    block.forward = lambda x: F.pad(whole(x[:, :4]), (0, 0, 0, x.shape[1] - 4))
    with pytest.raises(ValueError, match="each token once; mixtures of experts"):
        record_layers(network, torch.zeros(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("ffn_type", ["kan", "kan_glu"])
def test_controls_are_fresh_weights_and_the_start_of_the_functions(ffn_type, model):
    network = model(ffn_type)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    removed, fresh = without_learned_part(network), with_random_weights(network, 1)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    for (name, before), after in zip(weights.items(), removed.state_dict().values(), strict=True):
        assert torch.equal(before, after) != name.endswith(("spline.weight", "coefficients")), name
    name = next(iter(kan_layers(network)))
    learned = fresh.get_submodule(name)
    start = removed.get_submodule(name)
    for parameter in ("spline.weight", "coefficients"):
        if hasattr(start, parameter.split(".")[0]):
            torch.testing.assert_close(learned.get_parameter(parameter), start.get_parameter(parameter))


def test_batches_have_rows_for_every_part(model, letters, text):
    batch = token_batch(model("kan_glu"), letters, text, count=300, rows=16)
    assert batch.shape == (16, 18)


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


def test_picture_is_one_svg_with_readable_text(model, letters, text):
    found = learned_functions(model("kan"), letters, text, per_module=1)
    svg = learned_functions_svg(found["curves"], "#c2410c", "functions")
    assert svg.startswith("<svg") and svg.count("<svg") == 1
    assert found["curves"][0]["label"] in svg
