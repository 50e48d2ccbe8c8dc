"""A whole comparison on a small corpus: trained (in process), exported, judged, reported, resumed."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from kanlm.compare import jobs
from kanlm.compare.artifacts import load_curve
from kanlm.compare.comparison import compare
from kanlm.config import load_run_config
from kanlm.data import documents, tokenizer_for
from kanlm.train.loop import train

TOML = """
name = "study"
reference = "kan"
output_dir = "runs"
seeds = [0, 1]
matching = ["parameters", "wallclock"]

[base.model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 12

[base.tokenizer]
vocab_size = 300

[base.data]
source = "stories"
max_documents = 150
validation_fraction = 0.1
block_size = 32
num_workers = 1

[base.train]
max_tokens = 768
batch_size = 4
learning_rate = 1e-2
log_every = 1
eval_every = 2
eval_tokens = 256

[[arms]]
name = "kan"
ffn_type = "kan"
[arms.model]
kan_grid_size = 3

[[arms]]
name = "swiglu"
ffn_type = "swiglu"

[sweep]
learning_rates = [1e-2, 2e-2]
max_tokens = 256
extend = 0

[evaluation]
sample_tokens = 8
functions_per_module = 1

[speed]
rounds = 2
warmup = 1
"""


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """(folder, report.json, names of the trained runs) of one comparison that was interrupted once."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "study.toml").write_text(TOML)
    trained = []

    def in_process(_processes, command, log):
        path = Path(command[-1])
        trained.append(path.stem)
        log.parent.mkdir(parents=True, exist_ok=True)
        if len(trained) == 6:
            raise KeyboardInterrupt
        train(load_run_config(path))
        return 0, []

    with pytest.MonkeyPatch.context() as patch, open(folder / "said.txt", "w") as said:
        patch.setattr("sys.stdout", said)
        patch.chdir(folder)
        patch.setattr(jobs.Processes, "run", in_process)
        with pytest.raises(KeyboardInterrupt):
            compare("study.toml")
        assert not (folder / "runs/study/report.json").exists()
        assert compare("study.toml") == Path("runs/study/report.html")
        content = json.loads(Path("runs/study/report.json").read_text())
        before = list(trained)
        compare("study.toml")
        assert trained == before, "a second call trains nothing"
    return folder, content, trained


def test_a_finished_run_is_judged_and_shown_before_the_next_begins(studied):
    folder, content, trained = studied
    said = (folder / "said.txt").read_text()
    lines = re.findall(r"^(?:final \d+/\d+: \S+|  \w+ seed \d+: \d\.\d{4} bits per byte)", said, re.M)
    judged = [place for place, line in enumerate(lines) if line.startswith("  ")]
    assert len(judged) == len({name for name in trained if not name.startswith("sweep")})
    for place in judged:
        arm, seed = re.findall(r"(\w+) seed (\d+)", lines[place])[0]
        assert lines[place - 1].rstrip(",").endswith(f"-{arm}-seed{seed}")


def trials_of(content) -> list[str]:
    return [
        f"sweep-base-{row['arm']}-lr{trial['learning_rate']:g}"
        for row in content["sweep"]
        for trial in row["trials"]
    ]


def test_every_trial_is_trained_once_and_the_interrupted_one_again(studied):
    _, content, trained = studied
    sweep = {name for name in trained if name.startswith("sweep-")}
    assert sweep == {trial for trial in trials_of(content)}
    finals = {run["name"] for run in content["runs"]}
    assert len(set(trained)) == len(trained) - 1 == len(finals) + len(sweep)
    assert {run["state"] for run in content["runs"]} == {"finished"}


def test_arms_are_matched_and_judged_on_their_exported_folders(studied):
    folder, content, _ = studied
    parameters = {run["eval"]["non_embedding_parameters"] for run in content["runs"]}
    assert max(parameters) / min(parameters) < 1.005
    for run in content["runs"]:
        judged = run["eval"]
        assert judged["perplexity"] == pytest.approx(math.exp(judged["loss"]), rel=1e-6)
        exported = folder / judged["model"]
        assert (exported / "modeling_kanlm.py").is_file() and (exported / "model.safetensors").is_file()
        assert run["record"]["non_embedding_parameters"] == judged["non_embedding_parameters"]
        assert f"| stories (held out) | {judged['tokens']:,} |" in (exported / "README.md").read_text()


def test_every_held_out_token_is_scored(studied, monkeypatch):
    folder, content, _ = studied
    monkeypatch.chdir(folder)
    config = load_run_config(folder / "runs/study/configs/parameters-base-kan-seed0.json")
    tokenizer = tokenizer_for(config)
    texts = list(documents(config.data, "validation"))
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert {(run["eval"]["tokens"], run["eval"]["bytes"]) for run in content["runs"]} == {(tokens, size)}
    held_out = content["data"]["validation"]
    assert (held_out["text_tokens"], held_out["bytes"]) == (tokens, size)


def test_points_of_a_validation_curve_are_of_one_text(studied):
    folder, _, _ = studied
    run = folder / "runs/study/arms/parameters-base-kan-seed0"
    curve = load_curve((run / "metrics.jsonl").read_text())
    assert curve.validation_tokens == [256, 512, 768]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "validation_tokens" in row]
    assert [row["validation_tokens"] for row in judged] == [256] * 3
    assert json.loads((run / "run.json").read_text())["final_validation"]["tokens"] > 256
    assert curve.validation_loss == [row["validation_loss"] for row in judged]


def test_wall_clock_budgets_follow_the_measured_speed(studied):
    _, content, _ = studied
    seconds = {row["arm"]: np.array(row["step_seconds"]) for row in content["speed"]["arms"]}
    budgets = {run["arm"]: run["max_tokens"] for run in content["runs"] if run["matching"] == "wallclock"}
    assert budgets == {"kan": 768, "swiglu": round(768 * np.median(seconds["kan"] / seconds["swiglu"]))}


def test_the_sweep_decides_the_learning_rate_of_every_seed(studied):
    _, content, _ = studied
    for row in content["sweep"]:
        best = min(row["trials"], key=lambda trial: trial["loss"])
        assert row["learning_rate"] == best["learning_rate"]
        rates = {run["learning_rate"] for run in content["runs"] if run["arm"] == row["arm"]}
        assert rates == {row["learning_rate"]}


def test_the_report_shows_functions_samples_and_baselines(studied):
    folder, content, _ = studied
    grams, xz = content["baselines"]
    assert re.fullmatch(r"[3-8]-gram", grams["name"]) and xz["name"] == "xz -9"
    assert grams["bits_per_byte"] == min(grams["orders"].values()) and len(grams["orders"]) == 6
    assert all(len(run["samples"]) == 2 and run["samples"][0]["prompt"] for run in content["runs"])
    page = (folder / "runs/study/report.html").read_text()
    assert "What the KANs learned" in page and "layer 0 up_proj" in page


def test_one_seed_gives_one_result(studied, monkeypatch):
    folder, content, _ = studied
    monkeypatch.chdir(folder)
    config = load_run_config("runs/study/configs/parameters-base-kan-seed0.json", ["name=again"])
    again = train(config)
    shutil.rmtree(config.run_dir)
    first = next(run for run in content["runs"] if run["name"] == "parameters-base-kan-seed0")
    assert again.final_validation == first["record"]["final_validation"]
