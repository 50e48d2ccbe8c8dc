"""`status` while a run trains, after it, and after a kill."""

from __future__ import annotations

import json

import pytest

from kanlm.config import UserError
from kanlm.runs import RunDir, last_metrics, write_json
from kanlm.train import loop
from kanlm.train.progress import keep_metrics_until
from kanlm.train.status import status


def test_status_tells_running_from_finished_and_killed(run_config, monkeypatch):
    config = run_config("train.eval_every=4", "train.save_every=4")
    run = RunDir(config.run_dir)
    seen = []
    real = loop.one_step

    def looking(session):
        if session.state.step == 9:
            seen.append(status(run.root))
        return real(session)

    monkeypatch.setattr(loop, "one_step", looking)
    loop.train(config)
    assert "tiny: running (process " in seen[0]
    assert "step        9 of 12 (75.0%), 1,152 tokens" in seen[0]
    assert "nats/token" in seen[0] and "bits/byte" in seen[0] and "left " in seen[0]

    after = status(run.root)
    assert after.startswith("tiny: finished\n")
    assert "12 of 12 (100.0%)" in after and "checkpoints 8, 12" in after and "left" not in after

    write_json(run.record, json.loads(run.record.read_text()) | {"state": "running"})
    assert "ended without a word" in status(run.root)


def test_status_of_something_else_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no run.json"):
        status(tmp_path)


def test_damaged_line_of_metrics_is_told_and_those_around_it_stay(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1, "loss": 3.0}',
        b'{"step": 2, "l\xe4ss": 2.0}',
        b'{"step": 3, "loss": 1.0}',
        b'{"st',
    ]
    path.write_bytes(b"\n".join(lines))
    assert last_metrics(RunDir(tmp_path)) == {"step": 3, "loss": 1.0}
    keep_metrics_until(path, 3)
    assert path.read_bytes() == lines[0] + b"\n" + lines[2] + b"\n"
    assert capsys.readouterr().err == f"{path}: line 2 is damaged and left out\n"
