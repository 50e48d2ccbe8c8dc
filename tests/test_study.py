"""The study's report follows from the committed trials alone; a ladder takes the better of several rates."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUDY = Path("docs/results/study")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import study_report

    return study_report


def rungs(report, monkeypatch, valid_of):
    """The trials that a ladder takes of phases whose validation losses are `valid_of`, by seed."""
    trials = {
        name: [{"arm": "gelu", "seed": seed, "rate": name} for seed in losses]
        for name, losses in valid_of.items()
    }
    monkeypatch.setattr(report, "trials_of", lambda names: trials[names[0]])
    monkeypatch.setattr(report, "key_of", lambda trial: f"{trial['rate']} {trial['seed']}")
    # Test losses in the opposite order: a choice that looked at them would be seen.
    rows = {
        f"{name} {seed}": {"arm": "gelu", "seed": seed, "rate": name, "valid": loss, "test": 9 - loss}
        for name, losses in valid_of.items()
        for seed, loss in losses.items()
        if loss is not None
    }
    found = report.best_trials([{"name": name} for name in valid_of], "mlp", rows)
    assert not report.best_trials([{"name": name} for name in valid_of], "kan", rows)
    return {seed: row["rate"] for seed, row in found.items()}


def test_a_ladder_takes_the_rate_that_validation_text_prefers(report, monkeypatch):
    losses = {"full": {0: 3.0, 1: 3.2}, "half": {0: 3.1, 1: 3.0}}
    assert rungs(report, monkeypatch, losses) == {0: "half", 1: "half"}


def test_a_rate_with_fewer_seeds_waits(report, monkeypatch):
    losses = {"full": {0: 3.0, 1: 3.2}, "half": {0: 2.5, 1: None}}
    assert rungs(report, monkeypatch, losses) == {0: "full", 1: "full"}


def test_laws_that_cross_beyond_the_sizes_are_said(report):
    law = report.ScalingFit(2.0, 1e5, 0.5, 0.0, 4)
    lower_floor = report.ScalingFit(1.9, 2e5, 0.5, 0.0, 4)  # 2 + (1e5 / N)^0.5 = 1.9 + (2e5 / N)^0.5
    expected = 1e5 * ((2**0.5 - 1) / 0.1) ** 2
    assert report.crosses(law, lower_floor, 1e6) == pytest.approx(expected, rel=0.01)
    assert report.crosses(law, lower_floor, 1e7) is None  # behind at the largest size already
    assert report.crosses(law, report.ScalingFit(2.1, 1e5, 0.5, 0.0, 4), 1e6) is None


@pytest.mark.slow
def test_the_committed_report_is_what_the_committed_trials_give(tmp_path):
    for path in ("configs/study.toml", *(STUDY / n for n in ("trials.jsonl", "baselines.json"))):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    subprocess.run(
        [sys.executable, ROOT / "scripts/study.py", "report"], cwd=tmp_path, check=True, capture_output=True
    )
    for name in ("report.md", "report.json", "differences.svg", "ladder.svg"):
        assert (tmp_path / STUDY / name).read_text() == (ROOT / STUDY / name).read_text(), name
