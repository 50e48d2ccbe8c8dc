"""The final table reaches the tracker that the runs use."""

import pytest
import synthetic

from kanlm.compare.artifacts import load
from kanlm.compare.report import report_content
from kanlm.compare.tracking import COLUMNS, table_rows, track_table


def written(tmp_path, tracker: str):
    values = {(arm, 0): loss for arm, loss in (("kan", "diverged"), ("kan_glu", 3.8), ("swiglu", 3.9))}
    base = {
        "model": {"hidden_size": 128},
        "train": {"max_tokens": 400_000},
        "tracking": {"tracker": tracker},
    }
    synthetic.write(tmp_path / "study", values, seeds=[0], output_dir=str(tmp_path), base=base)
    artifacts = load(tmp_path / "study")
    return artifacts.config, report_content(artifacts)


def test_the_table_has_a_row_for_each_arm(tmp_path):
    _, content = written(tmp_path, "none")
    rows = table_rows(content)
    assert [row[2] for row in rows] == ["kan", "kan_glu", "swiglu"]
    assert rows[0][COLUMNS.index("bits_per_byte")] is None
    assert rows[1][COLUMNS.index("bits_per_byte")] == pytest.approx(
        content["runs"][1]["eval"]["bits_per_byte"]
    )


def test_no_tracker_leaves_nothing_behind(tmp_path):
    config, content = written(tmp_path, "none")
    track_table(config, content)
    assert not list(tmp_path.rglob("table"))


def test_tensorboard_gets_one_scalar_a_cell(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config, content = written(tmp_path, "tensorboard")
    track_table(config, content)
    scalars = {}
    for path in (tmp_path / "study" / "arms" / "table").rglob("events.out.tfevents*"):
        found = reader.EventAccumulator(str(path))
        found.Reload()
        scalars |= {name: found.Scalars(name)[-1].value for name in found.Tags()["scalars"]}
    expected = content["runs"][2]["eval"]["bits_per_byte"]
    assert scalars["parameters/base/swiglu/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert "parameters/base/kan/bits_per_byte" not in scalars
