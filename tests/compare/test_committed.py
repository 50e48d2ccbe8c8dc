"""The committed comparison: `kanlm report` makes the same files from its bundle alone."""

import shutil
from pathlib import Path

import pytest

from kanlm.compare.report import report

VERDICT = Path(__file__).parents[2] / "docs/results/verdict"


@pytest.mark.slow
def test_the_committed_report_is_made_of_the_committed_bundle(tmp_path):
    shutil.copy(VERDICT / "bundle.json", tmp_path)
    report(tmp_path)
    made, committed = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} - {Path("report.html")}
        for folder in (tmp_path, VERDICT)
    )  # report.html: the same in a page, not committed, and there where a reader has made it
    assert made == committed
    for path in committed:
        assert (tmp_path / path).read_bytes() == (VERDICT / path).read_bytes(), path
