"""The final table reaches the tracker that the runs use."""

import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest
import synthetic

from kanlm.compare.artifacts import load
from kanlm.compare.report import report_content
from kanlm.compare.tracking import COLUMNS, pictures, table_rows, track_outcome


def written(tmp_path, tracker: str):
    values = {(arm, 0): loss for arm, loss in (("kan", "diverged"), ("kan_glu", 3.8), ("swiglu", 3.9))}
    base = {
        "model": {"hidden_size": 128},
        "train": {"max_tokens": 400_000},
        "tracking": {"tracker": tracker},
    }
    synthetic.write(tmp_path / "study", values, seeds=[0], output_dir=str(tmp_path), base=base)
    artifacts = load(tmp_path / "study")
    return artifacts, report_content(artifacts)


def test_the_table_has_a_row_for_each_arm(tmp_path):
    _, content = written(tmp_path, "none")
    rows = table_rows(content)
    assert [row[2] for row in rows] == ["kan", "kan_glu", "swiglu"]
    assert rows[0][COLUMNS.index("bits_per_byte")] is None
    assert rows[1][COLUMNS.index("bits_per_byte")] == pytest.approx(
        content["runs"][1]["eval"]["bits_per_byte"]
    )


def test_no_tracker_leaves_nothing_behind(tmp_path):
    track_outcome(*written(tmp_path, "none"))
    assert not list(tmp_path.rglob("table"))


def test_tensorboard_gets_one_scalar_a_cell(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    artifacts, content = written(tmp_path, "tensorboard")
    track_outcome(artifacts, content)
    scalars, images = {}, set()
    for path in (tmp_path / "study" / "arms" / "table").rglob("events.out.tfevents*"):
        found = reader.EventAccumulator(str(path))
        found.Reload()
        scalars |= {name: found.Scalars(name)[-1].value for name in found.Tags()["scalars"]}
        images |= set(found.Tags()["images"])
    expected = content["runs"][2]["eval"]["bits_per_byte"]
    assert scalars["parameters/base/swiglu/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert "parameters/base/kan/bits_per_byte" not in scalars
    assert "learned functions/kan_glu" in images


def test_runs_of_a_comparison_are_one_group(tmp_path):
    artifacts, _ = written(tmp_path, "wandb")
    assert {run.tracking.group for run in artifacts.config.arm_runs.values()} == {"study"}


def test_pictures_are_of_learned_functions(tmp_path):
    artifacts, _ = written(tmp_path, "none")
    drawn = pictures(artifacts)
    assert "kan_glu" in drawn and "swiglu" not in drawn
    height, width, colours = drawn["kan_glu"].shape
    assert min(height, width) > 200 and colours == 3 and drawn["kan_glu"].std() > 5


def test_wandb_keeps_table_and_pictures_offline_in_the_group(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    track_outcome(*written(tmp_path, "wandb"))
    (folder,) = (tmp_path / "study" / "arms" / "table" / "wandb").glob("offline-run-*")
    log = next(folder.glob("*.wandb"))
    ends = time.monotonic() + 60  # a process of wandb's own writes it, and may still be at it
    while b"study" not in log.read_bytes() and time.monotonic() < ends:
        time.sleep(0.2)
    assert b"study" in log.read_bytes()
    media = [path.as_posix() for path in folder.rglob("media/*/*") if path.is_file()] + [
        path.as_posix() for path in folder.rglob("media/*/*/*") if path.is_file()
    ]
    assert any("arms" in name and name.endswith(".json") for name in media), media
    assert any("kan_glu" in name and name.endswith(".png") for name in media), media


PROGRAM = """
import json, sys
from kanlm.compare.artifacts import load
from kanlm.compare.report import report_content
from kanlm.compare.tracking import track_outcome
artifacts = load(sys.argv[1])
track_outcome(artifacts, report_content(artifacts))
"""


@pytest.mark.slow  # its package takes long to import
@pytest.mark.long
def test_trackio_keeps_table_and_pictures_in_the_group(tmp_path):
    """The real package, in a process of its own: it reads its folder when it is imported."""
    pytest.importorskip("trackio")
    written(tmp_path, "trackio")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "study")]
    subprocess.run(command, env=environment, check=True, timeout=590)
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        (metrics,) = database.execute("select metrics from metrics").fetchall()
        configs = database.execute("select config from configs").fetchall()
    assert {"arms", "learned functions/kan_glu"} <= set(json.loads(metrics[0]))
    assert '"study"' in str(configs)
    assert list((tmp_path / "trackio").rglob("*.png"))
