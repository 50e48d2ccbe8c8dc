"""The study's report follows from the committed trials alone; a ladder takes the better of several rates."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.basis import INITIAL_FUNCTIONS
from kanlm.model.ffn import ARMS

ROOT = Path(__file__).parents[1]
STUDY = Path("docs/results/study")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The study's scripts can be imported; what they register is gone after a test."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    registers = [(register, dict(register)) for register in (ARMS, INITIAL_FUNCTIONS)]
    yield
    for register, before in registers:
        register.clear()
        register.update(before)
    for name in [name for name in sys.modules if name.startswith("study_")]:
        del sys.modules[name]


@pytest.fixture
def ladders(scripts):
    import study_ladders

    return study_ladders


def rungs(ladders, monkeypatch, valid_of):
    """The trials that a ladder takes of phases whose validation losses are `valid_of`, by seed."""
    trials = {
        name: [{"arm": "gelu", "seed": seed, "rate": name} for seed in losses]
        for name, losses in valid_of.items()
    }
    monkeypatch.setattr(ladders, "trials_of", lambda names: trials[names[0]])
    monkeypatch.setattr(ladders, "key_of", lambda trial: f"{trial['rate']} {trial['seed']}")
    # Test losses in the opposite order: a choice that looked at them would be seen.
    rows = {
        f"{name} {seed}": {"arm": "gelu", "seed": seed, "rate": name, "valid": loss, "test": 9 - loss}
        for name, losses in valid_of.items()
        for seed, loss in losses.items()
        if loss is not None
    }
    found = ladders.best_trials([{"name": name} for name in valid_of], "mlp", rows)
    assert not ladders.best_trials([{"name": name} for name in valid_of], "kan", rows)
    return {seed: row["rate"] for seed, row in found.items()}


def test_a_ladder_takes_the_rate_that_validation_text_prefers(ladders, monkeypatch):
    losses = {"full": {0: 3.0, 1: 3.2}, "half": {0: 3.1, 1: 3.0}}
    assert rungs(ladders, monkeypatch, losses) == {0: "half", 1: "half"}


def test_a_rate_with_fewer_seeds_waits(ladders, monkeypatch):
    losses = {"full": {0: 3.0, 1: 3.2}, "half": {0: 2.5, 1: None}}
    assert rungs(ladders, monkeypatch, losses) == {0: "full", 1: "full"}


def test_laws_that_cross_beyond_the_sizes_are_said(ladders):
    law = ladders.ScalingFit(2.0, 1e5, 0.5, 0.0, 4)
    lower_floor = ladders.ScalingFit(1.9, 2e5, 0.5, 0.0, 4)  # 2 + (1e5 / N)^0.5 = 1.9 + (2e5 / N)^0.5
    expected = 1e5 * ((2**0.5 - 1) / 0.1) ** 2
    assert ladders.crosses(law, lower_floor, 1e6) == pytest.approx(expected, rel=0.01)
    assert ladders.crosses(law, lower_floor, 1e7) is None  # behind at the largest size already
    assert ladders.crosses(law, ladders.ScalingFit(2.1, 1e5, 0.5, 0.0, 4), 1e6) is None


@pytest.mark.slow
def test_the_committed_report_is_what_the_committed_trials_give(tmp_path):
    for path in ("configs/study.toml", *(STUDY / n for n in ("trials.jsonl", "baselines.json"))):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    subprocess.run(
        [sys.executable, ROOT / "scripts/study.py", "report"], cwd=tmp_path, check=True, capture_output=True
    )
    for name in ("report.md", "report.json", "differences.svg", "ladder.svg", "ladder-2.svg"):
        assert (tmp_path / STUDY / name).read_text() == (ROOT / STUDY / name).read_text(), name


@pytest.fixture
def ideas(scripts):
    import study_ideas

    return study_ideas


@pytest.mark.parametrize(
    ("idea", "twin"), [("study_bivariate", "kan_product"), ("study_token_gated", "kan_act")]
)
def test_an_idea_starts_as_its_twin(ideas, idea, twin):
    """With the zero at its start; away from there the second term shows."""
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"intermediate_size": 32, "kan_num_groups": 4, "hidden_norm": True}
    models = {}
    for name in (idea, twin):
        torch.manual_seed(0)
        models[name] = KanLMForCausalLM(KanLMConfig(ffn_type=name, **settings)).eval()
    models[twin].load_state_dict(
        {k: v for k, v in models[idea].state_dict().items() if k in models[twin].state_dict()}
    )
    ids = torch.arange(24)[None]
    torch.testing.assert_close(models[idea](ids).logits, models[twin](ids).logits, rtol=0, atol=1e-5)
    mlp = models[idea].model.layers[0].mlp
    second = mlp.phi_2 if idea == "study_bivariate" else mlp.psi
    with torch.no_grad():
        second.coefficients.add_(1.0)
    assert not torch.allclose(models[idea](ids).logits, models[twin](ids).logits, rtol=0, atol=1e-3)


def test_smoothing_goes_down_the_curvature(ideas):
    torch.manual_seed(0)
    c = torch.nn.Parameter(torch.randn(3, 9, dtype=torch.float64))
    other = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    groups = [{"params": [c], "name": "kan", "lr": 0.5}, {"params": [other], "name": "vectors", "lr": 0.5}]
    (0.5 * c.diff(n=2, dim=-1).square().sum()).backward()
    expected, unchanged = c.detach() - 0.5 * 2.0 * c.grad, other.detach().clone()
    ideas.smoothed(torch.optim.SGD(groups), 2.0)
    torch.testing.assert_close(c.detach(), expected)
    torch.testing.assert_close(other.detach(), unchanged, rtol=0, atol=0)
