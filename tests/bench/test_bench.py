"""The benchmarks: complete records, refusal of a red arm, ratios, and user mistakes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kanlm import kernels
from kanlm.bench import decode, layer, measure, reading, train
from kanlm.config import UserError
from kanlm.kernels.native import NativeUnavailable, library
from kanlm.model.configuration_kanlm import FFN_TYPES
from kanlm.model.kan import LearnedFunction


@pytest.fixture(autouse=True)
def quick_floor(monkeypatch, request):
    if "measured" not in request.node.name:
        monkeypatch.setattr(measure, "machine_floor", lambda *a: measure.Floor(1e11, 1e10))


def arm(name, tokens=10, baseline=None, step=lambda: None, **more):
    return measure.Arm(name, step, tokens, 5, baseline=baseline, **more)


def test_rounds_run_every_arm_once_a_round_in_a_turning_order():
    order = []
    arms = [arm(name, step=lambda name=name: order.append(name)) for name in "abc"]
    times = measure.rounds(arms, seconds=0.0, least=3)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order[6:]) == "abcbcacab"


def test_ratio_is_the_median_over_rounds_and_counts_tokens():
    arms = [arm("base", tokens=10), arm("half", tokens=5, baseline="base")]
    times = {"base": [1.0, 2.0, 8.0], "half": [1.0, 2.0, 1.0]}
    floor = measure.Floor(matmul_flops=1e9, copy_bytes=1e9)
    memory = {
        "base": {"peak_bytes": 100, "resting_bytes": 1},
        "half": {"peak_bytes": 150, "resting_bytes": 1},
    }
    record = measure.summary(arms, times, floor, memory)[1]
    assert record["speed_ratio"] == 0.5
    assert record["tokens_per_second"] == 5.0
    assert record["memory_ratio"] == 1.5


def test_floor_is_the_larger_of_work_and_traffic():
    floor = measure.Floor(matmul_flops=1e9, copy_bytes=1e8)
    assert floor.seconds(arm("x", flops=2e9, least_bytes=1e8)) == 2.0
    assert floor.seconds(arm("x", flops=1e9, least_bytes=3e8)) == 3.0


def test_machine_floor_is_measured():
    floor = measure.machine_floor()
    assert 1e9 < floor.matmul_flops < 1e15 and 1e8 < floor.copy_bytes < 1e14


@pytest.mark.slow
def test_peak_memory_sees_a_buffer_of_known_size():
    measured = measure.peak_memory(_arm_with_buffer, 64)
    if measured is None:
        pytest.skip("no /proc/self/clear_refs")
    extra = measured["peak_bytes"] - measured["resting_bytes"]
    assert 60 * 2**20 < extra < 80 * 2**20


def _arm_with_buffer(mebibytes):
    return measure.Arm("buffer", lambda: torch.ones(mebibytes * 2**18).sum().item(), 1, 0)


def test_layer_benchmark_writes_a_complete_record(tmp_path):
    lines = []
    out = tmp_path / "layer.json"
    records = layer.run(
        inputs=8, outputs=6, tokens=32, arms=("mlp", "kanlm reference"), seconds=0.0, memory=False,
        out=str(out), echo=lines.append,
    )  # fmt: skip
    saved = json.loads(out.read_text())
    assert saved["arms"] == records and saved["settings"]["tokens"] == 32
    assert {"date", "versions", "hardware", "machine_floor"} <= saved.keys()
    mlp, ours = records
    assert mlp["speed_ratio"] == 1.0 and ours["baseline"] == "mlp" and ours["seconds"] > 0
    assert abs(mlp["parameters"] / ours["parameters"] - 1) < 0.1
    assert any("kanlm reference" in line for line in lines)


def test_results_go_to_runs_and_not_into_docs(tmp_path, monkeypatch):
    (tmp_path / "docs/benchmarks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    lines = []
    layer.run(
        inputs=8, outputs=6, tokens=32, arms=("mlp",), seconds=0.0, memory=False, echo=lines.append
    )  # fmt: skip
    (written,) = (path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert written.match("runs/benchmarks/????-??-??-layer.json") and lines[-1] == f"written to {written}"


@pytest.mark.slow
def test_gpu_benchmark_goes_through_every_part_without_a_gpu(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    script = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"
    result = subprocess.run(
        [sys.executable, script, "--dry-run", "--out", tmp_path / "gpu.json"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    written = json.loads((tmp_path / "gpu.json").read_text())
    parts = written["parts"]
    assert written["left_out"] == []
    assert parts["tests"]["passed"] and parts["gate"].keys() >= {"cubic", "linear", "rational"}
    for name in ("kan_act_norm", "kan_glu", "kan_product_norm", "kan_mixed"):
        _, record = parts[f"training {name}"]
        assert (record["arm"], record["kernels"]) == (name, "triton")
    assert [record["arm"] for record in parts["compiled kan_act_norm"]] == ["gelu_norm", "kan_act_norm"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_gpu_benchmark_that_is_out_of_time_says_what_it_left_out(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"
    result = subprocess.run(
        [sys.executable, script, "--dry-run", "--seconds", "0", "--out", tmp_path / "gpu.json"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1 and result.stdout.startswith(
        "out of time before tests, training kan_act_norm"
    )
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["parts"] == {} and written["left_out"][-1] == "training kan_glu_linear"


def test_absent_peer_is_skipped_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(layer.PEERS, "pykan", ("no_such_package", layer._pykan, None))
    lines = []
    arms = ("mlp", "pykan")
    records = layer.run(
        inputs=8, outputs=6, tokens=32, arms=arms, seconds=0.0, memory=False, out=str(tmp_path / "x.json"),
        echo=lines.append,
    )  # fmt: skip
    assert [record["arm"] for record in records] == ["mlp"]
    (line,) = (line for line in lines if line.startswith("skipped pykan"))
    assert "package no_such_package is not installed (pip install 'kanlm[bench]'" in line


def test_red_arm_is_not_timed(tmp_path, monkeypatch):
    """A kernel that is wrong by a percent must not appear in the table."""
    try:
        library()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    right = kernels.cpu.edge
    monkeypatch.setattr(kernels.cpu, "edge", lambda module, x: 1.01 * right(module, x))
    lines = []
    records = layer.run(
        inputs=8, outputs=6, tokens=32, arms=("mlp", "kanlm"), backend="cpu", seconds=0.0, memory=False,
        out=str(tmp_path / "x.json"), echo=lines.append,
    )  # fmt: skip
    assert [record["arm"] for record in records] == ["mlp"]
    assert any("parity is red" in line for line in lines)


@pytest.mark.parametrize(
    ("module", "place"), [(train, "last layer"), (train, "gradient"), (decode, "last layer")]
)  # decoding has no gradients
def test_parity_is_of_the_whole_model(module, place, tmp_path, monkeypatch):
    """A kernel that is wrong only in the last layer, or only in its gradient, is not timed."""
    try:
        library()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setitem(train.SIZES, "tiny", (128, 344, 2, 2, 1, 16))
    right_select, right = kernels.select, kernels.cpu.learned

    def wrong(layer, a, u):
        y = right(layer, a, u)
        return 1.01 * y if place == "last layer" else 1.01 * y - 0.01 * y.detach()

    def select(model, backend="auto", **settings):
        chosen = right_select(model, backend, **settings)
        learned = [layer for layer in model.modules() if isinstance(layer, LearnedFunction)]
        if backend == "cpu" and learned:
            learned[-1].kernel = wrong
        return chosen

    monkeypatch.setattr(kernels, "select", select)
    lines = []
    records = module.run(
        "tiny", ("swiglu", "kan_glu"), backend="cpu", seconds=0.0, memory=False,
        out=str(tmp_path / "out.json"), echo=lines.append,
        **({"paths": ("eager",)} if module is decode else {}),
    )  # fmt: skip
    assert [record["arm"].split()[0] for record in records] == ["swiglu"]
    assert any(line.startswith("skipped kan_glu") and "parity is red" in line for line in lines)


def test_piecewise_linear_arm_is_judged_by_its_best_batch(monkeypatch):
    """A batch with an input at a knot is no verdict; an error in every batch is, and smooth arms get one."""
    errors = iter([0.04, 0.004, 1e-6])
    monkeypatch.setattr(train, "parity_error", lambda model, ids: next(errors))
    monkeypatch.setitem(train.SIZES, "tiny", (128, 344, 2, 2, 1, 16))
    assert train.arm_parity("kan_glu_linear", "tiny", "reference") == 1e-6
    seen = []
    monkeypatch.setattr(train, "parity_error", lambda model, ids: seen.append(ids) or 0.04)
    assert train.arm_parity("kan_glu_linear", "tiny", "reference") == 0.04
    assert len(seen) == train.BATCHES_AT_KNOTS
    assert all(not torch.equal(one, other) for one, other in zip(seen, seen[1:], strict=False))
    seen.clear()
    assert train.arm_parity("kan_glu", "tiny", "reference") == 0.04
    assert len(seen) == 1


def test_training_arms_have_equally_many_parameters():
    for size in train.SIZES:
        counts = {
            name: train.parameter_counts(train.architecture(name, size)).non_embedding for name in train.ARMS
        }
        smallest, largest = min(counts.values()), max(counts.values())
        assert largest / smallest - 1 < 0.01, (size, counts)


def test_training_benchmark_writes_records(tmp_path, monkeypatch):
    monkeypatch.setitem(train.SIZES, "tiny", (128, 344, 1, 2, 1, 16))
    out = tmp_path / "out.json"
    records = train.run(
        "tiny", ("swiglu", "kan_glu"), seconds=0.0, memory=False, out=str(out), echo=lambda line: None
    )
    assert [record["arm"] for record in records] == ["swiglu", "kan_glu"]
    assert records[1]["baseline"] == "swiglu" and records[1]["speed_ratio"] > 0
    assert 0 < records[1]["optimizer_share"] < 1
    assert json.loads(out.read_text())["benchmark"] == "train-tiny"


def test_compiled_arms_are_measured_against_themselves(tmp_path, monkeypatch):
    monkeypatch.setitem(train.SIZES, "tiny", (128, 344, 1, 2, 1, 16))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)  # what it gives is tested elsewhere
    monkeypatch.setattr(train, "passing", lambda names, *settings: (names, {}))  # and so is this
    records = train.run(
        "tiny", ("swiglu", "kan_glu"), compiled=True, seconds=0.0, memory=False,
        out=str(tmp_path / "out.json"), echo=lambda line: None,
    )  # fmt: skip
    assert [(record["arm"], record["baseline"]) for record in records] == [
        ("swiglu", "swiglu"), ("kan_glu", "swiglu"),
        ("swiglu compiled", "swiglu"), ("kan_glu compiled", "kan_glu"),
    ]  # fmt: skip


def test_reading_benchmark_counts_the_tokens_it_reads(tmp_path, monkeypatch):
    try:
        library()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setitem(train.SIZES, "tiny", (64, 96, 1, 2, 2, 32))
    scored = []
    right = reading.score
    monkeypatch.setattr(reading, "score", lambda *a, **k: scored.append(right(*a, **k)) or scored[-1])
    records = reading.run(
        "tiny", ("kan_act_norm",), seconds=0.0, out=str(tmp_path / "out.json"), echo=lambda line: None
    )
    found = {record["arm"].split()[1]: record for record in records}
    assert found["eval"]["tokens"] == scored[0].tokens and 0 < scored[0].nll_nats
    assert found["forward"]["tokens"] == 64 and found["prefill"]["tokens"] == found["row"]["tokens"] == 31
    assert found["eval"]["baseline"] == "kan_act_norm forward"
    with pytest.raises(UserError, match="--device"):
        reading.run("tiny", device="cuda")


def test_decoding_benchmark_compares_the_paths(tmp_path, monkeypatch):
    try:
        library()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setitem(train.SIZES, "tiny", (64, 96, 1, 2, 1, 64))
    monkeypatch.setattr(decode, "NEW", 2)
    records = decode.run(
        "tiny", ("swiglu", "kan_glu"), paths=("native", "eager", "int8", "llama"), seconds=0.0,
        out=str(tmp_path / "out.json"), echo=lambda line: None,
    )  # fmt: skip
    found = {record["arm"]: record for record in records}
    both = ("swiglu", "kan_glu")
    paths = ("", " eager", " int8")
    assert list(found) == [*(name + path for path in paths for name in both), "swiglu llama"]
    exact = [record["logits_error"] for name, record in found.items() if "int8" not in name]
    assert max(exact) < 1e-4 < found["swiglu int8"]["logits_error"] < 0.1
    assert found["swiglu int8"]["weight_error"] < 0.02
    assert found["kan_glu eager"]["baseline"] == "swiglu eager"
    assert found["swiglu llama"]["baseline"] == found["swiglu int8"]["baseline"] == "swiglu"


def test_a_new_arm_is_compared_with_the_mlp_of_the_same_norm():
    for name, (baseline, _, fields) in train.ARMS.items():
        assert train.ARMS[baseline][2].get("hidden_norm", False) == fields.get("hidden_norm", False), name
    assert {ffn_type for _, ffn_type, _ in train.ARMS.values()} == set(FFN_TYPES)


@pytest.mark.parametrize(
    "call, fault",
    [
        (lambda: layer.run(arms=("nope",)), "--arm"),
        (lambda: layer.run(tokens=0), "--tokens"),
        (lambda: train.run("huge"), "--size"),
        (lambda: train.run("1m", ("nope",)), "--arm"),
        (lambda: decode.run("1m", device="tpu"), "--device"),
        (lambda: train.run("1m", ("kan",), backend="fast"), "kernels"),
    ],
)
def test_mistakes_are_one_line(call, fault):
    with pytest.raises(UserError, match=fault) as error:
        call()
    assert "\n" not in str(error.value)
