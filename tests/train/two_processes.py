"""Run under `accelerate launch`: trains the runs of a JSON file one after the other in every process.

Arguments: the JSON file with a list of jobs {"table": run table, "interrupt_after": step or null, "masked":
bool} and the file that the main process writes its list of observations to. A line for each micro-batch that
process N has trained on goes to `batches-N` in the run's folder. For a masked job the labels of each
sequence end at a place that depends on the sequence alone, and the gradients of its first step are saved in
its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from kanlm.config import RunConfig, parse_table
from kanlm.data import TokenLoader
from kanlm.train import loop
from kanlm.train import step as train_step
from kanlm.train.batches import StepBatches


def mask_labels(batches):
    for batch in batches:
        ends = 4 + batch["input_ids"].sum(dim=1) % 27  # [B], 4 to 30 of 32 tokens are kept
        batch["labels"][torch.arange(batch["labels"].shape[1]) >= ends[:, None]] = -100
        yield batch


def train(job: dict) -> dict:
    config = parse_table(RunConfig, job["table"], "job")
    originals = loop.one_step, StepBatches.take, train_step.gradient_norm, TokenLoader.__iter__
    one_step, take, gradient_norm, batches = originals
    sessions = []

    def interrupting(session):
        sessions[:] = [session]
        if session.state.step + 1 == job.get("interrupt_after") and session.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # one process alone is asked to stop
        if session.state.step + 1 == job.get("die_at") and session.accelerator.process_index == 1:
            (config.run_dir / "died at").write_text(str(time.time()))
            if job["how"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("rank 1 dies here")
        return one_step(session)

    def noting(self):
        (session,) = sessions
        micro_batches, *more = take(self)
        with open(config.run_dir / f"batches-{session.accelerator.process_index}", "a") as file:
            for batch in micro_batches:
                digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
                file.write(f"{session.state.step} {digest}\n")
        return micro_batches, *more

    def saving(model):
        accelerator = sessions[0].accelerator
        path = config.run_dir / "gradients.safetensors"
        gradients = {}
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[name.removeprefix("module.")] = full.clone()
        if accelerator.is_main_process and not path.exists():
            save_file(gradients, path)
        return gradient_norm(model)

    loop.one_step, StepBatches.take = interrupting, noting
    if job.get("masked"):
        train_step.gradient_norm = saving
        TokenLoader.__iter__ = lambda self: mask_labels(batches(self))
    try:
        record = loop.train(config)
    finally:
        loop.one_step, StepBatches.take, train_step.gradient_norm, TokenLoader.__iter__ = originals
    return {
        "state": record.state,
        "step": record.step,
        "wrapper": record.provenance["wrapper"],
        "processes": record.provenance["processes"],
        "world_size": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "validation": record.final_validation,
    }


if __name__ == "__main__":
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    observed = []
    for job in jobs:
        observed.append(train(job))
        if torch.distributed.get_rank() == 0:
            out.write_text(json.dumps(observed))
    torch.distributed.destroy_process_group()
