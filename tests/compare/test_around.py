"""What is around a comparison: its status, the dry run, two of them side by side, its verbs."""

import json
import re

import pytest
import synthetic
from click.testing import CliRunner
from test_report import ARMS, losses

from kanlm.cli import cli
from kanlm.compare import estimate
from kanlm.compare.artifacts import CompareDir, load
from kanlm.compare.heldout import split_of
from kanlm.compare.report import report, report_content
from kanlm.compare.status import status
from kanlm.config import SourceConfig, UserError, parse_table
from kanlm.runs import write_json


def run(*arguments) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_status_tells_what_is_done_what_failed_and_what_is_judged(tmp_path):
    values = losses(seeds=(0, 1), kan=3.8, swiglu=3.9) | {("kan", 1): "diverged"}
    synthetic.write(tmp_path, values, seeds=[0, 1], arms=ARMS)
    running = CompareDir(tmp_path).run("parameters-base-swiglu-seed1")
    running.heldout.unlink()
    write_json(running.record, synthetic.run_record("interrupted", 3.9, 1) | {"step": 100})
    text = run("status", tmp_path)
    assert "2 of 4 runs finished" in text
    assert re.search(r"diverged parameters-base-kan-seed1: .*not finite", text)
    assert "interrupted parameters-base-swiglu-seed1" in text
    assert re.search(r"judged   swiglu: \d\.\d{4} bits per byte over 1 seed \(equal parameters", text)


def test_status_of_a_comparison_that_has_trained_nothing_is_one_line(tmp_path):
    write_json(tmp_path / "compare.json", {})
    with pytest.raises(UserError, match="nothing is trained yet"):
        status(tmp_path)


def test_two_comparisons_stand_side_by_side(tmp_path):
    for name, kan in (("a", 3.8), ("b", 3.7)):
        values = losses(kan=kan, swiglu=3.9)
        synthetic.write(tmp_path / name, values, seeds=[0, 1, 2, 3, 4], arms=ARMS, name=name)
        report(tmp_path / name)
    text = run("report", tmp_path / "a", tmp_path / "b")
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    bits = [found["tables"][0]["rows"][0]["bits_per_byte"] for found in (first, second)]
    assert f"| kan, parameters | {bits[0]:.4f} | {bits[1]:.4f} | {bits[1] - bits[0]:+.4f} |" in text
    assert "- name: a, now b" in text and first["verdict"]["sentence"] in text
    with pytest.raises(UserError, match="kanlm report .* writes it"):
        run("report", tmp_path / "a", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("data_sha256", "00" * 32, "one test text"),
        ("tokens", 170_000, "one tokenizer of the test text"),
        ("stride", 64, "equal context and stride"),
    ],
)
def test_arms_that_were_judged_unequally_get_no_verdict_and_the_rule_is_named(tmp_path, key, value, rule):
    synthetic.write(tmp_path, losses(kan=3.8, swiglu=3.9), seeds=[0, 1, 2, 3, 4], arms=ARMS)
    for path in tmp_path.glob("arms/*-kan-*/eval/heldout.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    found = report_content(load(tmp_path))["verdict"]
    assert found["judgements"][0]["outcome"] == "no result"
    assert found["sentence"] == f"No verdict: the rule of {rule} is broken (kan and swiglu differ)."


def test_arms_that_were_trained_unequally_get_no_verdict(tmp_path):
    synthetic.write(tmp_path, losses(kan=3.8, swiglu=3.9), seeds=[0, 1, 2, 3, 4], arms=ARMS)
    for path in tmp_path.glob("arms/*-kan-*/run.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 500_000}))
    assert "equal training tokens is broken" in report_content(load(tmp_path))["verdict"]["sentence"]


TOML = """
name = "study"
reference = "kan"
seeds = [0, 1, 2]
[base.model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 12
[base.tokenizer]
vocab_size = 300
[base.data]
source = "stories"
max_documents = 60
validation_fraction = 0.1
block_size = 32
[base.train]
max_tokens = 1e6
batch_size = 4
[[arms]]
name = "kan"
ffn_type = "kan"
[[arms]]
name = "swiglu"
ffn_type = "swiglu"
[speed]
rounds = 0
"""


def test_the_dry_run_plans_and_trains_nothing(tmp_path, monkeypatch):
    """The startup of processes is a stand-in; steps and forward passes are timed as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "startup_seconds", lambda: 60.0)
    (tmp_path / "study.toml").write_text(TOML)
    text = run("compare", "study.toml", "--dry-run", "sweep.learning_rates=[1e-3, 2e-3]")
    assert "6 to be reported, 4 of the sweep at least" in text and "10,000,000 in all" in text
    minutes = re.search(r"about ([\d.]+) (minutes|hours)", text)
    assert float(minutes[1]) * (60 if minutes[2] == "hours" else 1) > 10, "ten processes start"
    assert "0.033 nats/token between two arms with 3 paired seeds" in text
    assert not (tmp_path / "runs/study").exists()
    assert "one seed gives no verdict" in run("compare", "study.toml", "--dry-run", "seeds=[0]")


@pytest.mark.parametrize(
    "name, damage, told",
    [
        ("plan.json", lambda text: text[:-9], "damaged, not JSON"),
        (
            "baselines.json",
            lambda text: text.replace("bits_per", "bits_pes", 1),
            "0.bits_per_byte: Field required",
        ),
        ("arms/parameters-base-kan-seed0/run.json", lambda text: text[:-9], "damaged, not JSON"),
        (
            "arms/parameters-base-kan-seed0/functions.json",
            lambda text: text.replace("layers", "lay%rs"),
            "layers: Field required",
        ),
        (
            "arms/parameters-base-kan-seed0/samples.json",
            lambda text: text.replace("class", "cla\udcff", 1),
            "damaged, not UTF-8",
        ),
    ],
)
def test_damaged_file_of_a_comparison_is_named(tmp_path, name, damage, told):
    synthetic.write(tmp_path, losses(seeds=(0,), kan=3.8, swiglu=3.9), seeds=[0], arms=ARMS)
    path = tmp_path / name
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: damaged") as refused:
        load(tmp_path)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_test_text_from_a_file_is_not_labelled_train(tmp_path):
    (tmp_path / "test.txt").write_text("text")
    file = parse_table(SourceConfig, {"source": str(tmp_path / "test.txt")}, "test")
    hub = parse_table(SourceConfig, {"source": "owner/data", "split": "test"}, "test")
    assert (split_of(file), split_of(hub)) == ("all", "test")
