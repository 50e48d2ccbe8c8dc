"""From a comparison's file to work: text, the arms' solved widths, and trials with their resolved runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from transformers.utils.logging import disable_progress_bar

from kanlm.compare.artifacts import CompareDir, TrialDir, step_speeds
from kanlm.compare.schema import (
    MATCHINGS,
    CompareConfig,
    Key,
    Matching,
    PlannedArm,
    SizeConfig,
    Trial,
)
from kanlm.config import RunConfig, UserError, parse_table
from kanlm.data import TokenLoader, token_cache, tokenizer_for
from kanlm.model import KanLMConfig
from kanlm.model.ffn import find_arm
from kanlm.runs import changed_keys, provenance, read_json, write_json
from kanlm.sizing import (
    block_counts,
    matched_architectures,
    new_architecture,
    parameter_counts,
    training_flops,
)

RATES = ("learning_rate", "kan_learning_rate")
Rates = dict[str, float]
"""`learning_rate` and, where the sweep chose one, `kan_learning_rate`: keys of `[train]`."""
DATA_KEYS = ("source", "licence", "documents", "bytes", "words", "tokens", "text_tokens", "sha256")
"""What compare.json tells of a text; of a streamed one the counts are not known: null."""


def begin_study(config: CompareConfig) -> Study:
    """The text is read, widths are solved and said; the folder is begun, or found to be of this file.

    UserError where no width fits, and where the folder holds runs of another configuration: nothing is then
    written.
    """
    disable_progress_bar()  # of weights that are loaded: here lines tell the progress
    base = config.first_run
    names = ", ".join(arm.name for arm in config.arms)
    print(f"comparison {config.name}: {names} in {config.directory}/", flush=True)
    tokenizer = tokenizer_for(base)
    study = Study(config, len(tokenizer), planned_arms(config, len(tokenizer)))
    for arm in study.arms:
        print(arm.line, flush=True)
    manifests = {
        "train": TokenLoader(base, tokenizer).manifest,
        "validation": token_cache(base, tokenizer, "validation").manifest,
    }
    size = "streamed text" if base.data.streaming else f"{manifests['train']['tokens']:,} training tokens"
    print(
        f"  text: {manifests['train']['source']}, {size} and {manifests['validation']['tokens']:,} held out, "
        f"vocabulary {len(tokenizer):,}",
        flush=True,
    )
    study.refuse_changed(study.known_trials())
    study.forget_old_judgements()
    data: dict[str, Any] = {"vocab_size": study.vocab_size, "block_size": base.data.block_size}
    for split, manifest in manifests.items():
        data[split] = {key: manifest.get(key) for key in DATA_KEYS}
    dumped = config.model_dump(mode="json")
    write_json(study.directory.compare, {"config": dumped, "provenance": provenance(), "data": data})
    return study


def planned_arms(config: CompareConfig, vocab_size: int) -> list[PlannedArm]:
    """Every arm's solved width, in the order matching, size, arm; `UserError` where no width fits."""
    return [
        arm
        for matching in config.matching
        for size in config.sizes
        for arm in arms_of_size(config, matching, size, vocab_size)
    ]


def arms_of_size(
    config: CompareConfig, matching: Matching, size: SizeConfig, vocab_size: int
) -> list[PlannedArm]:
    """The arms of one size, each as wide as makes it equal to the reference arm."""
    runs = {arm.name: config.arm_runs[size.name, arm.name] for arm in config.arms}
    width = MATCHINGS[matching].width
    planned = []
    solved = matched_architectures(runs, config.reference, vocab_size, width)
    for arm in config.arms:
        run, (model, mismatch) = runs[arm.name], solved[arm.name]
        counts = parameter_counts(model)
        flops = training_flops(model, run.data.block_size)
        block = find_arm(model.ffn_type)
        planned.append(
            PlannedArm(
                matching=matching,
                size=size.name,
                arm=arm.name,
                family=block.family,
                ffn_type=model.ffn_type,
                intermediate_size=model.intermediate_size,
                model={**run.model, "intermediate_size": model.intermediate_size},
                train=arm.train,
                parameters=counts.total,
                embedding_parameters=counts.embedding,
                non_embedding_parameters=counts.non_embedding,
                ffn_parameters=counts.ffn,
                coefficients=block_counts(model).coefficients,
                flops_per_token=float(flops.total),
                mismatch=mismatch,
            )
        )
    return planned


@dataclass
class Study:
    """A comparison under way: what was planned, and the trials that follow from it."""

    config: CompareConfig
    vocab_size: int
    arms: list[PlannedArm]
    """Of every matching and size, as `planned_arms` gives them."""

    @property
    def directory(self) -> CompareDir:
        return CompareDir(self.config.directory)

    @property
    def base(self) -> RunConfig:
        """The first size's run: text and tokenizer are those of all."""
        return self.config.first_run

    @property
    def swept_arms(self) -> list[PlannedArm]:
        """The arms whose rates are tried: those of the first matching, at every size."""
        return [arm for arm in self.arms if arm.matching == self.config.matching[0]]

    @cached_property
    def runs(self) -> dict[Key, RunConfig]:
        """Of every arm, with the width that was solved; a trial gives it name, seed, rates and budget."""
        return {
            arm.key: self.config.arm_runs[arm.size, arm.arm].model_copy(update={"model": arm.model})
            for arm in self.arms
        }

    @cached_property
    def architectures(self) -> dict[Key, KanLMConfig]:
        return {key: new_architecture(run, self.vocab_size) for key, run in self.runs.items()}

    def trial(
        self,
        arm: PlannedArm,
        kind: Literal["sweep", "final"],
        name: str,
        seed: int,
        rates: Mapping[str, float],
        max_tokens: int,
    ) -> Trial:
        """A trial of `arm` with its run; seed and data order are the same for all arms of one seed."""
        run = self.runs[arm.key]
        train = run.train.model_copy(update={**rates, "max_tokens": max_tokens})
        run = run.model_copy(update={"name": name, "seed": seed, "data_seed": seed, "train": train})
        return Trial(kind=kind, matching=arm.matching, size=arm.size, arm=arm.arm, run=run)

    def sweep_trial(self, arm: PlannedArm, rates: Rates) -> Trial:
        """The trial of the sweep that tries `rates`."""
        sweep, tokens = self.config.sweep, self.config.runs[arm.size].train.max_tokens
        name = f"sweep-{arm.size}-{arm.arm}-lr{rates['learning_rate']:g}"
        if "kan_learning_rate" in rates:
            name += f"-kan{rates['kan_learning_rate']:g}"
        return self.trial(arm, "sweep", name, sweep.seed, rates, min(sweep.max_tokens or tokens, tokens))

    def final_trials(
        self,
        sweep: Sequence[Mapping[str, Any]] = (),
        speed: Mapping[str, Any] | None = None,
        matchings: Sequence[Matching] | None = None,
    ) -> list[Trial]:
        """The trials that are reported, seed by seed with the arms' order rotated, so that a machine that
        slows down hits no arm more than another. Trials that train the same have one run between them.

        Args:
            sweep: its rows, with the rates that it chose; without one those that are configured.
            speed: speed.json, needed where the budget is time, which then are the tokens that take as long
                as the reference takes for its own.
            matchings: default: all of the file.
        """
        config = self.config
        chosen = {
            (row["size"], row["arm"]): {key: row[key] for key in RATES if row[key] is not None}
            for row in sweep
        }
        tokens_per_second = step_speeds(speed, config.reference)
        by_key = {arm.key: arm for arm in self.arms}
        names = [arm.name for arm in config.arms]
        found: dict[str, Trial] = {}
        trials = []
        for matching in config.matching if matchings is None else matchings:
            rule = MATCHINGS[matching]
            for size in config.sizes:
                for turn, seed in enumerate(config.seeds):
                    shift = turn % len(names)
                    for arm in names[shift:] + names[:shift]:
                        tokens = config.runs[size.name].train.max_tokens
                        if rule.budget == "time":
                            own, reference = (
                                tokens_per_second[rule.width, size.name, one]
                                for one in (arm, config.reference)
                            )
                            tokens = round(tokens * own / reference)
                        name = f"{matching}-{size.name}-{arm}-seed{seed}"
                        planned, rates = by_key[matching, size.name, arm], chosen.get((size.name, arm), {})
                        trial = self.trial(planned, "final", name, seed, rates, tokens)
                        same = found.setdefault(trial.run.model_dump_json(exclude={"name"}), trial)
                        trials.append(trial.model_copy(update={"run": same.run}))
        return trials

    def known_trials(self) -> list[Trial]:
        """The trials that follow from the file alone: the sweep's first, or, without a sweep, those reported
        with a budget of tokens.
        """
        config = self.config
        if any(config.learning_rates(arm) for arm in config.arms):
            return [
                self.sweep_trial(arm, {"learning_rate": rate})
                for arm in self.swept_arms
                for rate in config.learning_rates(config.arm(arm.arm))
            ]
        return self.final_trials(
            matchings=[name for name in config.matching if MATCHINGS[name].budget == "tokens"]
        )

    def refuse_changed(self, trials: Sequence[Trial]) -> None:
        """UserError where a trial's folder was trained with another configuration; it names what changed."""
        for trial in trials:
            stored = self.directory.run(trial.name).config
            if not stored.is_file():
                continue
            before = parse_table(RunConfig, read_json(stored), str(stored)).model_dump(mode="json")
            changes = changed_keys(before, trial.run.model_dump(mode="json"))
            if changes:
                more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
                raise UserError(
                    f"{stored.parent}: trained with another configuration than this file's: "
                    f"{changes[0]}{more}; choose another name, or delete {self.directory.root}"
                )

    def forget_old_judgements(self) -> None:
        """Where the evaluation settings have changed, remove what was judged by the old ones."""
        directory = self.directory
        if not directory.compare.is_file():
            return
        before = read_json(directory.compare)["config"]["evaluation"]
        if before == self.config.evaluation.model_dump(mode="json"):
            return
        directory.baselines.unlink(missing_ok=True)
        for run in map(TrialDir, directory.arms.glob("*")):
            for path in (run.heldout, run.samples, run.functions):
                path.unlink(missing_ok=True)

    def write_plan(self, trials: Sequence[Trial], sweep: Sequence[dict[str, Any]]) -> None:
        """plan.json and every trial's configuration, unless a trial's folder holds another run.

        `sweep`: its rows, once it is over.
        """
        self.refuse_changed(trials)
        plan = {
            "arms": [arm.model_dump(mode="json") for arm in self.arms],
            "sweep": list(sweep),
            "trials": [trial.model_dump(mode="json") for trial in trials],
        }
        write_json(self.directory.plan, plan)
        for run in {trial.name: trial.run for trial in trials}.values():
            write_json(self.directory.config(run.name), run)
