"""Pruned models: exactly the old one without the channels that went, smaller and faster."""

import pytest
import torch
from click.testing import CliRunner

from kanlm import prune
from kanlm.cli import cli
from kanlm.config import UserError
from kanlm.interpret.pruning import blocks, channel_importance, kept_channels, prune_channels, without_edges

IDS = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
NORMED = {"kan", "kan_mixed"}
ARMS = ["kan", "kan_mixed", "kan_grouped", "kan_glu", "gelu", "swiglu", "relu2", "polynorm", "xielu"]


@pytest.mark.parametrize("ffn_type", ARMS)
def test_pruned_model_is_the_old_one_without_the_channels(ffn_type, model):
    network = model(ffn_type, kan_num_groups=2)
    small, kept = prune_channels(network, IDS, 0.5)
    assert small.config.intermediate_size == 6
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())
    for name, block in blocks(network).items():
        other = small.get_submodule(name)
        assert len(kept[name]) == 6
        hidden = torch.randn(3, 12)
        alone = torch.zeros(3, 12)
        alone[:, kept[name]] = hidden[:, kept[name]]
        rest = block.down_proj(alone) - block.down_proj(torch.zeros(3, 12))  # an edge's phi(0) may not be 0
        found = other.down_proj(hidden[:, kept[name]]) - other.down_proj(torch.zeros(3, 6))
        torch.testing.assert_close(found, rest, atol=1e-5, rtol=1e-4)
        u = torch.randn(3, 16)
        torch.testing.assert_close(other.up_proj(u), block.up_proj(u)[:, kept[name]])
    if ffn_type not in NORMED | {"polynorm"}:  # the norms are taken over the channels that are left
        gone = {name: sorted(set(range(12)) - set(places.tolist())) for name, places in kept.items()}
        with torch.no_grad():
            for name, block in blocks(network).items():
                block.down_proj.weight[:, gone[name]] = 0
        torch.testing.assert_close(small(IDS).logits, network(IDS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ffn_type", ["kan", "kan_glu", "swiglu"])
def test_keeping_all_changes_nothing(ffn_type, model):
    network = model(ffn_type)
    small, _ = prune_channels(network, IDS, 1.0)
    assert torch.equal(small(IDS).logits, network(IDS).logits)


@pytest.mark.parametrize("ffn_type", ["kan", "kan_mixed", "kan_grouped", "kan_glu", "swiglu"])
def test_channels_that_do_nothing_go_first(ffn_type, model):
    network = model(ffn_type, kan_num_groups=2)
    with torch.no_grad():
        for block in blocks(network).values():
            weights = [parameter for parameter in block.down_proj.parameters()]
            for weight in weights:
                weight.view(16, -1, 12)[:, :, [1, 4, 7, 10]] = 0
    scores = channel_importance(network, IDS)
    for name, score in scores.items():
        assert score[[1, 4, 7, 10]].max() == 0 < score[[0, 2, 3]].min()
        kept = prune_channels(network, IDS, 2 / 3)[1][name].tolist()
        assert kept == [0, 2, 3, 5, 6, 8, 9, 11]


def test_every_group_keeps_equally_many():
    scores = torch.arange(12.0)
    assert kept_channels(scores, 0.5, 1).tolist() == [6, 7, 8, 9, 10, 11]
    assert kept_channels(scores, 0.5, 3).tolist() == [2, 3, 6, 7, 10, 11]


def test_pruning_removes_computation(model):
    network = model("kan", hidden_size=128, intermediate_size=512, num_hidden_layers=1)
    small, _ = prune_channels(network, IDS, 0.4)
    ffn = [
        sum(p.numel() for p in block.parameters())
        for block in (*blocks(network).values(), *blocks(small).values())
    ]
    assert ffn[1] / ffn[0] == pytest.approx(0.4, abs=0.01)
    ids = torch.randint(64, (16, 64))
    before, after = prune.step_seconds([network, small], ids, rounds=4)
    assert after < 0.8 * before


def test_the_less_important_edges_are_set_to_zero(model):
    network = model("kan")
    twin = without_edges(network, IDS, 0.25)
    for name, block in blocks(twin).items():
        edges = block.up_proj.spline.weight.view(12, -1, 16).abs().sum(1) > 0
        assert edges.float().mean() == pytest.approx(0.25)
        assert torch.equal(block.up_proj.base.weight != 0, edges)
        assert (network.get_submodule(name).up_proj.base.weight != 0).all()
    with pytest.raises(ValueError, match="no edge functions"):
        without_edges(model("swiglu"), IDS, 0.5)


@pytest.mark.parametrize("keep", ["0", "-1", "1.5", "nan"])
def test_keep_lies_in_zero_to_one(keep, tmp_path):
    result = CliRunner().invoke(
        cli, ["prune", "x", "--keep", keep, "--data", "stories", "--out", str(tmp_path / "new")]
    )
    assert isinstance(result.exception, UserError) and "(0, 1]" in str(result.exception)


def test_single_channels_cannot_shrink(model):
    with pytest.raises(ValueError, match="kan_num_groups"):
        prune_channels(model("kan_glu", kan_num_groups=12), IDS, 0.5)


def test_table_has_every_share_by_importance_at_random_and_tuned(model, monkeypatch):
    network = model("kan_act", kan_num_groups=2)
    monkeypatch.setattr(prune, "load_causal_lm", lambda path: (network, "tokenizer"))
    monkeypatch.setattr(prune, "text_batch", lambda *_: torch.cat([IDS, IDS.flip(1)]))
    given = []

    def tune(small, tokenizer):
        given.append(small.config.intermediate_size)
        return network

    rows = prune.prune_table(["path"], "data", tune=tune)
    assert [row["keep"] for row in rows] == [1, *prune.KEPT]
    assert given == [12, 10, 10, 10, 10, 8, 8, 4, 4]  # whole once, then by importance and at random
    assert all(row["tuned"] == row["random_tuned"] == rows[0]["loss"] for row in rows)
    assert len({row["loss"] for row in rows}) == 4  # 0.9 and 0.8 of a group of six are both five
    sizes = [row["ffn_parameters"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 2 * (2 * 16 * 12 + 2 * 8)
    without = prune.prune_table(["path"], "data", seeds=(0,))
    assert "tuned" not in without[1] and without[1]["loss"] == rows[1]["loss"]
