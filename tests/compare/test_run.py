"""Running a comparison: what is skipped, retried, refused and passed on; training is a stand-in."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import synthetic

from kanlm.compare import run as running
from kanlm.compare.artifacts import CompareDir, state_of
from kanlm.compare.plan import final_trials, sweep_trials
from kanlm.compare.run import (
    check_same_trials,
    config_text,
    launch_command,
    run_process,
    sweep_choices,
    train_trial,
)
from kanlm.config import UserError, load_run_config
from kanlm.runs import write_json, write_text

RECORD = (
    "import json, sys, pathlib; root = pathlib.Path(sys.argv[1]); root.mkdir(parents=True, exist_ok=True)\n"
)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """(config, directory, planned arm, trial) of a comparison in `tmp_path`, nothing trained."""
    config = synthetic.config(output_dir=str(tmp_path), seeds=[0])
    directory = CompareDir(config.directory)
    arm = synthetic.planned(config, "parameters", "base", "kan", 0)
    trial = final_trials(config, {("base", a.name): 2e-3 for a in config.arms})[0]
    return config, directory, arm, trial


def stand_in(monkeypatch, directory, trial, code: str) -> list[str]:
    """`train` runs `code` with the run's folder as argument; the list of config files that it was given."""
    given = []

    def command(_launch, path):
        given.append(path.read_text())
        return [sys.executable, "-c", RECORD + code, str(directory.run(trial.name).root)]

    monkeypatch.setattr(running, "launch_command", command)
    return given


def record(state: str, **more) -> str:
    values = synthetic.run_record(state, 3.9, 1_000_000, **more)
    return f"(root / 'run.json').write_text({json.dumps(json.dumps(values))})\n"


def test_a_finished_trial_is_not_trained_again(study, monkeypatch):
    config, directory, arm, trial = study
    given = stand_in(monkeypatch, directory, trial, record("finished") + "print('step 1 of 1')")
    assert train_trial(config, directory, arm, trial, "run 1/1")
    assert train_trial(config, directory, arm, trial, "run 1/1")
    assert len(given) == 1
    assert "step 1 of 1" in directory.run(trial.name).log.read_text()


def test_the_training_process_reads_the_resolved_configuration(study):
    config, directory, arm, trial = study
    write_text(directory.config(trial.name), config_text(config, arm, trial))
    run = load_run_config(directory.config(trial.name))
    assert run.run_dir == directory.run(trial.name).root
    assert run.model["intermediate_size"] == arm.intermediate_size and run.train.learning_rate == 2e-3
    command = launch_command((), directory.config(trial.name))
    assert command[1:3] == ["-m", "accelerate.commands.launch"] and command[-4:-1] == ["-m", "kanlm", "train"]
    assert launch_command(("--config_file", "x.yaml"), directory.config(trial.name))[3:5] == [
        "--config_file",
        "x.yaml",
    ]


def test_a_crash_is_recorded_shown_and_tried_again(study, monkeypatch):
    config, directory, arm, trial = study
    given = stand_in(monkeypatch, directory, trial, "print('step 3'); raise SystemExit('out of memory')")
    assert not train_trial(config, directory, arm, trial, "run 1/1")
    assert state_of(directory.run(trial.name)) == ("crashed", "exit status 1: out of memory")
    stand_in(monkeypatch, directory, trial, record("finished"))
    assert train_trial(config, directory, arm, trial, "run 1/1")
    assert state_of(directory.run(trial.name)) == ("finished", "") and len(given) == 1


def test_a_diverged_run_is_a_result_and_not_tried_again(study, monkeypatch):
    config, directory, arm, trial = study
    code = record("failed", failure="Diverged: loss not finite") + "raise SystemExit(1)"
    given = stand_in(monkeypatch, directory, trial, code)
    assert not train_trial(config, directory, arm, trial, "run 1/1")
    assert not train_trial(config, directory, arm, trial, "run 1/1")
    assert len(given) == 1 and state_of(directory.run(trial.name)) == ("diverged", "loss not finite")


def test_a_users_mistake_in_training_ends_the_comparison(study, monkeypatch):
    config, directory, arm, trial = study
    code = "print('kanlm: error: data.source: none'); raise RuntimeError('the launcher: returned 2')"
    stand_in(monkeypatch, directory, trial, code)
    with pytest.raises(UserError, match=f"{trial.name}: data.source: none"):
        train_trial(config, directory, arm, trial, "run 1/1")
    code = record("failed", failure="Diverged: loss not finite") + "print('kanlm: error: x'); sys.exit(1)"
    stand_in(monkeypatch, directory, trial, code)
    assert not train_trial(config, directory, arm, trial, "run 1/1"), "a result, not a mistake"


def test_a_finished_trial_of_another_configuration_is_refused(study, monkeypatch):
    config, directory, arm, trial = study
    stand_in(monkeypatch, directory, trial, record("finished"))
    assert train_trial(config, directory, arm, trial, "run 1/1")
    other = trial.model_copy(update={"learning_rate": 5e-3})
    with pytest.raises(UserError, match="trained with another configuration"):
        train_trial(config, directory, arm, other, "run 1/1")


def test_a_process_left_by_a_killed_comparison_is_waited_for(study, monkeypatch, capsys):
    config, directory, arm, trial = study
    run = directory.run(trial.name)
    write_json(run.record, synthetic.run_record("running", 3.9, 1_000_000))
    left = (
        "import fcntl, json, pathlib, sys, time; root = pathlib.Path(sys.argv[1])\n"
        "lock = open(root / '.lock', 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1.5)\n" + record("finished")
    )
    process = subprocess.Popen([sys.executable, "-c", left, str(run.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    given = stand_in(monkeypatch, directory, trial, "raise SystemExit('trained twice')")
    assert train_trial(config, directory, arm, trial, "run 1/1") and not given
    assert "waiting for it" in capsys.readouterr().out and process.wait() == 0


def test_an_interrupted_run_ends_the_comparison_and_is_resumed(study, monkeypatch):
    config, directory, arm, trial = study
    stand_in(monkeypatch, directory, trial, record("interrupted"))
    with pytest.raises(UserError, match="run the same command again"):
        train_trial(config, directory, arm, trial, "run 1/1")
    stand_in(monkeypatch, directory, trial, record("finished"))
    assert train_trial(config, directory, arm, trial, "run 1/1")


def test_signals_reach_the_training_process(tmp_path):
    code = (
        "import signal, time, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    log = tmp_path / "train.log"

    def stop_when_ready():
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_when_ready, daemon=True)
    watcher.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="arm: stopped by SIGTERM; run the same command again"):
        run_process([sys.executable, "-c", code], log, "arm")
    assert log.read_text() == "ready\nsaved\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_configuration_in_the_same_folder_is_refused(study):
    config, directory, arm, trial = study
    write_text(directory.config(trial.name), config_text(config, arm, trial))
    write_json(directory.plan, {"arms": [], "sweep": [], "trials": [trial.model_dump(mode="json")]})
    write_json(directory.run(trial.name).record, synthetic.run_record("finished", 3.9, 1_000_000))
    check_same_trials(config, directory, [arm])
    longer = config.model_copy(update={"base": {**config.base, "train": {"max_tokens": 800_000}}})
    with pytest.raises(UserError, match="trained with another configuration"):
        check_same_trials(longer, directory, [arm])


def test_the_sweep_picks_the_best_rate_and_says_when_it_lies_on_the_edge(tmp_path):
    config = synthetic.config(output_dir=str(tmp_path), sweep={"learning_rates": [1e-3, 2e-3, 4e-3]})
    directory = CompareDir(config.directory)
    losses = {"kan": (4.0, 3.9, 3.95), "kan_glu": (4.0, 3.9, None), "swiglu": (4.0, 3.9, 3.8)}
    trials = sweep_trials(config)
    for trial in trials:
        loss = losses[trial.arm][[1e-3, 2e-3, 4e-3].index(trial.learning_rate)]
        failed = {"failure": "Diverged: loss not finite"}
        record = synthetic.run_record(
            "failed" if loss is None else "finished", loss or 9.0, 1, **({} if loss else failed)
        )
        write_json(directory.run(trial.name).record, record)
    chosen = {row["arm"]: row for row in sweep_choices(config, directory, trials)}
    assert {arm: row["learning_rate"] for arm, row in chosen.items()} == {
        "kan": 2e-3,
        "kan_glu": 2e-3,
        "swiglu": 4e-3,
    }
    assert {arm for arm, row in chosen.items() if row["on_edge"]} == {"swiglu"}
    assert [row["state"] for row in chosen["kan_glu"]["trials"]] == ["finished", "finished", "diverged"]


def test_a_prompt_longer_than_the_model_is_cut_and_shown_cut():
    from transformers import GenerationConfig

    from kanlm.compare.run import samples
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
