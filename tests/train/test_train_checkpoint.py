"""Checkpoints: what is in them, damage, pruning, a full disk, writing beside the training."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from kanlm.config import UserError
from kanlm.runs import RunDir
from kanlm.train import checkpoint, loop
from kanlm.train.checkpoint import CorruptCheckpoint, load_model, newest_good, verify


@pytest.fixture
def trained(run_config):
    """A finished run with checkpoints of steps 4, 8 and 12."""
    config = run_config("train.save_every=4", "train.keep_last=3")
    loop.train(config)
    return RunDir(config.run_dir)


def truncate(path):
    os.truncate(path, path.stat().st_size - 3)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = [
    ("manifest.json", os.unlink, "manifest.json: cannot be read"),
    ("manifest.json", truncate, "manifest.json: damaged"),
    ("model.safetensors", truncate, "bytes where manifest.json says"),
    ("optimizer.safetensors", flip_a_bit, "content differs from its sha256"),
    ("trainer.json", os.unlink, "missing, but listed"),
    ("manifest.json", lambda path: path.write_text("[]"), "manifest.json: damaged"),
    ("manifest.json", lambda path: path.write_text('{"files": 3}'), "manifest.json: damaged"),
    (
        "manifest.json",
        lambda path: path.write_text('{"files": {"a": {"size": 1}}}'),
        "manifest.json: damaged",
    ),
    ("manifest.json", lambda path: path.write_text('{"files": {}}'), "does not list model.json, model.s"),
    ("manifest.json", lambda path: (path.unlink(), path.mkdir()), "manifest.json: cannot be read"),
    ("model.json", lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    trained, run_config, capsys, losses, name, damage, message
):
    config = run_config("train.save_every=4", "train.keep_last=3")
    expected_losses = losses(config)
    expected = {key: weight.clone() for key, weight in load_model(trained.root)[1].items()}
    last = trained.checkpoint(12)
    damage(last / name)
    with pytest.raises(CorruptCheckpoint, match=message):
        verify(last)
    assert newest_good(trained, say=lambda line: None) == trained.checkpoint(8)
    assert torch.equal(
        load_model(trained.root)[1]["lm_head.weight"], load_model(trained.root, step=8)[1]["lm_head.weight"]
    )
    with pytest.raises(CorruptCheckpoint):
        load_model(trained.root, step=12)

    trained.record.unlink()  # else the run counts as finished
    capsys.readouterr()
    assert loop.train(config).state == "finished"
    said = capsys.readouterr().out
    assert "damaged checkpoint passed over" in said and name in said and "resumed at step 8" in said
    assert (trained.checkpoints / "damaged-step-00000012").is_dir()
    assert losses(config) == expected_losses
    for key, weight in load_model(trained.root)[1].items():
        assert torch.equal(weight, expected[key]), key


def test_run_without_an_intact_checkpoint_says_so(trained, run_config):
    for folder in trained.checkpoints.iterdir():
        truncate(folder / "model.safetensors")
    trained.record.unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        loop.train(run_config("train.save_every=4", "train.keep_last=3"))
    with pytest.raises(UserError, match="holds no intact checkpoint"):
        load_model(trained.root)


def test_missing_step_lists_those_that_exist(trained):
    with pytest.raises(UserError, match="no checkpoint of step 5; steps that it holds: 4, 8, 12"):
        load_model(trained.root, step=5)


def test_files_hold_everything_once_and_nothing_pickled(trained):
    folder = trained.checkpoint(12)
    names = {"manifest.json", "model.json", "model.safetensors", "optimizer.safetensors", "trainer.json"}
    assert {path.name for path in folder.iterdir()} == names
    weights = load_file(folder / "model.safetensors")
    states = load_file(folder / "optimizer.safetensors")
    assert (
        "lm_head.weight" not in weights
        or not json.loads((folder / "model.json").read_text())["tie_word_embeddings"]
    )
    for name, weight in weights.items():
        assert states[f"{name}/exp_avg"].shape == weight.shape
        assert states[f"{name}/step"] == 12
    assert json.loads((folder / "trainer.json").read_text())["loader"]["consumed"] == 48


def test_keep_last_and_keep_every(run_config):
    config = run_config("train.save_every=1", "train.keep_last=2", "train.keep_every=5")
    loop.train(config)
    assert sorted(path.name[-2:] for path in RunDir(config.run_dir).checkpoints.iterdir()) == [
        "05",
        "10",
        "11",
        "12",
    ]


def test_snapshot_is_not_touched_by_later_steps(run_config, monkeypatch):
    """A writer that is slow must still write the weights of its own step."""
    plain = run_config("train.save_every=3", "train.keep_last=9", "train.async_checkpoint=false")
    slow = run_config("name=slow", "train.save_every=3", "train.keep_last=9")
    loop.train(plain)
    later = threading.Event()
    real_write, real_step = checkpoint.Snapshot.write, loop.one_step

    def late_write(self, folder):
        if self.step == 3:
            assert later.wait(60)
        real_write(self, folder)

    def step(session):
        done = real_step(session)
        if session.state.step == 4:  # step 5 is done, and step 3 not yet written
            later.set()
        return done

    monkeypatch.setattr(checkpoint.Snapshot, "write", late_write)
    monkeypatch.setattr(loop, "one_step", step)
    loop.train(slow)
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected = load_file(RunDir(plain.run_dir).checkpoint(3) / name)
        found = load_file(RunDir(slow.run_dir).checkpoint(3) / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def full_disk(monkeypatch, request):
    """Files of this process cannot grow over 20 kB from step 8 on, until `has_space_at` (0 = never)."""
    has_space_at = getattr(request, "param", 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write itself fails, as on a full disk
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = checkpoint.Snapshot.write

    def write(self, folder):
        if self.step < 8 or (has_space_at and self.step >= has_space_at):
            return real(self, folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            return real(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint.Snapshot, "write", write)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_full_disk_stops_the_run_and_leaves_the_last_checkpoint_intact(
    run_config, full_disk, monkeypatch, losses, asynchronous
):
    config = run_config("train.save_every=4", f"train.async_checkpoint={asynchronous}")
    run = RunDir(config.run_dir)
    with pytest.raises(
        UserError, match=r"step-00000008: the checkpoint could not be written .*step-00000004 is intact"
    ):
        loop.train(config)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000004"]  # nothing half-written
    verify(run.checkpoint(4))
    assert json.loads(run.record.read_text())["state"] == "failed"

    monkeypatch.undo()  # space again
    other = run_config("name=other", "train.save_every=4")
    loop.train(config)
    loop.train(other)
    assert losses(config) == losses(other)


@pytest.mark.parametrize("full_disk", [12], indirect=True)
def test_full_disk_can_be_outlived_by_option(run_config, full_disk, capsys):
    config = run_config("train.save_every=4", "train.on_checkpoint_error=continue", "train.keep_last=3")
    assert loop.train(config).state == "finished"
    assert "training goes on without it" in capsys.readouterr().out
    kept = sorted(path.name for path in RunDir(config.run_dir).checkpoints.iterdir())
    assert kept == ["step-00000004", "step-00000012"]


def test_last_checkpoint_that_cannot_be_written_is_an_error_in_any_case(
    run_config, full_disk, interrupt_after, capsys
):
    """Else a run would say that it is finished, or saved, and its weights would be lost."""
    settings = ("train.save_every=4", "train.on_checkpoint_error=continue")
    with pytest.raises(UserError, match="step-00000012: the checkpoint could not be written"):
        loop.train(run_config(*settings))
    interrupt_after(10)
    with pytest.raises(UserError, match="step-00000010: the checkpoint could not be written .*00000004 is"):
        loop.train(run_config("name=stopped", *settings))
    assert "run the same command again" not in capsys.readouterr().out


def test_leftovers_of_a_killed_writer_are_removed(run_config):
    """Also where no checkpoint was finished before the kill."""
    run = RunDir(run_config().run_dir)
    half = run.checkpoints / ".step-00000004.x1y2"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"torn")
    torn = [run.root / f".{name}.x1y2" for name in ("run.json", "config.json", "metrics.jsonl")]
    for path in torn:
        path.write_text("torn")
    (run.root / ".keep").write_text("not ours")
    loop.train(run_config())
    assert sorted(path.name for path in run.root.glob(".*")) == [".keep", ".lock"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000012"]


def test_finished_run_with_a_damaged_last_checkpoint_is_trained_again(trained, run_config, capsys):
    truncate(trained.checkpoint(12) / "model.safetensors")
    loop.train(run_config("train.save_every=4", "train.keep_last=3"))
    said = capsys.readouterr().out
    assert "damaged checkpoint passed over" in said and "nothing is left to do" not in said
    verify(trained.checkpoint(12))


def test_run_that_was_killed_after_its_last_checkpoint_keeps_its_speed(trained, run_config):
    record = json.loads(trained.record.read_text())
    trained.record.write_text(json.dumps(record | {"state": "running"}))
    again = loop.train(run_config("train.save_every=4", "train.keep_last=3"))
    assert again.state == "finished" and again.final_validation == record["final_validation"]
    assert again.tokens_per_second > 0 and again.peak_memory_bytes > 0


def failing_at(step: int, error: BaseException, monkeypatch):
    real = checkpoint.Snapshot.write

    def write(self, folder):
        if self.step == step:
            raise error
        return real(self, folder)

    monkeypatch.setattr(checkpoint.Snapshot, "write", write)


@pytest.mark.parametrize("step", [8, 12])
def test_no_error_of_the_writing_thread_is_lost(run_config, monkeypatch, step):
    """A run must not say that it has finished while its checkpoint died of a mistake."""
    failing_at(step, RuntimeError("a mistake"), monkeypatch)
    config = run_config("train.save_every=4", "train.on_checkpoint_error=continue")
    with pytest.raises(RuntimeError, match="a mistake"):
        loop.train(config)
    assert json.loads(RunDir(config.run_dir).record.read_text())["state"] == "failed"


def test_failed_write_is_told_after_the_next_step(run_config, monkeypatch):
    """Or in the step itself, where the disk is quick; not at the next checkpoint, which may be hours away."""
    failing_at(4, OSError(28, "No space left on device"), monkeypatch)
    real = loop.one_step

    def step(session):
        if session.writer.thread is not None:
            session.writer.thread.join()
        return real(session)

    monkeypatch.setattr(loop, "one_step", step)
    config = run_config("train.save_every=4", "train.max_tokens=6400")
    with pytest.raises(UserError, match="step-00000004: the checkpoint could not be written"):
        loop.train(config)
    assert json.loads(RunDir(config.run_dir).record.read_text())["step"] in (4, 5)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_state_after_a_failed_write_is_written_all_the_same(trained, monkeypatch, asynchronous):
    failing_at(16, OSError(28, "No space left on device"), monkeypatch)
    writer = checkpoint.CheckpointWriter(trained, 9, 0, asynchronous, "continue", say=(said := []).append)
    for step in (16, 20):
        config, weights = load_model(trained.root, 12)
        writer.save(checkpoint.Snapshot(step, {"w": torch.ones(2)}, {"m": torch.ones(2)}, {}, {}))
    writer.finish()
    assert [line.split(": ")[1][:9] for line in said] == ["the check"]
    verify(trained.checkpoint(20))
    assert not trained.checkpoint(16).exists()


@pytest.fixture
def no_space_for_metrics(monkeypatch):
    """From step 8 on, until step 11, no file of this process can be larger than metrics.jsonl is by then."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = loop.one_step

    def step(session):
        done = real(session)
        if session.state.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (session.run.metrics.stat().st_size + 20, hard))
        if session.state.step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return done

    monkeypatch.setattr(loop, "one_step", step)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_too_full_for_metrics_is_one_clear_error(run_config, no_space_for_metrics):
    config = run_config()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(File too large\); free some"):
        loop.train(config)


def test_disk_too_full_for_metrics_can_be_outlived_by_option(
    run_config, no_space_for_metrics, metrics, capsys
):
    config = run_config("train.on_checkpoint_error=continue")
    assert loop.train(config).state == "finished"
    assert capsys.readouterr().out.count("metrics.jsonl: cannot be written") == 1
    steps = [line["step"] for line in metrics(config)]
    assert steps == sorted(set(steps)) and steps[-1] == 12 and len(steps) >= 10


def test_tensors_that_the_disk_does_not_give_are_an_error_of_the_system(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"

    def refused(path):
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: Input/output error (5)")

    monkeypatch.setattr(checkpoint, "load_file", refused)
    with pytest.raises(OSError) as told:
        checkpoint.read_tensors(path)
    assert (told.value.errno, told.value.filename) == (errno.EIO, str(path))
