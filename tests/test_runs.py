"""Files and folders of a run: whole or not at all, and errors with the name of their file."""

import errno

import pytest

from kanlm import runs


def test_an_error_after_the_rename_leaves_no_folder(tmp_path, monkeypatch):
    def failing(path):
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(runs, "fsync_one", failing)
    with pytest.raises(OSError, match="Input/output"), runs.new_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("whole")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "number", "file"),
    [
        (Exception("Input/output error (os error 5)"), errno.EIO, "here"),
        (
            RuntimeError("unable to open file </a/b> in read-only mode: Permission denied (13)"),
            errno.EACCES,
            "/a/b",
        ),
    ],
)
def test_errors_of_the_system_in_a_text_become_oserrors(error, number, file):
    with pytest.raises(OSError) as caught, runs.system_errors("here"):
        raise error
    assert (caught.value.errno, caught.value.filename) == (number, file)


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="sizes"), runs.system_errors("here"):
        raise RuntimeError("sizes (5)")
