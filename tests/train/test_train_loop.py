"""The loop in one process: what it leaves behind, determinism, resumption, signals, faults, bad input."""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from kanlm.config import UserError, load_run_config
from kanlm.data import TokenLoader
from kanlm.evaluation.perplexity import held_out_documents
from kanlm.initial import kan_coefficient_names
from kanlm.model import KanLMForCausalLM
from kanlm.model.ffn_kan import KANGLU
from kanlm.runs import RunDir, RunRecord
from kanlm.train import loop, parallel
from kanlm.train import step as train_step
from kanlm.train.build import build
from kanlm.train.checkpoint import load_model, load_tokenizer
from kanlm.train.faults import Diverged, StopSignal
from kanlm.train.lock import is_locked, lock_file, locked
from kanlm.train.progress import BusyNotice


def test_run_leaves_config_record_metrics_tokenizer_and_checkpoint(run_config, metrics):
    config = run_config("train.eval_every=6")
    record = loop.train(config)
    run = RunDir(config.run_dir)
    assert RunRecord.model_validate_json(run.record.read_text()) == record
    assert (record.state, record.step, record.tokens) == ("finished", 12, 12 * 4 * 32)
    assert json.loads(run.config.read_text()) == config.model_dump(mode="json")
    lines = metrics(config)
    assert [line["step"] for line in lines] == [*range(1, 13)]
    assert [line["step"] for line in lines if "validation_bits_per_byte" in line] == [6, 12]
    assert lines[-1]["validation_loss"] != record.final_validation["loss"]  # of 256 tokens, of all
    assert lines[11]["loss"] < lines[0]["loss"] - 0.1
    assert all(line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in lines[:12])
    assert lines[1]["data_share"] > 0 and all(0 <= line["data_share"] < 1 for line in lines[:12])
    model_config, weights = load_model(run.root)
    model = KanLMForCausalLM(model_config)
    model.load_state_dict(weights, strict=True)
    assert sum(p.numel() for p in model.parameters()) == record.parameters
    assert len(load_tokenizer(run.root)) == 300
    assert record.provenance["wrapper"] == "none" and record.provenance["processes"] == 1


def test_moved_run_is_trained_again_from_its_config(write_toml, losses, tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "my.txt").write_text(
        "".join(f"{age} cats see {n} birds.\n" for age in ("old", "new") for n in range(99))
    )
    toml = write_toml("data.source=my.txt", "output_dir=runs", "train.max_tokens=512")
    monkeypatch.chdir(project)
    first = load_run_config(toml)
    loop.train(first)
    expected = losses(first)
    monkeypatch.chdir(elsewhere)
    shutil.copytree(project / "runs/tiny", "moved")
    again = load_run_config("moved/config.json")
    assert loop.train(again).state == "finished"
    assert losses(again) == expected and again.run_dir == Path("runs/tiny")
    # The run itself, known by its absolute place, is the same run from here.
    config = (project / "runs/tiny/config.json").read_text()
    (project / "runs/tiny/config.json").write_text(
        config.replace('"runs"', json.dumps(str(project / "runs")))
    )
    assert loop.train(load_run_config(project / "runs/tiny/config.json")).step == len(expected)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_same_seed_gives_bit_identical_losses_and_another_seed_does_not(run_config, losses, kernels):
    chosen = f"train.kernels={kernels}"
    first, again = run_config(chosen), run_config(chosen, "name=again")
    other = run_config(chosen, "name=other", "seed=9")
    for config in (first, again, other):
        loop.train(config)
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


def test_finished_run_is_not_trained_again(run_config, losses):
    config = run_config()
    record = loop.train(config)
    before = RunDir(config.run_dir).metrics.read_bytes()
    assert loop.train(config) == record
    assert RunDir(config.run_dir).metrics.read_bytes() == before


DROPOUT = ("model.attention_dropout=0.1", "train.micro_batch_size=2")
MUON_STREAM = ("train.optimizer=muon", "data.streaming=true", "data.cross_document_attention=false")


@pytest.mark.parametrize(
    ("stop_at", "settings"), [(1, DROPOUT), (5, DROPOUT), (11, DROPOUT), (6, MUON_STREAM)]
)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    run_config, losses, monkeypatch, interrupt_after, stop_at, settings
):
    whole, parts = run_config(*settings), run_config("name=parts", *settings)
    loop.train(whole)
    interrupt_after(stop_at)
    record = loop.train(parts)
    assert (record.state, record.step) == ("interrupted", stop_at)
    monkeypatch.undo()
    assert loop.train(parts).state == "finished"
    assert losses(parts) == losses(whole)
    for name, weight in load_model(whole.run_dir)[1].items():
        assert torch.equal(weight, load_model(parts.run_dir)[1][name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_says_how_to_go_on(run_config, interrupt_after, capsys, number):
    config = run_config()
    handler = signal.getsignal(number)
    interrupt_after(3, number)
    assert loop.train(config).state == "interrupted"
    assert "run the same command again to go on" in capsys.readouterr().out
    assert [path.name for path in RunDir(config.run_dir).checkpoints.iterdir()] == ["step-00000003"]
    assert signal.getsignal(number) is handler


def test_micro_batches_leave_the_losses_as_they_are(run_config, losses):
    whole, cut = run_config(), run_config("name=cut", "train.micro_batch_size=1")
    loop.train(whole)
    loop.train(cut)
    assert losses(cut) == pytest.approx(losses(whole), rel=2e-5)


def test_gradient_checkpointing_leaves_the_losses_as_they_are(run_config, losses, monkeypatch):
    plain, checkpointed = run_config(), run_config("name=checkpointed", "train.gradient_checkpointing=true")
    calls = {}
    for config in (plain, checkpointed):
        real, count = KANGLU.forward, itertools.count(1)

        def forward(self, x, real=real, count=count, name=config.name):
            calls[name] = next(count)
            return real(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(KANGLU, "forward", forward)
            loop.train(config)
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-6)
    assert calls["checkpointed"] >= calls["tiny"] + 12 * 2  # each layer once more in each step's backward


def test_gradients_are_clipped_to_the_norm_asked_for(run_config, monkeypatch, metrics):
    real, seen = train_step.clip_gradients, []

    def clip(model, norm, max_norm):
        before = [parameter.grad.clone() for parameter in model.parameters()]
        real(model, norm, max_norm)
        after = [parameter.grad for parameter in model.parameters()]
        found = torch.nn.utils.get_total_norm(before), torch.nn.utils.get_total_norm(after)
        seen.append((norm, *map(float, found)))
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one * (found[1] / found[0]), other, rtol=1e-4, atol=1e-8)

    monkeypatch.setattr(train_step, "clip_gradients", clip)
    loop.train(run_config("train.max_grad_norm=0.01"))
    assert all(norm == pytest.approx(before) for norm, before, _ in seen)
    assert all(before > 0.02 and after == pytest.approx(0.01, rel=1e-4) for _, before, after in seen)
    assert [line["grad_norm"] for line in metrics(run_config())[:12]] == [norm for norm, _, _ in seen]
    for free in ("name=large", "train.max_grad_norm=1e6"), ("name=off", "train.max_grad_norm=0"):
        seen.clear()
        loop.train(run_config(*free))
        assert len(seen) == 12 and all(before == after for _, before, after in seen)


def test_any_seed_serves_dropout(run_config, losses):
    """Another mask in each step and process, the same one in a repeated run."""
    settings = ("model.attention_dropout=0.2", f"seed={2**32 - 1}")
    one, two = run_config(*settings), run_config("name=two", *settings)
    loop.train(one)
    loop.train(two)
    assert losses(one) == losses(two)
    seeds = {train_step.dropout_seed(*key) for key in itertools.product((0, 1, 2**60), range(50), range(8))}
    assert len(seeds) == 3 * 50 * 8 and all(0 <= seed < 2**64 for seed in seeds)


def test_z_loss_pulls_the_partition_function_towards_one(run_config):
    plain, held = (
        run_config("train.max_tokens=6400"),
        run_config("name=z", "train.z_loss=1.0", "train.max_tokens=6400"),
    )
    ids = torch.arange(4, 36)[None]
    log_partition = []
    for config in (plain, held):
        loop.train(config)
        model_config, weights = load_model(config.run_dir)
        model = KanLMForCausalLM(model_config)
        model.load_state_dict(weights)
        with torch.no_grad():
            log_partition.append(model(input_ids=ids).logits.logsumexp(-1).square().mean().item())
    assert log_partition[1] < 0.2 * log_partition[0]


def test_z_loss_counts_valid_targets_only():
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -100, 2]])  # the target of position 0 is not valid, that of position 1 is
    expected = logits[0, 1].logsumexp(-1) ** 2
    assert torch.allclose(train_step.squared_log_partition(logits, labels), expected)


@pytest.fixture
def poison(after_backward):
    """Make a gradient of the given steps (1-based) NaN or Inf."""

    def install(steps: set[int], value: float) -> None:
        def poisoned(session):
            if session.state.step + 1 in steps:
                session.model.model.layers[1].mlp.down_proj.weight.grad.view(-1)[3] = value

        after_backward(poisoned)

    return install


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_step_is_skipped_and_counted(run_config, poison, metrics, capsys, value):
    config = run_config("train.save_every=1", "train.keep_last=20", "train.async_checkpoint=false")
    poison({4, 5}, value)
    record = loop.train(config)
    assert record.state == "finished"
    assert metrics(config)[11]["skipped_steps"] == 2
    assert "the step was left out" in capsys.readouterr().out
    third, fifth, sixth = (load_model(config.run_dir, step)[1] for step in (3, 5, 6))
    assert all(torch.equal(third[name], fifth[name]) for name in third)
    assert not all(torch.equal(third[name], sixth[name]) for name in third)


def test_three_nonfinite_steps_in_a_row_stop_the_run_and_name_the_layer(run_config, poison):
    config = run_config("train.save_every=2")
    poison({6, 7, 8}, math.nan)
    with pytest.raises(Diverged, match=r"layers\.1\.mlp\.down_proj\.weight"):
        loop.train(config)
    report = json.loads((config.run_dir / "nonfinite.json").read_text())
    assert report["step"] == 8
    assert report["sequences"] == {"step 6": [20, 24], "step 7": [24, 28], "step 8": [28, 32]}
    record = json.loads(RunDir(config.run_dir).record.read_text())
    assert (record["state"], record["failure_kind"]) == ("failed", "diverged")


@pytest.fixture
def loss_scaling(monkeypatch):
    """What fp16 brings on a GPU, here in fp32: scaled losses, unscaled gradients, a scale in search."""

    def install(scale: float) -> torch.amp.GradScaler:
        scaler, real = torch.amp.GradScaler("cpu", init_scale=scale), loop.open_session

        def open_session(config, run, accelerator, *arguments):
            session = real(config, run, accelerator, *arguments)
            raw, accelerator.scaler = session.raw_optimizers, scaler
            session.optimizers = [AcceleratedOptimizer(o, device_placement=False, scaler=scaler) for o in raw]
            accelerator.unscale_gradients = lambda: [scaler.unscale_(optimizer) for optimizer in raw]
            return session

        monkeypatch.setattr(loop, "open_session", open_session)
        return scaler

    return install


def test_scale_that_is_too_high_costs_steps_and_not_the_run(
    run_config, monkeypatch, loss_scaling, metrics, losses, capsys, poison
):
    plain, config = run_config("name=plain"), run_config()
    poison({4, 5, 6, 7}, math.inf)
    scaler = loss_scaling(2.0**16)
    assert loop.train(config).skipped_steps == 4
    assert scaler.get_scale() == 2.0**12
    assert metrics(config)[11]["skipped_steps"] == 4
    assert capsys.readouterr().out.count("the loss scale was too high, and is halved") == 4
    monkeypatch.undo()
    loop.train(plain)
    for step in (1, 2, 3, 4):  # a scale that is a power of two changes no gradient
        assert losses(config)[step] == losses(plain)[step]


def test_gradient_that_no_scale_makes_finite_stops_the_run(run_config, poison, loss_scaling):
    poison(set(range(3, 13)), math.nan)
    loss_scaling(4.0)  # too high in steps 3 and 4; 1, a half and a quarter are not
    with pytest.raises(Diverged, match=r"up to step 7; first in gradient of .*down_proj"):
        loop.train(run_config())


def test_loss_that_is_not_finite_has_no_scale_to_blame(run_config, monkeypatch, loss_scaling):
    monkeypatch.setattr(train_step, "global_sum", lambda loss: loss * math.nan)
    loss_scaling(2.0**16)
    with pytest.raises(Diverged, match="up to step 3"):
        loop.train(run_config())


def test_checkpoint_is_written_when_the_last_one_is_old(run_config):
    config = run_config("train.save_minutes=1e-9", "train.keep_last=20")
    loop.train(config)
    assert len(list(RunDir(config.run_dir).checkpoints.iterdir())) == 12
    seldom = run_config("name=seldom", "train.keep_last=20")
    loop.train(seldom)
    assert len(list(RunDir(seldom.run_dir).checkpoints.iterdir())) == 1


def test_second_ctrl_c_acts_at_once():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_nan_weight_is_traced_to_the_layer_it_sits_in(run_config, monkeypatch):
    config = run_config()
    real = loop.one_step

    def broken(session):
        with torch.no_grad():
            session.model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
        return real(session)

    monkeypatch.setattr(loop, "one_step", broken)
    with pytest.raises(Diverged, match=r"output of model\.layers\.1\.mlp\.down_proj \(Linear\)"):
        loop.train(config)


def test_parameter_that_never_gets_a_gradient_stops_the_run(run_config, after_backward):
    config = run_config()
    after_backward(lambda session: session.model.model.layers[0].mlp.down_proj.weight.grad.zero_())
    with pytest.raises(UserError, match=r"first 5 steps .*layers\.0\.mlp\.down_proj\.weight"):
        loop.train(config)
    assert json.loads(RunDir(config.run_dir).record.read_text())["failure_kind"] == "user_error"
    shutil.rmtree(config.run_dir)
    assert loop.train(run_config("train.zero_gradient_steps=0")).state == "finished"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.intermediate_size=32", "model.intermediate_size"),
        ("train.learning_rate=0.02", "train.learning_rate"),
        ("tokenizer.vocab_size=310", "tokenizer.vocab_size"),
        ("data.max_documents=149", "data.max_documents"),
        ("seed=3", "seed"),
    ],
)
def test_folder_of_another_run_is_refused_and_the_field_named(run_config, override, key):
    config = run_config("train.max_tokens=128")
    loop.train(config)
    with pytest.raises(UserError, match=f"another configuration: {key} was"):
        loop.train(run_config("train.max_tokens=128", override))


def test_harmless_settings_may_change_when_a_run_goes_on(run_config, interrupt_after, monkeypatch, losses):
    interrupt_after(4)
    loop.train(run_config())
    monkeypatch.undo()
    record = loop.train(run_config("train.log_every=3", "train.save_every=5", "train.micro_batch_size=2"))
    assert record.state == "finished"


def test_checkpoint_of_other_tokens_is_refused(run_config, interrupt_after, monkeypatch):
    config = run_config()
    interrupt_after(4)
    loop.train(config)
    monkeypatch.undo()
    real = TokenLoader.load_state_dict

    def other_text(self, state):
        self._identity["sha256 of the data manifest (text and tokenizer)"] = "0" * 64
        real(self, state)

    monkeypatch.setattr(TokenLoader, "load_state_dict", other_text)
    with pytest.raises(UserError, match="sha256 of the data manifest"):
        loop.train(config)
    record = json.loads(RunDir(config.run_dir).record.read_text())
    assert (record["state"], record["failure_kind"], record["step"]) == ("failed", "user_error", 4)


def test_error_of_our_own_is_recorded_as_a_crash(run_config, monkeypatch):
    config = run_config()
    monkeypatch.setattr(train_step, "gradient_norm", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.train(config)
    record = json.loads(RunDir(config.run_dir).record.read_text())
    assert (record["state"], record["failure_kind"]) == ("failed", "crashed")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_tokens=100"], "train.max_tokens: 100 is less than one step"),
        (["train.mixed_precision=fp16"], "train.mixed_precision: 'fp16' needs a GPU"),
        (["model.num_attention_heads=3"], "num_attention_heads"),
        (["model.hiden_size=32"], "hiden_size"),
        (["data.source=missing.txt"], "missing.txt"),
    ],
)
def test_mistake_is_one_line_and_leaves_no_run_folder(run_config, overrides, message):
    config = run_config(*overrides)
    with pytest.raises(UserError, match=message) as raised:
        loop.train(config)
    assert "\n" not in str(raised.value)
    assert not config.run_dir.exists()


def test_batch_must_divide_among_processes(run_config):
    with pytest.raises(UserError, match="train.batch_size: 4 sequences do not divide among 3 processes"):
        run_config().train.micro_batches(3)
    with pytest.raises(UserError, match="train.micro_batch_size: 2 does not divide the 3 sequences of each"):
        run_config("train.batch_size=6", "train.micro_batch_size=2").train.micro_batches(2)
    assert run_config("train.micro_batch_size=1").train.micro_batches(2) == (1, 2)
    assert run_config("train.micro_batch_size=4").train.micro_batches(2) == (2, 1)
    assert run_config().total_steps == 12


def test_a_run_is_read_from_another_directory(run_config, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("own.txt").write_text("one line of text, and a second.\n" * 400)
    config = run_config("data.source=own.txt", "train.max_tokens=128", "output_dir=runs")
    loop.train(config)
    monkeypatch.chdir(tmp_path)
    texts, name, part = held_out_documents(tmp_path / "here" / config.run_dir)
    assert (name, part) == (str(tmp_path / "here" / "own.txt"), "validation") and "second" in next(texts)
    assert str(tmp_path) not in Path("here/runs/tiny/config.json").read_text().replace(
        config.data.cache_dir, ""
    )


def test_second_process_on_the_same_run_is_refused(run_config):
    config = run_config()
    config.run_dir.mkdir(parents=True)
    with open(config.run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training this run"):
            loop.train(config)
    assert loop.train(config).state == "finished"


def test_who_asks_whether_a_run_is_trained_does_not_keep_it_from_training(tmp_path):
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    with open(lock_file(run), "w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with locked(run, Accelerator(cpu=True)):
            assert is_locked(run)
    assert not is_locked(run)


def test_of_two_that_begin_while_somebody_asks_one_trains_and_one_is_told_at_once(tmp_path):
    run, told, trains, leave = RunDir(tmp_path / "run"), threading.Event(), [], threading.Event()
    run.root.mkdir()

    def begin():
        try:
            with locked(run, Accelerator(cpu=True)):
                trains.append(run)
                assert leave.wait(10)
        except UserError:
            told.set()

    with open(lock_file(run), "w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        both = [threading.Thread(target=begin) for _ in range(2)]
        for thread in both:
            thread.start()
        time.sleep(0.1)
        assert not trains and not told.is_set()
    assert told.wait(5) and is_locked(run)
    leave.set()
    for thread in both:
        thread.join()
    assert trains == [run] and not is_locked(run)


def test_health_of_kan_layers_is_logged_and_changes_nothing(run_config, metrics, losses):
    watched, plain = run_config("train.health_every=5"), run_config("name=plain", "model.ffn_type=swiglu")
    unwatched = run_config("name=unwatched", "train.health_every=1000")
    for config in (watched, plain, unwatched):
        loop.train(config)
    lines = metrics(watched)
    assert [line["step"] for line in lines if "kan_health" in line] == [5, 10]
    health = lines[4]
    assert 0 <= health["kan_outside_grid"] <= 1 and health["kan_nonfinite"] == 0
    assert health["kan_output_rms"] == max(layer["output_rms"] for layer in health["kan_health"].values())
    assert losses(watched) == losses(unwatched)
    assert not any("kan_health" in line for line in metrics(plain))


def test_bf16_on_cpu_trains_with_fp32_weights(run_config, losses):
    config, reference = run_config("train.mixed_precision=bf16"), run_config("name=fp32")
    assert loop.train(config).provenance["mixed_precision"] == "bf16"
    loop.train(reference)
    assert losses(config) != losses(reference)
    assert losses(config) == pytest.approx(losses(reference), rel=0.02)
    assert {weight.dtype for weight in load_model(config.run_dir)[1].values()} == {torch.float32}


def test_terminal_gets_a_bar_with_loss_speed_and_time_left(run_config, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    config = run_config("train.eval_every=4")
    loop.train(config)
    assert capsys.readouterr().out.rstrip().endswith(f"next: kanlm export {config.run_dir}")
    bar = terminal.getvalue().split("\r")[-1]
    assert (
        "12/12" in bar and "loss" in bar and "bits/byte" in bar and "tokens/s" in bar and "of peak" not in bar
    )
    middle = [line for line in terminal.getvalue().split("\r") if "6/12" in line][-1]
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", middle), middle  # time gone < time left


def test_sigterm_to_the_command_ends_it_with_status_zero(write_toml, run_config):
    """As a scheduler would: another process, a signal at some moment, the same command again."""
    settings = ("train.max_tokens=500_000", "train.zero_gradient_steps=0")
    path, config = write_toml(*settings), run_config(*settings)
    metrics_file = RunDir(config.run_dir).metrics
    command = [sys.executable, "-m", "kanlm", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (metrics_file.exists() and metrics_file.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "run the same command again to go on" in out
    record = json.loads(RunDir(config.run_dir).record.read_text())
    assert record["state"] == "interrupted" and 3 < record["step"] < record["total_steps"]
    assert RunDir(config.run_dir).checkpoint(record["step"]).is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_texts_are_tokenised_ends_the_command_with_status_zero(
    write_toml, run_config, tmp_path, number
):
    settings = ("data.max_documents=1_000_000", f"data.cache_dir={tmp_path / 'own cache'}")
    process = subprocess.Popen(
        [sys.executable, "-m", "kanlm", "train", str(write_toml(*settings))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "own cache").rglob("*.partial")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "before the first step; what is tokenised is kept; run the same command again to go on" in out
    assert not RunDir(run_config(*settings).run_dir).record.exists()


@pytest.mark.slow
def test_compiled_layers_learn_the_same(run_config, losses):
    plain, compiled = run_config(), run_config("name=compiled", "train.compile=true")
    loop.train(plain)
    torch._dynamo.utils.counters.clear()
    loop.train(compiled)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert load_model(compiled.run_dir)[1].keys() == load_model(plain.run_dir)[1].keys()


@pytest.mark.parametrize("key", ["optimizer", "kan_optimizer"])
def test_one_loss_scale_does_not_serve_two_optimisers(key, run_config, monkeypatch):
    state = SimpleNamespace(num_processes=1, device=torch.device("cuda"))
    monkeypatch.setattr(parallel, "PartialState", lambda **_: state)
    with pytest.raises(UserError, match=f"'fp16' does not go with train.{key} = 'muon'"):
        loop.train(run_config("train.mixed_precision=fp16", f"train.{key}=muon"))


def test_impossible_sizes_are_told_before_any_text_is_read(run_config, tmp_path):
    with pytest.raises(UserError, match="num_attention_heads"):
        loop.train(run_config("model.num_attention_heads=3", f"data.cache_dir={tmp_path / 'fresh'}"))
    assert not (tmp_path / "fresh").exists()


def test_gpu_without_bf16_is_told_so(run_config, monkeypatch):
    """A stand-in for a device that this machine lacks as well."""
    state = SimpleNamespace(num_processes=1, device=torch.device("cuda"))
    monkeypatch.setattr(parallel, "PartialState", lambda **_: state)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(UserError, match="train.mixed_precision: this GPU has no bf16; use 'fp16'"):
        loop.train(run_config("train.mixed_precision=bf16"))


def test_loss_that_runs_away_without_nan_stops_the_run(run_config):
    config = run_config("train.learning_rate=10", "train.max_tokens=12_800")
    with pytest.raises(Diverged, match=r"above 1.5 times ln\(vocabulary\) = 5.70"):
        loop.train(config)
    record = json.loads(RunDir(config.run_dir).record.read_text())
    assert (record["state"], record["failure_kind"]) == ("failed", "diverged") and record["step"] < 100


def test_last_step_is_one_line_and_a_closing_line_names_the_next_command(run_config, metrics, capsys):
    config = run_config("train.eval_tokens=1_000_000")
    whole = run_config("name=whole")
    whole = whole.model_copy(update={"train": whole.train.model_copy(update={"eval_tokens": None})})
    for each in (config, whole):
        record = loop.train(each)
        out = capsys.readouterr().out
        assert out.count("step 12/12") == 1
        assert out.splitlines()[-1].startswith("finished: 1,536 tokens in ")
        (above,) = re.findall(r"bits/byte, (\d\.\d+) above the text's entropy", out.splitlines()[-1])
        assert float(above) > 1  # of stories, whose entropy is below 0.2 bits/byte
        assert out.rstrip().endswith(f"next: kanlm export {each.run_dir}")
    assert metrics(whole)[-1]["validation_loss"] == record.final_validation["loss"]


def test_busy_machine_is_told_once():
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    idle, busy = BusyNotice(accelerator), BusyNotice(accelerator)
    assert not any(idle.step_done(5.0, 4.9) for _ in range(20))
    told = [busy.step_done(5.0, 2.0) for _ in range(20)]
    assert [line is not None for line in told] == [False] * 3 + [True] + [False] * 16
    assert "40% of the last 20 seconds" in told[3] and "train.num_threads" in told[3]


def test_functions_alone_train(run_config):
    config = run_config("train.trainable=functions")
    loop.train(config)
    architecture, after = load_model(config.run_dir)
    before = build(architecture, config.train, torch.device("cpu"), seed=config.seed).model
    start = before.state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, start[name])}
    assert changed == kan_coefficient_names(before)


def test_functions_alone_need_functions(run_config):
    with pytest.raises(UserError, match="train.trainable.*no learned function"):
        loop.train(run_config("model.ffn_type=swiglu", "train.trainable=functions"))


def test_run_that_knows_less_than_a_blind_guess_is_told():
    assert loop.blind_notice(5.6, 300) is None
    assert "held-out loss 5.80 is above ln(vocabulary) = 5.70" in (loop.blind_notice(5.8, 300) or "")
