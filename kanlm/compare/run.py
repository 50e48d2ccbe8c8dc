"""Run a comparison: plan, sweep, train each arm and seed in a process of its own, export, evaluate, report.

Every stage leaves an artifact and is skipped where its artifact is there, so that the same command goes on
where it stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from kanlm.compare.artifacts import CompareDir, TrialDir, load, state_of
from kanlm.compare.plan import final_trials, planned_arms, sweep_trials, toml_text, trial_config
from kanlm.compare.report import report, summary
from kanlm.compare.schema import CompareConfig, PlannedArm, Trial, load_compare_config, run_config
from kanlm.compare.speed import measured_speed
from kanlm.compare.tracking import track_outcome
from kanlm.config import RunConfig, UserError
from kanlm.data import TokenLoader, documents, text_documents, token_cache, tokenizer_for
from kanlm.evaluation.baselines import kneser_ney_by_order, xz_bits_per_byte
from kanlm.evaluation.loading import load_causal_lm
from kanlm.evaluation.perplexity import evaluate_model
from kanlm.export import export, update_card
from kanlm.interpret.functions import learned_functions
from kanlm.runs import provenance, read_json, write_json, write_text
from kanlm.train.status import held

FAILURE_LINES = 40
"""Last lines of a dead training process that are kept; the launcher adds a traceback of its own to them."""
MISTAKE = "kanlm: error: "
"""What a training process writes before the one line that says what its user can mend."""


def compare(toml_path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Path:
    """Do the comparison that `toml_path` describes and return the path of its report.html.

    UserError for mistakes in the file, and where the folder holds runs of another configuration. A training
    process that dies is shown in the report; the comparison goes on and tries it again when it is called
    again.
    """
    started = time.perf_counter()
    disable_progress_bar()
    config = load_compare_config(toml_path, overrides)
    directory = CompareDir(config.directory)
    base = run_config(config, config.sizes[0], {}, str(toml_path))
    say(f"comparison {config.name}: {', '.join(arm.name for arm in config.arms)} in {directory.root}/")
    tokenizer = tokenizer_for(base)
    vocab_size = len(tokenizer)
    arms = planned_arms(config, vocab_size)
    for arm in arms:
        say(
            f"  {arm.arm}: {arm.ffn_type}, width {arm.intermediate_size}, {arm.non_embedding_parameters:,} "
            f"parameters without embeddings ({arm.mismatch:+.2%}), equal {arm.matching}, size {arm.size}"
        )
    manifests = {
        "train": TokenLoader(base, tokenizer).manifest,
        "validation": token_cache(base, tokenizer, "validation").manifest,
    }
    size = "streamed text" if base.data.streaming else f"{manifests['train']['tokens']:,} training tokens"
    say(
        f"  text: {manifests['train']['source']}, {size} and {manifests['validation']['tokens']:,} held out, "
        f"vocabulary {vocab_size:,}"
    )
    check_same_trials(config, directory, arms)
    start_folder(config, directory, manifests, vocab_size, base.data.block_size)
    speed = ensure_speed(config, directory, arms, vocab_size)

    sweep = []
    plan: dict[str, Any] = {"arms": [arm.model_dump(mode="json") for arm in arms], "sweep": [], "trials": []}
    by_key = {(arm.matching, arm.size, arm.arm): arm for arm in arms}

    def planned(trial: Trial) -> PlannedArm:
        return by_key[trial.matching, trial.size, trial.arm]

    sweeping = sweep_trials(config)
    for number, trial in enumerate(sweeping, 1):
        train_trial(config, directory, planned(trial), trial, f"sweep {number}/{len(sweeping)}")
    sweep = sweep_choices(config, directory, sweeping)
    rates = {(row["size"], row["arm"]): row["learning_rate"] for row in sweep}
    tokens_per_second = {
        (row["size"], row["arm"]): row["tokens_per_second"]
        for row in (speed["arms"] if speed else [])
        if row["matching"] == "parameters"
    }
    trials = final_trials(config, rates, tokens_per_second)
    plan |= {"sweep": sweep, "trials": [trial.model_dump(mode="json") for trial in trials]}
    write_json(directory.plan, plan)
    for number, trial in enumerate(trials, 1):
        if train_trial(config, directory, planned(trial), trial, f"run {number}/{len(trials)}"):
            judge_trial(config, directory.run(trial.name), base, trial)
    ensure_baselines(config, directory, base)
    path = report(directory.root)
    track_outcome(load(directory.root), read_json(directory.report_json))
    say("")
    say(summary(directory.root))
    say("")
    say(f"{timedelta(seconds=round(time.perf_counter() - started))} in all; report: {path}")
    return path


def say(line: str) -> None:
    print(line, flush=True)


def start_folder(
    config: CompareConfig, directory: CompareDir, manifests: dict[str, Any], vocab_size: int, block_size: int
) -> None:
    """compare.json; where the evaluation settings changed, what was judged by the old ones is removed."""
    dumped = config.model_dump(mode="json")
    if directory.compare.is_file():
        before = read_json(directory.compare)["config"]
        if before["evaluation"] != dumped["evaluation"]:
            directory.baselines.unlink(missing_ok=True)
            for run in map(TrialDir, directory.arms.glob("*")):
                for path in (run.heldout, run.samples, run.functions):
                    path.unlink(missing_ok=True)
    kept = ("source", "licence", "documents", "bytes", "words", "tokens", "text_tokens", "sha256")
    data: dict[str, Any] = {"vocab_size": vocab_size, "block_size": block_size}
    # of a streamed text the counts are not known: null
    data |= {split: {key: manifest.get(key) for key in kept} for split, manifest in manifests.items()}
    write_json(directory.compare, {"config": dumped, "provenance": provenance(), "data": data})


def check_same_trials(config: CompareConfig, directory: CompareDir, arms: list[PlannedArm]) -> None:
    """UserError where a trial's folder was trained with another configuration; nothing is written before."""
    if not directory.plan.is_file():
        return
    stored = read_json(directory.plan)
    by_key = {(arm.matching, arm.size, arm.arm): arm for arm in arms}
    for row in stored["trials"]:
        trial = Trial.model_validate(row)
        arm = by_key.get((trial.matching, trial.size, trial.arm))
        path = directory.config(trial.name)
        if arm is None or not path.is_file() or not directory.run(trial.name).root.is_dir():
            continue
        wanted = trial.model_copy(update={"max_tokens": _budget(config, trial)})
        if path.read_text(encoding="utf-8") != config_text(config, arm, wanted):
            raise UserError(
                f"{directory.root}: holds {trial.name}, trained with another configuration than this file's; "
                f"choose another name, or delete {directory.root}"
            )


def _budget(config: CompareConfig, trial: Trial) -> int:
    if trial.matching == "wallclock":
        return trial.max_tokens
    size = next((size for size in config.sizes if size.name == trial.size), config.sizes[0])
    return run_config(config, size, {}, config.name).train.max_tokens


def config_text(config: CompareConfig, arm: PlannedArm, trial: Trial) -> str:
    return toml_text(trial_config(config, arm, trial).model_dump(mode="json"))


def train_trial(
    config: CompareConfig, directory: CompareDir, arm: PlannedArm, trial: Trial, place: str
) -> bool:
    """Train `trial` unless it is finished; whether there is a finished run afterwards.

    UserError for a mistake that the training process complains of, after a signal, and where a finished run
    was trained with another configuration.
    """
    run, path = directory.run(trial.name), directory.config(trial.name)
    text = config_text(config, arm, trial)
    if held(run):  # of a comparison that was killed, a training process can be left
        say(f"{place}: {trial.name} is being trained by another process; waiting for it")
        while held(run):
            time.sleep(0.5)
    state, reason = state_of(run)
    if state in ("finished", "diverged"):
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{run.root}: trained with another configuration than this file's ({path} has it); choose "
                f"another name, or delete {run.root}"
            )
        if state == "diverged":
            say(f"{place}: {trial.name} diverged before: {reason}")
        return state == "finished"
    write_text(path, text)
    run.failure.unlink(missing_ok=True)
    say(f"{place}: {trial.name}, learning rate {trial.learning_rate:g}, {trial.max_tokens:,} tokens")
    returncode, tail = run_process(
        launch_command(config.launch, path), run.log, f"{trial.arm} seed {trial.seed}"
    )
    state, reason = state_of(run)
    if state == "interrupted" and returncode == 0:
        raise UserError(f"{trial.name}: interrupted; run the same command again to go on")
    if state == "finished":
        return True
    if state != "diverged":
        # `accelerate launch` ends with status 1 whatever the status of its process.
        mistake = next((line for line in reversed(tail) if line.startswith(MISTAKE)), None)
        if mistake is not None:
            raise UserError(f"{trial.name}: {mistake.removeprefix(MISTAKE)}")
        message = tail[-1] if tail else "no output"
        write_json(run.failure, {"returncode": returncode, "message": message, "lines": tail})
        reason = f"exit status {returncode}: {message}"
    say(f"{place}: {trial.name} FAILED: {reason} (see {run.log})")
    return False


def launch_command(launch: tuple[str, ...], path: Path) -> list[str]:
    """`accelerate launch` of a training process; without the user's arguments, one process on one device."""
    if not launch:
        threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
        launch = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
        launch += ("--dynamo_backend", "no", "--num_cpu_threads_per_process", threads)
        if not torch.cuda.is_available():
            launch = ("--cpu", *launch)
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "kanlm", "train", str(path)]


def run_process(command: list[str], log: Path, prefix: str) -> tuple[int, list[str]]:
    """Run `command`, its output into `log` and line by line to ours; (exit status, last lines).

    SIGINT and SIGTERM are passed on to the whole process group, which then finishes its step and writes a
    checkpoint; UserError when that is done. (The launcher dies of the signal, so its status says nothing.)
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: list[str] = []
    received: list[int] = []
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def forward(number: int, _frame: Any) -> None:
            received.append(number)
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                if line.strip():
                    tail = [*tail, line.rstrip()][-FAILURE_LINES:]
                    say(f"  [{prefix}] {line.rstrip()}")
            returncode = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        name = signal.Signals(received[0]).name
        raise UserError(f"{prefix}: stopped by {name}; run the same command again to go on")
    return returncode, tail


def sweep_choices(config: CompareConfig, directory: CompareDir, trials: list[Trial]) -> list[dict[str, Any]]:
    """The learning rate of every size and arm, with what was tried; without a sweep, the configured one.

    `on_edge`: the best rate is the smallest or largest of three or more, or of two.
    """
    rows = []
    for size in config.sizes:
        for arm in config.arms:
            tried: list[dict[str, Any]] = []
            for trial in trials:
                if (trial.size, trial.arm) == (size.name, arm.name):
                    run = directory.run(trial.name)
                    state, _ = state_of(run)
                    loss = read_json(run.record)["final_validation"]["loss"] if state == "finished" else None
                    tried.append({"learning_rate": trial.learning_rate, "loss": loss, "state": state})
            done = [(row["loss"], row["learning_rate"]) for row in tried if row["loss"] is not None]
            done = [pair for pair in done if math.isfinite(pair[0])]
            if tried and not done:
                raise UserError(
                    f"sweep: no learning rate of arm {arm.name} finished training; lower "
                    f"sweep.learning_rates or see {directory.arms}/sweep-{size.name}-{arm.name}-*/train.log"
                )
            configured = run_config(config, size, {"train": arm.train}, config.name).train.learning_rate
            chosen = min(done)[1] if done else configured
            rates = [row["learning_rate"] for row in tried]
            on_edge = len(rates) > 1 and chosen in (min(rates), max(rates))
            rows.append(
                {
                    "size": size.name,
                    "arm": arm.name,
                    "learning_rate": chosen,
                    "on_edge": on_edge,
                    "trials": tried,
                }
            )
    return rows


def ensure_speed(
    config: CompareConfig, directory: CompareDir, arms: list[PlannedArm], vocab_size: int
) -> dict[str, Any] | None:
    """speed.json, measured again where arms, widths or rounds changed."""
    if not config.speed.rounds:
        return None
    wanted = sorted(
        (a.matching, a.size, a.arm, a.intermediate_size) for a in arms if a.matching != "wallclock"
    )
    if directory.speed.is_file():
        stored = read_json(directory.speed)
        keys = ("matching", "size", "arm", "intermediate_size")
        if sorted(tuple(row[key] for key in keys) for row in stored["arms"]) == wanted:
            if stored["rounds"] == config.speed.rounds:
                return stored
    say(f"step times: {config.speed.rounds} rounds of all arms in turns")
    speed = measured_speed(config, arms, vocab_size)
    write_json(directory.speed, speed)
    return speed


def held_out_documents(config: CompareConfig, base: RunConfig) -> Iterator[str]:
    source = config.evaluation.source
    found = text_documents(source) if source else documents(base, "validation")
    return itertools.islice(found, config.evaluation.max_documents)


def judge_trial(config: CompareConfig, run: TrialDir, base: RunConfig, trial: Trial) -> None:
    """Export the run, then judge the exported folder as anyone would load it: loss, samples, functions."""
    settings = config.evaluation
    if all(path.is_file() for path in (run.heldout, run.samples, run.functions)):
        return
    if run.hf.is_dir():
        shutil.rmtree(run.hf)
    export(run.root)
    model, tokenizer = load_causal_lm(run.hf)
    texts = list(held_out_documents(config, base))
    source = settings.source
    result = evaluate_model(
        model,
        tokenizer,
        texts,
        name=str(run.hf),
        dataset=source.source if source else base.data.validation_source or base.data.source,
        split=source.split if source else "held out",
        context_length=settings.context_length or base.data.block_size,
        stride=settings.stride,
        batch_size=settings.batch_size,
    )
    write_json(run.functions, learned_functions(model, tokenizer, texts, settings.functions_per_module))
    write_json(run.samples, samples(model, tokenizer, texts, settings, trial.seed))
    update_card(run.hf, [result])
    write_json(run.heldout, result)
    say(
        f"  {trial.arm} seed {trial.seed}: {result.bits_per_byte:.4f} bits per byte, perplexity "
        f"{result.perplexity:.2f} on {result.tokens:,} held-out tokens"
    )


def samples(model: Any, tokenizer: Any, texts: list[str], settings: Any, seed: int) -> list[dict[str, str]]:
    """Continuations of `settings.prompts`, or of the first words of two held-out documents."""
    if not settings.sample_tokens:
        return []
    prompts = settings.prompts or [
        text[:60].rsplit(None, 1)[0] for text in texts[:: max(1, len(texts) // 2)][:2]
    ]
    found = []
    sampling = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k}
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        positions = model.config.max_position_embeddings
        length = min(settings.sample_tokens, positions - 1)
        if ids.shape[1] > positions - length:
            ids = ids[:, : positions - length]
            prompt = tokenizer.decode(ids[0])
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed + number)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
                **sampling,
            )
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        found.append({"prompt": prompt, "text": text})
    return found


def ensure_baselines(config: CompareConfig, directory: CompareDir, base: RunConfig) -> None:
    """baselines.json: what needs no neural network, trained on the same text, on the same held-out text."""
    if directory.baselines.is_file():
        return
    rows: list[dict[str, Any]] = []
    if config.evaluation.baselines and base.data.streaming and base.data.max_documents is None:
        say("baselines: none; they would read the whole of a streamed text (data.max_documents bounds it)")
    elif config.evaluation.baselines:
        say("baselines: Kneser-Ney n-grams and xz -9 on the same text")
        training = list(documents(base, "train"))
        held_out = list(held_out_documents(config, base))
        by_order = kneser_ney_by_order(training, held_out)
        best = min(by_order, key=by_order.__getitem__)
        rows = [
            {
                "name": f"{best}-gram",
                "what": f"Kneser-Ney over bytes, the best of orders {min(by_order)} to {max(by_order)}, "
                "counts of the training text",
                "bits_per_byte": by_order[best],
                "orders": by_order,
            },
            {
                "name": "xz -9",
                "what": "what the held-out text adds to the compressed training text",
                "bits_per_byte": xz_bits_per_byte(training, held_out),
            },
        ]
    write_json(directory.baselines, rows)
