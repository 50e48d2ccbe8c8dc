"""A tiny run on the generated stories; tokenizer and tokens are made once for all tests."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from kanlm.config import RunConfig, parse_table, with_overrides
from kanlm.train import loop
from kanlm.train import step as train_step
from kanlm.train.session import Session


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run_table(tmp_path, cache_dir):
    """The table of a run of 12 steps of 4 x 32 tokens below `tmp_path`; overrides as on the command line."""

    def table(*overrides: str) -> dict:
        base = {
            "name": "tiny",
            "output_dir": str(tmp_path / "runs"),
            "seed": 1,
            "data_seed": 2,
            "model": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "ffn_type": "kan_glu",
            },
            "tokenizer": {"vocab_size": 300},
            "data": {
                "source": "stories",
                "block_size": 32,
                "max_documents": 150,
                "cache_dir": str(cache_dir),
                "num_workers": 1,
            },
            "train": {
                "max_tokens": 12 * 4 * 32,
                "batch_size": 4,
                "learning_rate": 0.01,
                "log_every": 1,
                "eval_tokens": 256,
                "kernels": "reference",
                "zero_gradient_steps": 5,
            },
        }
        return with_overrides(base, overrides)

    return table


@pytest.fixture
def run_config(run_table):
    def config(*overrides: str) -> RunConfig:
        return parse_table(RunConfig, run_table(*overrides), "test")

    return config


@pytest.fixture
def write_toml(run_table, tmp_path):
    """The run's table as a TOML file, for the command line."""

    def write(*overrides: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(toml(run_table(*overrides)))
        return path

    return write


@pytest.fixture
def free_port() -> int:
    """A port for a launcher, that no other run of the tests has, below those that the system gives out."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("no free port")


def toml(table: dict) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{name} = {json.dumps(item)}" for name, item in value.items())]
    return "\n".join(lines) + "\n"


@pytest.fixture
def metrics():
    def read(config: RunConfig) -> list[dict]:
        return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def losses(metrics):
    """Loss of every logged step of a run, exactly as written."""

    def read(config: RunConfig) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in metrics(config) if "loss" in line}

    return read


@pytest.fixture
def after_backward(monkeypatch):
    """Install `act(session)` between the backward pass and the gradient norm of every step."""

    def install(act: Callable[[Session], object]) -> None:
        one_step, gradient_norm, sessions = loop.one_step, train_step.gradient_norm, []

        def noting(session):
            sessions[:] = [session]
            return one_step(session)

        def acting(model):
            act(sessions[0])
            return gradient_norm(model)

        monkeypatch.setattr(loop, "one_step", noting)
        monkeypatch.setattr(train_step, "gradient_norm", acting)

    return install


@pytest.fixture
def interrupt_after(after_backward):
    """Make the process send itself a signal while it does a given step."""

    def install(step: int, number: int = signal.SIGTERM) -> None:
        def signalling(session):
            if session.state.step == step - 1:
                os.kill(os.getpid(), number)

        after_backward(signalling)

    return install
