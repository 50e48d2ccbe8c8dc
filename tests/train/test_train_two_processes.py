"""Two CPU processes over gloo, launched as the README says, DDP and FSDP2, against one process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kanlm.config import RunConfig, parse_table
from kanlm.export import export
from kanlm.runs import RunDir
from kanlm.train import loop
from kanlm.train.checkpoint import load_model
from kanlm.train.lock import is_locked

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("two_processes.py")
CONFIGS = ROOT / "configs" / "accelerate"
PROCESSES = {
    "one-gpu": 1,
    "8-gpus-ddp": 8,
    "8-gpus-fsdp2": 8,
    "2x8-gpus": 16,
    "2-cpus-ddp": 2,
    "2-cpus-fsdp2": 2,
}


def launch(config: str, *arguments: str, port: int) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)),
        *("--main_process_port", str(port), *arguments),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def worker():
    """The worker's functions, to train a masked job in this process."""
    spec = importlib.util.spec_from_file_location("two_processes", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MASKED = "train.max_tokens=256", "train.batch_size=8"
"""One step of eight sequences."""


def jobs_of(table, kind: str) -> list[dict]:
    end = "dies" if kind == "ddp" else "killed"
    dying = [{"table": table(f"name={end}"), "die_at": 3, "how": end}]
    return [
        {"table": table(f"name={kind}")},
        {"table": table(f"name={kind}-accumulated", "train.micro_batch_size=1", "train.save_minutes=1e-9")},
        {"table": table(f"name={kind}-masked", *MASKED), "masked": True},
        {"table": table(f"name={kind}-interrupted", "train.optimizer=muon"), "interrupt_after": 5},
        {"table": table(f"name={kind}-interrupted", "train.optimizer=muon")},
        {"table": table(f"name={kind}-muon", "train.optimizer=muon")},
        {"table": table(f"name={kind}-begun"), "interrupt_after": 5},
        {"table": table("name=begun-by-one")},
        *dying,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(
    kind, run_table, run_config, tmp_path, losses, worker, monkeypatch, free_port
):
    alone = run_config("name=alone")
    loop.train(alone)
    muon = run_config("name=alone-muon", "train.optimizer=muon")
    loop.train(muon)
    masked = {"table": run_table("name=alone-masked", *MASKED), "masked": True}
    worker.train(masked)
    in_parts = {"table": run_table("name=alone-in-parts", *MASKED, "train.micro_batch_size=4")}
    in_parts["masked"] = True
    worker.train(in_parts)
    with monkeypatch.context() as patch:
        begun = run_config("name=begun-by-one")
        real = loop.one_step

        def stop_after_7(session):
            session.stop_signal.received = 15 if session.state.step == 6 else None
            return real(session)

        patch.setattr(loop, "one_step", stop_after_7)
        assert loop.train(begun).state == "interrupted"

    jobs, out = tmp_path / "jobs.json", tmp_path / "observed.json"
    jobs.write_text(json.dumps(jobs_of(run_table, kind)))
    ran = launch(f"2-cpus-{kind}.yaml", str(WORKER), str(jobs), str(out), port=free_port)
    ended = time.time()
    # The last job ends with the death of rank 1, which ends rank 0 and is shown.
    assert ran.returncode != 0 and ("rank 1 dies here" if kind == "ddp" else "SIGKILL") in ran.stderr
    (died_at,) = (tmp_path / "runs").glob("*/died at")
    assert ended - float(died_at.read_text()) < 60
    assert not is_locked(RunDir(died_at.parent))
    observed = json.loads(out.read_text())
    assert ("kan_health is left out" in ran.stdout) == (kind == "fsdp2")

    assert {(job["world_size"], job["processes"], job["wrapper"]) for job in observed} == {(2, 2, kind)}
    finished = [("finished", 12)] * 2 + [("finished", 1), ("interrupted", 5), ("finished", 12)]
    finished += [("finished", 12), ("interrupted", 5), ("finished", 12)]
    assert [(job["state"], job["step"]) for job in observed] == finished

    for name in (kind, f"{kind}-accumulated", "begun-by-one"):
        assert losses(run_config(f"name={name}")) == pytest.approx(losses(alone), rel=2e-5), name
    assert losses(run_config(f"name={kind}-interrupted")) == pytest.approx(losses(muon), rel=2e-3)
    # two processes that were interrupted do, bit for bit, what two that were not do
    stopped, straight = run_config(f"name={kind}-interrupted"), run_config(f"name={kind}-muon")
    assert losses(stopped) == losses(straight)
    seen = [(straight.run_dir / f"batches-{rank}").read_text() for rank in (0, 1)]
    assert [(stopped.run_dir / f"batches-{rank}").read_text() for rank in (0, 1)] == seen
    assert len({*seen[0].split("\n"), *seen[1].split("\n")}) == 25  # 12 steps of 2, and the end
    weights = [load_model(config.run_dir)[1] for config in (stopped, straight)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
    record = json.loads((alone.run_dir / "run.json").read_text())
    assert observed[0]["validation"] == pytest.approx(record["final_validation"], rel=1e-5)

    # the checkpoint of two processes goes on in one
    begun_by_two = run_config(f"name={kind}-begun")
    assert loop.train(begun_by_two).state == "finished"
    assert losses(begun_by_two) == pytest.approx(losses(alone), rel=2e-5)

    # and has the names, shapes and, to rounding, the values of a single process
    expected, found = load_model(alone.run_dir), load_model(run_config(f"name={kind}").run_dir)
    assert found[0].to_dict() == expected[0].to_dict()
    assert found[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-3, atol=1e-4, msg=name)

    # and so has its export
    if kind == "fsdp2":
        one, two = export(alone.run_dir), export(run_config(f"name={kind}").run_dir)
        files = {path.name for path in one.iterdir()}
        assert {path.name for path in two.iterdir()} == files and "model.safetensors" in files
        for name in files - {"model.safetensors", "README.md", "SHA256SUMS"}:
            assert (two / name).read_bytes() == (one / name).read_bytes(), name

    # gradients of sequences with unequal numbers of targets: 1 process x 8 = 2 processes x 4 = 2 parts x 4
    single = load_file(parse_table(RunConfig, masked["table"], "job").run_dir / "gradients.safetensors")
    for other in (f"{kind}-masked", "alone-in-parts"):
        found = load_file(run_config(f"name={other}").run_dir / "gradients.safetensors")
        assert single.keys() == found.keys()
        for name, gradient in single.items():
            assert gradient.abs().max() > 0, name
            limit = 2e-6 * max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=limit, msg=f"{other} {name}")


def test_documented_launch_of_two_machines_uses_torchruns_rendezvous():
    """accelerate ignores the rendezvous of a config file, so it stands in the command."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    text = (CONFIGS / "2x8-gpus.yaml").read_text()
    command = " ".join(line.removeprefix("#").rstrip(" \\") for line in text.splitlines()[1:3])
    given = command.replace("configs/accelerate", str(CONFIGS)).replace("RANK", "1").split()[2:]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert (arguments.rdzv_backend, arguments.num_machines, arguments.num_processes) == ("c10d", 2, 16)
    assert (arguments.machine_rank, arguments.main_process_ip) == (1, "FIRST_HOST")
    assert not {"rdzv_backend", "same_network"} & yaml.safe_load(text).keys()
    assert "--rdzv_backend c10d" in (ROOT / "scripts" / "slurm-2x8.sh").read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_launch_configs_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == PROCESSES[path.stem]
    assert ("fsdp" in path.stem) == (yaml.safe_load(path.read_text()).get("fsdp_config") is not None)


def test_slurm_script_is_valid_shell_and_wants_a_config():
    script = ROOT / "scripts" / "slurm-2x8.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    ran = subprocess.run(["bash", script], capture_output=True, text=True)
    assert ran.returncode == 2 and "usage: sbatch" in ran.stderr
