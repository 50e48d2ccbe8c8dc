"""`status` while a run trains, after it, and after a kill."""

from __future__ import annotations

import json

import pytest

from kanlm.config import UserError
from kanlm.runs import RunDir, write_json
from kanlm.train import loop
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
