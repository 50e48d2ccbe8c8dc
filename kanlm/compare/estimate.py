"""`kanlm compare --dry-run`: what a comparison would train, how long it takes, what it could find."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from kanlm.compare.artifacts import load, step_speeds
from kanlm.compare.findings import judgements
from kanlm.compare.heldout import held_out_documents
from kanlm.compare.plan import Study, planned_arms
from kanlm.compare.schema import MATCHINGS, CompareConfig, PlannedArm, Trial, load_compare_config
from kanlm.compare.speed import measured_speed, step_sequences
from kanlm.compare.sweep import Point
from kanlm.config import UserError
from kanlm.data import token_cache, tokenizer_for
from kanlm.evaluation.perplexity import token_ids
from kanlm.model import KanLMForCausalLM
from kanlm.stats import detectable_difference

ROUNDS, WARMUP = 3, 1
"""Of the calibration: training steps of every arm, in turns."""


def estimate(toml_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Runs, tokens, hours and the difference that the seeds can detect; trains and writes nothing but caches.

    The hours come from three steps of each arm and one forward pass of each, timed now, so they hold for a
    machine that stays as busy as it is.
    """
    config = load_compare_config(toml_path, overrides)
    tokenizer = tokenizer_for(config.first_run)
    arms = planned_arms(config, len(tokenizer))
    study = Study(config, len(tokenizer), arms)
    timed = [arm for arm in arms if MATCHINGS[arm.matching].budget == "tokens"]
    speed = measured_speed(study, timed, ROUNDS, WARMUP)
    speeds = step_speeds(speed, config.reference)
    sweeping = planned_sweep(study)
    trials = {trial.name: trial for trial in study.final_trials(speed=speed)}
    validation = len(token_cache(study.base, tokenizer, "validation"))
    test = sum(len(token_ids(tokenizer, text)) for text in held_out_documents(study))
    costs = Costs(study, speeds, validation, test, startup_seconds())
    seconds = math.fsum(costs.training(trial) for trial in [*sweeping, *trials.values()]) / config.jobs
    seconds += math.fsum(costs.judging(trial) for trial in trials.values())
    seconds += costs.step_times()
    tokens = sum(trial.max_tokens for trial in [*sweeping, *trials.values()])
    lines = [f"{config.name}: {len(arms)} arms to train, none is trained now"]
    lines += [arm.line for arm in arms]
    more = " at least (a sweep grows while its best lies on an edge)" if sweeping else ""
    lines += [
        f"  runs        {len(trials)} to be reported, {len(sweeping)} of the sweep{more}, {config.jobs} at "
        "once",
        f"  tokens      {tokens:,} in all",
        f"  time        about {duration(seconds)} on this machine as busy as it is now",
        f"  detectable  {detectable(study)}",
    ]
    return "\n".join(lines)


def planned_sweep(study: Study) -> list[Trial]:
    """The trials of the lists; each arm as many as the arm with the longest lists."""
    config, found, most = study.config, [], 0
    for arm in study.swept_arms:
        chosen = config.arm(arm.arm)
        kan_rates = config.kan_learning_rates(chosen) if arm.coefficients else ()
        most = max(most, len(config.learning_rates(chosen)) + len(kan_rates))
    for arm in study.swept_arms:
        rates = config.learning_rates(config.arm(arm.arm))
        found += [study.sweep_trial(arm, Point(rates[number % len(rates)]).rates) for number in range(most)]
    return found


class Costs:
    """Seconds of a run's parts, from step times and one forward pass of each arm."""

    def __init__(
        self,
        study: Study,
        tokens_per_second: dict[tuple[str, str, str], float],
        validation_tokens: int,
        test_tokens: int,
        startup: float,
    ):
        self.config, self.speed, self.startup = study.config, tokens_per_second, startup
        self.validation_tokens, self.test_tokens = validation_tokens, test_tokens
        by_key: dict[tuple[str, str, str], PlannedArm]
        by_key = {(MATCHINGS[arm.matching].width, arm.size, arm.arm): arm for arm in study.arms}
        self.forward = {key: forward_speed(study, arm) for key, arm in by_key.items()}

    def key(self, trial: Trial) -> tuple[str, str, str]:
        return MATCHINGS[trial.matching].width, trial.size, trial.arm

    def training(self, trial: Trial) -> float:
        """From the start of the process to its end, validations included."""
        train, key = trial.run.train, self.key(trial)
        steps = trial.max_tokens // trial.run.step_tokens
        times = steps // train.eval_every if train.eval_every else 0
        validated = times * min(train.eval_tokens or self.validation_tokens, self.validation_tokens)
        forward = (validated + self.validation_tokens) / self.forward[key]
        return self.startup + trial.max_tokens / self.speed[key] + forward

    def judging(self, trial: Trial) -> float:
        """Every token of the test text in the last `stride` places of a context."""
        context = self.config.evaluation.context_length or trial.run.data.block_size
        passes = context / (self.config.evaluation.stride or context)
        return self.test_tokens * passes / self.forward[self.key(trial)]

    def step_times(self) -> float:
        """The measurement of step times itself."""
        rounds = self.config.speed.rounds + self.config.speed.warmup if self.config.speed.rounds else 0
        base = self.config.first_run
        return rounds * math.fsum(
            step_sequences(base) * base.data.block_size / one for one in self.speed.values()
        )


def forward_speed(study: Study, arm: PlannedArm) -> float:
    """Tokens per second of a forward pass of the plain model, as runs are judged."""
    run = study.runs[arm.key]
    model = KanLMForCausalLM(study.architectures[arm.key]).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = study.config.evaluation.batch_size, run.data.block_size
    tokens = torch.randint(study.vocab_size, shape, device=device)
    times = []
    with torch.inference_mode():
        model.to(device)
        for _ in range(WARMUP + ROUNDS):
            start = time.perf_counter()
            logits = model(input_ids=tokens, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()
            times.append(time.perf_counter() - start)
    return tokens.numel() / sorted(times[WARMUP:])[ROUNDS // 2]


def startup_seconds() -> float:
    """What a training process takes before its first step: two interpreters, the launcher's and its own."""
    start = time.perf_counter()
    for code in ("import accelerate.commands.launch", "import kanlm.train.loop"):
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    return time.perf_counter() - start


def detectable(study: Study) -> str:
    """The difference that the planned seeds find in 80% of comparisons, by the spread that is known."""
    config = study.config
    seeds = len(config.seeds)
    if seeds < 2:
        return "nothing: one seed gives no verdict, at least 2 paired seeds do"
    spread, whence = config.evaluation.seed_spread_nats, "as evaluation.seed_spread_nats says"
    measured = measured_spreads(config)
    if measured:
        spread, whence = max(measured), "as the finished runs of this folder have it"
    kans = max(1, len({arm.arm for arm in study.arms if arm.family == "kan"}))
    return (
        f"{detectable_difference(spread, seeds):.3f} nats/token between two arms with {seeds} paired seeds, "
        f"if their difference spreads by {spread:.4f} nats over seeds, {whence}; with Holm over {kans} arms "
        f"up to {detectable_difference(spread, seeds, 0.05 / kans):.3f}"
    )


def measured_spreads(config: CompareConfig) -> list[float]:
    """Standard deviations of paired differences, from an earlier or unfinished call of this comparison."""
    try:
        artifacts = load(config.directory)
    except UserError:
        return []
    judged = judgements(artifacts.shown, config.evaluation.equivalence_margin_nats)
    return [one.std_nats for one in judged if one.std_nats]


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"
