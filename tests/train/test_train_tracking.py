"""Trackers: offline, without an account, without a prompt; what is missing is one line before a step."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from accelerate.tracking import TensorBoardTracker

from kanlm.config import UserError
from kanlm.train import loop, tracking


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(run_config, metrics):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = run_config("tracking.tracker=tensorboard", "train.eval_every=6")
    loop.train(config)
    events = event_accumulator.EventAccumulator(str(config.run_dir / "kanlm"))
    events.Reload()
    expected = {line["step"]: line["loss"] for line in metrics(config) if "loss" in line}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(expected)
    wanted = {"lr", "grad_norm", "tokens_per_second", "tokens", "validation_bits_per_byte"}
    assert wanted <= set(events.Tags()["scalars"])


def test_wandb_works_offline_without_an_account(run_config, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = run_config("tracking.tracker=wandb")
    loop.train(config)
    (folder,) = (config.run_dir / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


def test_wandb_online_without_a_key_is_one_line_before_training(run_config, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    config = run_config("tracking.tracker=wandb", "tracking.wandb_mode=online")
    with pytest.raises(UserError, match="tracking.wandb_mode: 'online' needs an API key") as raised:
        loop.train(config)
    assert "\n" not in str(raised.value)
    assert not config.run_dir.exists()


def test_wandb_key_is_found_where_wandb_login_puts_it(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    netrc.write_text("machine other.host\n  login user\n  password abc\n")
    assert not tracking._wandb_key()
    netrc.write_text("machine api.wandb.ai\n  login user\n  password abc\n")
    assert tracking._wandb_key()


def test_wandb_without_network_is_one_line(run_config, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refused(**settings):
        raise wandb.errors.CommError("Run initialization has timed out after 90.0 sec.\nmore")

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(UserError, match="wandb could not start .*timed out.*offline") as raised:
        loop.train(run_config("tracking.tracker=wandb", "tracking.wandb_mode=online"))
    assert "\n" not in str(raised.value)


def test_missing_package_is_named(run_config, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trackio" else real(name, *a)
    )
    config = run_config("tracking.tracker=trackio")
    with pytest.raises(UserError, match=r"'trackio' is not installed; pip install 'kanlm\[track\]'"):
        loop.train(config)
    assert not config.run_dir.exists()


def test_flat_tables_hold_scalars_only():
    found = tracking.dotted({"a": {"b": 1, "c": None, "d": [1, 2]}, "e": "x", "f": 0.5})
    assert found == {"a.b": 1, "a.d": "[1, 2]", "e": "x", "f": 0.5}
    json.dumps(found)


def test_tracker_that_fails_in_mid_training_is_given_up_and_the_run_goes_on(
    run_config, monkeypatch, metrics, capsys
):
    pytest.importorskip("tensorboard")
    real = TensorBoardTracker.log

    def failing(self, values, step):
        if step >= 4:
            raise OSError(28, "No space left on device")
        return real(self, values, step=step)

    monkeypatch.setattr(TensorBoardTracker, "log", failing)
    config = run_config("tracking.tracker=tensorboard")
    assert loop.train(config).state == "finished"
    assert [line["step"] for line in metrics(config)] == [*range(1, 13)]
    said = [line for line in capsys.readouterr().out.splitlines() if "tensorboard" in line]
    assert said == [
        "tracking.tracker: tensorboard failed and is given up ([Errno 28] No space left on device); "
        "metrics.jsonl has every number"
    ]


def test_tracker_that_cannot_finish_is_one_line(run_config, monkeypatch, capsys):
    pytest.importorskip("tensorboard")

    def failing(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(TensorBoardTracker, "finish", failing)
    assert loop.train(run_config("tracking.tracker=tensorboard")).state == "finished"
    assert "tensorboard did not end well ([Errno 5] Input/output error)" in capsys.readouterr().out


def test_trackio_keeps_the_loss_of_every_logged_step(run_config, tmp_path, losses):
    """The real package, in a process of its own: it reads its folder when it is imported."""
    pytest.importorskip("trackio")
    config = run_config("tracking.tracker=trackio", "tracking.project=tracked")
    program = "import sys; from kanlm.config import RunConfig; from kanlm.train.loop import train; "
    program += "train(RunConfig.model_validate_json(sys.argv[1]))"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run([sys.executable, "-c", program, config.model_dump_json()], env=environment, check=True)
    with sqlite3.connect(tmp_path / "trackio" / "tracked.db") as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
    lines = [(step, json.loads(metrics)) for step, metrics in rows]
    assert {step: line["loss"] for step, line in lines if "loss" in line} == losses(config)
