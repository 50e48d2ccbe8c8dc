"""Trains the trials of a study and judges them on its texts."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from kanlm import kernels
from kanlm.config import RunConfig, UserError, did_you_mean
from kanlm.data import tokenizer_for
from kanlm.data.cache import TokenCache, ensure_cache
from kanlm.data.corpus import split_sources
from kanlm.evaluation.last_word import read_passages, score_words
from kanlm.evaluation.minimal_pairs import read_pairs, score_pairs
from kanlm.evaluation.perplexity import stream_blocks, token_nll
from kanlm.export import export_model, model_of
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.basis import INITIAL_FUNCTIONS
from kanlm.model.learned_function import LearnedFunction
from kanlm.runs import RunDir, provenance
from kanlm.sizing import architecture, parameter_counts
from kanlm.study.ideas import changed_steps
from kanlm.study.plan import AVERAGED, ROOT, SEGMENTS, SEPARATOR, StudyFolder, key_of, name_of, run_config
from kanlm.train.checkpoint import load_model
from kanlm.train.loop import train

PAIRS_EACH, LAST_WORDS = 100, 1_000
"""Zero-shot questions: pairs of each of BLiMP's 67 paradigms, passages of LAMBADA."""


def run(study: StudyFolder, phases: tuple[str, ...]) -> None:
    """Train the planned trials that are not done yet, the plan's first ones first.

    May run in several processes at once, one thread each: a trial is taken by one of them. A trial that was
    interrupted is trained on from its checkpoint.
    """
    check(study, phases)
    torch.set_num_threads(1)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    (ROOT / "locks").mkdir(parents=True, exist_ok=True)
    study.path.mkdir(parents=True, exist_ok=True)
    while True:
        done = study.done()
        for trial in study.trials_of(phases):  # read anew each time: the plan may have grown
            if is_done(trial, done):
                continue
            lock = FileLock(ROOT / "locks" / name_of(trial))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                if is_done(trial, study.done()):
                    continue
                result = train_and_judge(trial)
                with FileLock(f"{ROOT}/results.lock"):
                    add_line(study.trials, json.dumps(result))
            finally:
                lock.release()
            break
        else:
            return


def run_at_once(jobs: int, study: StudyFolder, phases: tuple[str, ...]) -> None:
    """`run` in so many processes; raises where one of them ends in an error, once all have ended."""
    check(study, phases)
    command = [sys.executable, "-m", "kanlm", "study", "run", "--folder", str(study.path), *phases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, env=environment) for _ in range(jobs)]
    if failed := sum(worker.wait() != 0 for worker in workers):
        raise UserError(f"study: {failed} of {jobs} processes failed, each said why; run again to go on")


def is_done(trial: dict[str, Any], done: dict[str, dict[str, Any]]) -> bool:
    """A trial that a search left is done for a phase that is judged once it has a test loss."""
    row = done.get(key_of(trial))
    return row is not None and (trial.get("role") != "final" or "test" in row or row["state"] == "diverged")


def add_line(path: Path, line: str) -> None:
    """After a line that was cut off, too, which would make one of both."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def check(study: StudyFolder, phases: tuple[str, ...]) -> None:
    """Raises `UserError` for a mistake in a trial that is left to do, before any is trained."""
    done = study.done()
    trials = [trial for trial in study.trials_of(phases) if not is_done(trial, done)]
    print(f"{study.plan}: {len(trials)} trials to do, results in {study.trials}", file=sys.stderr)
    for corpus in dict.fromkeys(trial["corpus"] for trial in trials):
        for split in ("train", "valid", "test"):
            if not (path := ROOT / "data" / f"{corpus}.{split}.txt").is_file():
                raise UserError(
                    f"{path}: no such file; `kanlm study prepare` writes the shipped study's texts, a text "
                    f"of your own is three files, its documents apart by lines {SEPARATOR!r}"
                )
    for trial in trials:
        if "learning_rate" not in trial:
            raise UserError(f"{study.plan}: arm {trial['arm']}: learning_rate: required, but absent; add it")
        if trial.get("start", "gelu") not in INITIAL_FUNCTIONS:
            known = did_you_mean(trial["start"], list(INITIAL_FUNCTIONS))
            raise UserError(
                f"{study.plan}: arm {trial['arm']}: start: no function {trial['start']!r}; {known}"
            )
        try:
            run_config(trial)
        except Exception as error:  # what the architecture refuses, by whichever type of error
            reason = " ".join(str(error).split())
            raise UserError(f"{study.plan}: trial {key_of(trial)}: {reason}") from None
        if trial.get("zero_shot"):
            for name in ("blimp", "lambada"):
                if not (path := ROOT / "data" / f"{name}.jsonl.xz").is_file():
                    raise UserError(
                        f"{path}: no such file, which zero_shot needs; `kanlm study prepare` writes it"
                    )


@cache
def made_by() -> dict[str, Any]:
    """Versions, git state and hardware, as the first trial of this process found them."""
    return {key: value for key, value in provenance().items() if key != "date"}


def train_and_judge(trial: dict[str, Any]) -> dict[str, Any]:
    config = run_config(trial)
    if "functions_of" in trial:
        config = begun_with_functions(trial, config)
    if "waves" in trial:
        config = begun_with_waves(trial, config)
    if "start" in trial:
        config = begun_as(trial, config)
    result: dict[str, Any] = {"key": key_of(trial), **trial, "made_by": made_by()}
    print(key_of(trial), flush=True)
    try:
        with changed_steps(trial):
            record = train(config)
    except Exception as error:
        if type(error).__name__ != "Diverged":
            raise
        shutil.rmtree(config.run_dir, ignore_errors=True)
        return {**result, "state": "diverged", "reason": str(error)}
    assert record.state == "finished", record.state
    tokenizer = tokenizer_for(config)
    model = trained_model(config)
    architecture = model.config
    counts = parameter_counts(architecture)
    result |= {
        "state": "finished",
        "intermediate_size": architecture.intermediate_size,
        "non_embedding_parameters": counts.non_embedding,
        "train_loss": last_train_loss(config),
        "seconds": round(record.seconds, 2),
    }
    assert record.final_validation is not None
    result["valid"] = record.final_validation["loss"]
    if trial.get("role") == "final":
        cache = text_cache(config, tokenizer, "test")
        sums = segment_nll(model, cache)
        result["test"] = sums.sum() / (len(cache) - 1)
        result["test_bits_per_byte"] = sums.sum() / cache.manifest["bytes"] / math.log(2)
        result["test_segments"] = [round(float(s), 2) for s in sums]
        result |= zero_shot(model, tokenizer) if trial.get("zero_shot") else {}
        result["test_averaged"] = mean_nll(averaged_model(config), cache)
        functions = [module for module in model.modules() if isinstance(module, LearnedFunction)]
        if functions:
            for module in functions:
                module.reset_parameters()
            kernels.select(model)
            result["test_with_initial_functions"] = segment_nll(model, cache).sum() / (len(cache) - 1)
    if not trial.get("keep"):
        shutil.rmtree(config.run_dir, ignore_errors=True)
    print(f"  valid {result['valid']:.4f}  {result['seconds']:.0f} s", flush=True)
    return result


def begun_with_functions(trial: dict[str, Any], config: RunConfig) -> RunConfig:
    """The run of `config`, its functions begun at the shapes of the kept run of seed `functions_of`.

    All other weights are the draws of the trial's own seed.
    """
    own = {key: value for key, value in trial.items() if key not in ("functions_of", "frozen")}
    learned = {**own, "seed": trial["functions_of"], "keep": True, "zero_shot": True}
    if trial.get("frozen"):
        learned["kan_learning_rate"] = trial["frozen"]  # at which they were learned
    source = run_config(learned)
    train(source)  # a run that is finished stays as it is
    return begun_at(trial, config, coefficients_of(trained_model(source)))


def begun_with_waves(trial: dict[str, Any], config: RunConfig) -> RunConfig:
    """The run of `config`, the first `waves` functions of each layer begun as `gelu_wave`."""
    torch.manual_seed(trial["seed"])
    model = KanLMForCausalLM(architecture(config))
    waves = KanLMForCausalLM(KanLMConfig(**{**model.config.to_dict(), "kan_initial": "gelu_wave"}))
    shapes, count = coefficients_of(model), trial["waves"]
    for name, value in coefficients_of(waves).items():
        shapes[name] = torch.cat((value[:count], shapes[name][count:]))
    return begun_at(trial, config, shapes)


def begun_as(trial: dict[str, Any], config: RunConfig) -> RunConfig:
    """The run of `config`, all functions begun as the trial's `start`, one of INITIAL_FUNCTIONS."""
    model = KanLMForCausalLM(architecture(config))
    for module in model.modules():
        if isinstance(module, LearnedFunction):
            module.initial = trial["start"]
            module.reset_parameters()
    return begun_at(trial, config, coefficients_of(model))


def coefficients_of(model: KanLMForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.endswith("coefficients")}


def begun_at(trial: dict[str, Any], config: RunConfig, shapes: dict[str, torch.Tensor]) -> RunConfig:
    """The run of `config` from its own draws but for the coefficients, which are `shapes`."""
    torch.manual_seed(trial["seed"])
    model, tokenizer = KanLMForCausalLM(architecture(config)), tokenizer_for(config)
    model.load_state_dict({**model.state_dict(), **shapes})
    folder = ROOT / "begun" / name_of(trial)
    shutil.rmtree(folder, ignore_errors=True)
    export_model(model, tokenizer, folder, {"name": name_of(trial)})
    return config.model_copy(update={"init_from": str(folder), "model": {}})


def trained_model(config: RunConfig) -> KanLMForCausalLM:
    """The model of the run's newest checkpoint, with the fastest kernels."""
    model = model_of(*load_model(config.run_dir))
    kernels.select(model)
    return model


def averaged_model(config: RunConfig) -> KanLMForCausalLM:
    """The mean weights of the run's last checkpoints (LAWA, Kaddour 2022)."""
    folders = RunDir(config.run_dir).checkpoint_folders()[-AVERAGED:]
    model = model_of(*load_model(config.run_dir))
    states = [load_file(folder / "model.safetensors") for folder in folders]
    mean_state = {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}
    missing, unexpected = model.load_state_dict(mean_state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    kernels.select(model)
    return model


def last_train_loss(config: RunConfig) -> float:
    """Mean of the last tenth of the logged training losses, nats/token."""
    rows = [json.loads(line) for line in RunDir(config.run_dir).metrics.read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def text_cache(config: RunConfig, tokenizer: Any, split: str) -> TokenCache:
    source = str(config.data.validation_source).replace(".valid.", f".{split}.")
    other = config.model_copy(update={"data": config.data.model_copy(update={"validation_source": source})})
    return ensure_cache(split_sources(other.data, "validation"), other, tokenizer, "validation")


@torch.no_grad()
def segment_nll(model: torch.nn.Module, cache: TokenCache, block_size: int = 128) -> np.ndarray:
    """Summed nats of SEGMENTS equal parts of the text, each block scored by itself, [SEGMENTS]."""
    targets = len(cache) - 1
    starts = range(0, targets, block_size)
    sums = np.zeros(SEGMENTS)
    for i in range(0, len(starts), 32):
        batch = starts[i : i + 32]
        inputs, labels, _ = stream_blocks(cache, batch, block_size, targets, True)
        nll = token_nll(model(input_ids=inputs, use_cache=False).logits, labels)
        for start, row in zip(batch, nll, strict=True):
            sums[start * SEGMENTS // targets] += float(row.double().sum())
    return sums


def mean_nll(model: torch.nn.Module, cache: TokenCache) -> float:
    """Nats/token of the whole text."""
    return float(segment_nll(model, cache).sum() / (len(cache) - 1))


def zero_shot(model: torch.nn.Module, tokenizer: Any) -> dict[str, Any]:
    """BLiMP by phenomenon and LAMBADA's last words, on the first questions of each file."""
    pairs = score_pairs(model, tokenizer, read_pairs(ROOT / "data" / "blimp.jsonl.xz", PAIRS_EACH))
    passages = itertools.islice(read_passages(ROOT / "data" / "lambada.jsonl.xz"), LAST_WORDS)
    words = score_words(model, tokenizer, passages)
    return {
        "blimp": pairs.accuracy,
        "blimp_phenomena": {name: round(share.share, 5) for name, share in pairs.phenomena.items()},
        "lambada_accuracy": words.accuracy.share,
        "lambada_nats": words.nats_per_word,
    }
