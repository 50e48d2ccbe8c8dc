"""Running a comparison: what is skipped, retried, refused and passed on; training is a stand-in."""

import json
import subprocess
import sys

import numpy as np
import pytest
import synthetic

from kanlm.compare import jobs
from kanlm.compare.artifacts import state_of
from kanlm.compare.jobs import Processes, launch_command, train_trial
from kanlm.compare.plan import Study
from kanlm.compare.sweep import run_sweep
from kanlm.config import UserError, load_run_config
from kanlm.runs import read_json, write_json

RECORD = (
    "import json, sys, pathlib; root = pathlib.Path(sys.argv[1]); root.mkdir(parents=True, exist_ok=True)\n"
)


@pytest.fixture
def study(tmp_path):
    """A comparison in `tmp_path`, nothing trained."""
    config = synthetic.config(output_dir=str(tmp_path), seeds=[0])
    arms = [
        synthetic.planned(config, "parameters", "base", arm.name, number)
        for number, arm in enumerate(config.arms)
    ]
    return Study(config, 512, arms)


@pytest.fixture
def trial(study):
    return synthetic.trial(study.config, study.arms[0], 0)


def stand_in(monkeypatch, study, trial, code: str) -> list[str]:
    """Training runs `code` with the run's folder as argument; the config files that it was given."""
    given = []

    def command(_launch, path, _jobs):
        given.append(str(path))
        return [sys.executable, "-c", RECORD + code, str(study.directory.run(trial.name).root)]

    monkeypatch.setattr(jobs, "launch_command", command)
    return given


def record(state: str, **more) -> str:
    values = synthetic.run_record(state, 3.9, 1_000_000, **more)
    return f"(root / 'run.json').write_text({json.dumps(json.dumps(values))})\n"


def trained(study, trial) -> bool:
    with Processes() as processes:
        return train_trial(study, processes, trial, "final 1/1")


DIVERGED = {"failure": "Diverged: loss not finite", "failure_kind": "diverged"}


def test_a_finished_trial_is_not_trained_again(study, trial, monkeypatch):
    given = stand_in(monkeypatch, study, trial, record("finished") + "print('step 1 of 1')")
    assert trained(study, trial) and trained(study, trial)
    assert len(given) == 1
    assert "step 1 of 1" in study.directory.run(trial.name).log.read_text()


def test_the_training_process_reads_the_resolved_configuration(study, trial):
    path = study.directory.config(trial.name)
    write_json(path, trial.run)
    run = load_run_config(path)
    assert run == trial.run and run.run_dir == study.directory.run(trial.name).root
    assert run.model["intermediate_size"] == study.arms[0].intermediate_size
    command = launch_command((), path)
    assert command[1:3] == ["-m", "accelerate.commands.launch"] and command[-4:-1] == ["-m", "kanlm", "train"]
    assert launch_command(("--config_file", "x.yaml"), path)[3:5] == ["--config_file", "x.yaml"]


def test_a_crash_is_recorded_shown_and_tried_again(study, trial, monkeypatch):
    code = record("running") + "print('step 3'); raise SystemExit('out of memory')"
    given = stand_in(monkeypatch, study, trial, code)
    assert not trained(study, trial)
    run = study.directory.run(trial.name)
    assert read_json(run.failure)["message"] == "out of memory"
    assert state_of(run) == ("crashed", "exit status 1: out of memory")
    stand_in(monkeypatch, study, trial, record("finished"))
    assert trained(study, trial)
    assert state_of(run) == ("finished", "") and len(given) == 1


def test_a_diverged_run_is_a_result_and_not_tried_again(study, trial, monkeypatch):
    code = record("failed", **DIVERGED) + "raise SystemExit(1)"
    given = stand_in(monkeypatch, study, trial, code)
    assert not trained(study, trial) and not trained(study, trial)
    assert len(given) == 1
    assert state_of(study.directory.run(trial.name)) == ("diverged", "Diverged: loss not finite")


def test_a_users_mistake_in_training_ends_the_comparison(study, trial, monkeypatch):
    """By the record's typed field; of a run that has not begun, by there being no record."""
    mistake = {"failure": "data.source: none", "failure_kind": "user_error"}
    stand_in(monkeypatch, study, trial, record("failed", **mistake) + "sys.exit(1)")
    with pytest.raises(UserError, match=f"{trial.name}: data.source: none"):
        trained(study, trial)
    (study.directory.run(trial.name).record).unlink()
    code = "print('kanlm: error: x: y'); print('Traceback (most recent call last)\\n  z'); sys.exit(1)"
    stand_in(monkeypatch, study, trial, code)
    with pytest.raises(UserError, match="training did not begin: kanlm: error: x: y "):
        trained(study, trial)


def test_a_run_of_another_configuration_is_refused_and_the_key_named(study, trial):
    write_json(study.directory.run(trial.name).config, trial.run)
    study.refuse_changed([trial])
    train = trial.run.train.model_copy(update={"max_tokens": 800_000})
    longer = trial.model_copy(update={"run": trial.run.model_copy(update={"train": train})})
    with pytest.raises(UserError, match="train.max_tokens: 400000, now 800000; choose another name"):
        study.refuse_changed([longer])


def test_a_process_left_by_a_killed_comparison_is_waited_for(study, trial, monkeypatch, capsys):
    run = study.directory.run(trial.name)
    write_json(run.record, synthetic.run_record("running", 3.9, 1_000_000))
    left = (
        "import fcntl, json, pathlib, sys, time; root = pathlib.Path(sys.argv[1])\n"
        "lock = open(root / '.lock', 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1.5)\n" + record("finished")
    )
    process = subprocess.Popen([sys.executable, "-c", left, str(run.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    given = stand_in(monkeypatch, study, trial, "raise SystemExit('trained twice')")
    assert trained(study, trial) and not given
    assert "waiting for it" in capsys.readouterr().out and process.wait() == 0


def test_an_interrupted_run_ends_the_comparison_and_is_resumed(study, trial, monkeypatch):
    stand_in(monkeypatch, study, trial, record("interrupted"))
    with pytest.raises(UserError, match="run the same command again"):
        trained(study, trial)
    stand_in(monkeypatch, study, trial, record("finished"))
    assert trained(study, trial)


def swept(tmp_path, loss_of, **sweep) -> dict[str, dict]:
    """Rows of a sweep whose trials end with `loss_of(arm, learning rate, coefficients' rate)`."""
    config = synthetic.config(output_dir=str(tmp_path), sweep={"learning_rates": [1e-3, 2e-3, 4e-3], **sweep})
    arms = [synthetic.planned(config, "parameters", "base", arm.name, 0) for arm in config.arms]
    study = Study(config, 512, arms)

    def train(trials):
        for trial in trials:
            loss = loss_of(trial.arm, trial.learning_rate, trial.run.train.kan_learning_rate)
            failed = {} if loss else DIVERGED
            values = synthetic.run_record("finished" if loss else "failed", loss or 9.0, 1, **failed)
            write_json(study.directory.run(trial.name).record, values)

    return {row["arm"]: row for row in run_sweep(study, train)}


def test_every_arm_has_the_same_number_of_trials_and_no_optimum_on_an_edge(tmp_path):
    best = {"kan": (2e-3, 5e-4), "kan_glu": (8.1e-3, 2e-3), "swiglu": (6e-4, None)}

    def loss_of(arm, rate, kan_rate):
        own = abs(np.log(rate / best[arm][0]))
        return 3 + 0.1 * own + (0.1 * abs(np.log(kan_rate / best[arm][1])) if kan_rate else 0.2)

    rows = swept(tmp_path, loss_of, kan_learning_rates=[1e-3, 2e-3])
    assert len({len(row["trials"]) for row in rows.values()}) == 1
    assert not any(row["on_edge"] for row in rows.values())
    assert rows["kan"]["learning_rate"] == 2e-3 and rows["kan"]["kan_learning_rate"] == 5e-4
    assert rows["kan_glu"]["learning_rate"] == 8e-3 and rows["kan_glu"]["kan_learning_rate"] == 2e-3
    assert rows["swiglu"]["learning_rate"] == pytest.approx(6e-4, rel=0.35)
    assert {trial["kan_learning_rate"] for trial in rows["swiglu"]["trials"]} == {None}


def test_a_sweep_that_cannot_leave_its_edge_says_so(tmp_path):
    rows = swept(tmp_path, lambda _arm, rate, _kan: 3 - rate, extend=1)
    assert {row["learning_rate"] for row in rows.values()} == {8e-3}
    assert all(row["on_edge"] == ["learning_rate"] for row in rows.values())


def test_a_rate_that_diverges_is_the_edge_of_the_others(tmp_path):
    rows = swept(tmp_path, lambda _arm, rate, _kan: 3 - rate if rate < 3e-3 else None)
    assert {row["learning_rate"] for row in rows.values()} == {2e-3} and not rows["kan"]["on_edge"]
    assert {"finished", "diverged"} == {trial["state"] for trial in rows["kan"]["trials"]}


def test_a_sweep_with_no_finished_trial_is_an_error_that_names_the_arm(tmp_path):
    with pytest.raises(UserError, match="sweep: no learning rate of arm swiglu finished"):
        swept(tmp_path, lambda arm, _rate, _kan: None if arm == "swiglu" else 3.0)


def test_a_prompt_longer_than_the_model_is_cut_and_shown_cut():
    from transformers import GenerationConfig

    from kanlm.compare.heldout import samples
    from kanlm.compare.schema import EvaluationConfig
    from kanlm.data.tokenizer import trained_tokenizer
    from kanlm.model import KanLMConfig, KanLMForCausalLM

    text = "the old harbour was quiet and the boats lay still in the rain " * 4
    tokenizer = trained_tokenizer(iter([text] * 50), 280)
    config = KanLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = KanLMForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=None)
    settings = EvaluationConfig(prompts=(text, "the"), sample_tokens=6)
    long, short = samples(model, tokenizer, [text], settings, seed=0)
    assert text.startswith(long["prompt"]) and 0 < len(long["prompt"]) < len(text)
    assert short["prompt"] == "the" and long["text"]
    assert samples(model, tokenizer, [text], settings, seed=0) == [long, short]
