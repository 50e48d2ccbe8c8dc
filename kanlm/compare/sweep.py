"""The sweep: every arm tries rates of its own, as many as any other, and takes the best.

    search = Search(study, arm)    one arm's at one size; a `Point` is one trial, `tried` its loss

The rules read losses alone. An arm's axes are its learning rate and, where it has KAN coefficients and rates
for them are given, the coefficients' own rate. The loss of a run that failed is infinite.

1  every learning rate of the list, with the coefficients' rate as configured;
2  while the best one is the smallest or largest tried: one more beyond it, in the same ratio;
3  at the best learning rate, every coefficients' rate of the list; 4  the same extension there.
5  Arms that are done before others refine: a learning rate between the best and the better of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kanlm.compare.artifacts import state_of
from kanlm.compare.plan import Study
from kanlm.compare.schema import PlannedArm, Trial
from kanlm.config import UserError
from kanlm.runs import read_json

Row = dict[str, Any]
"""Of one arm and size: the rates that were chosen, and all that was tried."""


def run_sweep(study: Study, train: Callable[[Sequence[Trial]], None]) -> list[Row]:
    """Let `train` try rates until every arm has its best, the same number of trials for each of a size.

    plan.json has the trials of the present round.

    UserError where no trial of an arm finished.
    """
    searches = [Search(study, arm) for arm in study.swept_arms]
    while wanted := next_trials(searches):
        trials = [study.sweep_trial(search.arm, point.rates) for search, point in wanted]
        study.write_plan(trials, sweep=[])
        train(trials)
        for (search, point), trial in zip(wanted, trials, strict=True):
            search.read(point, trial)
        for search in searches:
            search.refuse_all_failed()
    return [search.row() for search in searches]


def next_trials(searches: Sequence[Search]) -> list[tuple[Search, Point]]:
    """What every arm wants to try; when none does, what arms with fewer trials than others refine."""
    wanted = [(search, point) for search in searches for point in next_points(search.axes, search.tried)]
    if wanted:
        return sorted(wanted, key=lambda pair: pair[1].learning_rate)
    most: dict[str, int] = {}
    for search in searches:
        most[search.arm.size] = max(len(search.tried), most.get(search.arm.size, 0))
    return [
        (search, refinement(search.tried))
        for search in searches
        if 0 < len(search.tried) < most[search.arm.size]
    ]


@dataclass
class Search:
    """One arm's search at one size."""

    study: Study
    arm: PlannedArm
    tried: dict[Point, float] = field(default_factory=dict)
    """The validation loss of each trial; infinite where it did not finish."""
    states: dict[Point, str] = field(default_factory=dict)

    @property
    def axes(self) -> Axes:
        config = self.study.config
        chosen = config.arm(self.arm.arm)
        kan_rates = config.kan_learning_rates(chosen) if self.arm.coefficients else ()
        return Axes(config.learning_rates(chosen), kan_rates, config.sweep.extend)

    def read(self, point: Point, trial: Trial) -> None:
        """What the run of `trial` came to."""
        run = self.study.directory.run(trial.name)
        self.states[point], _ = state_of(run)
        self.tried[point] = math.inf
        if self.states[point] == "finished":
            loss = read_json(run.record)["final_validation"]["loss"]
            self.tried[point] = loss if math.isfinite(loss) else math.inf

    def refuse_all_failed(self) -> None:
        if self.tried and all(math.isinf(loss) for loss in self.tried.values()):
            raise UserError(
                f"sweep: no learning rate of arm {self.arm.arm} finished training; lower "
                f"sweep.learning_rates or see {self.study.directory.arms}/sweep-{self.arm.size}-"
                f"{self.arm.arm}-*/train.log"
            )

    def row(self) -> Row:
        """What was tried and chosen; without a sweep, the rates that are configured."""
        train = self.study.config.runs[self.arm.size].train.model_copy(update=self.arm.train)
        configured = Point(train.learning_rate, train.kan_learning_rate)
        best = best_point(self.tried) if self.tried else configured
        return {
            "size": self.arm.size,
            "arm": self.arm.arm,
            "learning_rate": best.learning_rate,
            "kan_learning_rate": best.kan_learning_rate,
            "on_edge": edges(self.tried) if self.tried else [],
            "trials": [
                {
                    "learning_rate": point.learning_rate,
                    "kan_learning_rate": point.kan_learning_rate,
                    "loss": None if math.isinf(loss) else loss,
                    "state": self.states[point],
                }
                for point, loss in self.tried.items()
            ],
        }


@dataclass(frozen=True)
class Point:
    """The rates of one trial; `kan_learning_rate` None = as configured."""

    learning_rate: float
    kan_learning_rate: float | None = None

    @property
    def rates(self) -> dict[str, float]:
        """As keys of `[train]`."""
        own = None if self.kan_learning_rate is None else {"kan_learning_rate": self.kan_learning_rate}
        return {"learning_rate": self.learning_rate, **(own or {})}


@dataclass(frozen=True)
class Axes:
    """What an arm may try: the lists of the file, and by how many values an axis may grow."""

    learning_rates: Sequence[float]
    kan_learning_rates: Sequence[float] = ()
    extend: int = 3


Tried = Mapping[Point, float]


def next_points(axes: Axes, tried: Tried) -> list[Point]:
    """The trials to run now; empty where the arm is done with rules 1 to 4."""
    first = [Point(rate) for rate in axes.learning_rates]
    if missing := [point for point in first if point not in tried]:
        return missing
    grown = _beyond_edge(
        {point.learning_rate: tried[point] for point in _line(tried)}, len(first) + axes.extend
    )
    if grown is not None:
        return [Point(grown)]
    if not axes.kan_learning_rates:
        return []
    best = best_point({point: tried[point] for point in _line(tried)}).learning_rate
    second = [Point(best, rate) for rate in axes.kan_learning_rates]
    if missing := [point for point in second if point not in tried]:
        return missing
    grown = _beyond_edge(_kan_line(tried, best), len(second) + axes.extend)
    return [] if grown is None else [Point(best, grown)]


def refinement(tried: Tried) -> Point:
    """A further learning rate for an arm that is done, at the coefficients' rate of its best point."""
    best = best_point(tried)
    line = {
        point.learning_rate: loss
        for point, loss in tried.items()
        if point.kan_learning_rate == best.kan_learning_rate
    }
    places = sorted(line)
    here = places.index(best.learning_rate)
    neighbours = [places[place] for place in (here - 1, here + 1) if 0 <= place < len(places)]
    if not neighbours:
        return Point(_rounded(best.learning_rate / math.sqrt(2)), best.kan_learning_rate)
    nearer = min(neighbours, key=lambda rate: (line[rate], rate))
    return Point(_rounded(math.sqrt(nearer * best.learning_rate)), best.kan_learning_rate)


def best_point(tried: Tried) -> Point:
    """The point of the lowest loss; of equal ones the lower rates."""
    return min(tried, key=lambda point: (tried[point], point.learning_rate, point.kan_learning_rate or 0.0))


def edges(tried: Tried) -> list[str]:
    """The axes whose best value is the smallest or largest of those tried beside it."""
    best = best_point(tried)
    line = {
        point.learning_rate for point in tried if point.kan_learning_rate in (None, best.kan_learning_rate)
    }
    found = []
    if len(line) > 1 and best.learning_rate in (min(line), max(line)):
        found.append("learning_rate")
    kan = _kan_line(tried, best.learning_rate)
    if len(kan) > 1 and best.kan_learning_rate in (min(kan), max(kan)):
        found.append("kan_learning_rate")
    return found


def _line(tried: Tried) -> list[Point]:
    return [point for point in tried if point.kan_learning_rate is None]


def _kan_line(tried: Tried, learning_rate: float) -> dict[float, float]:
    return {
        point.kan_learning_rate: loss
        for point, loss in tried.items()
        if point.learning_rate == learning_rate and point.kan_learning_rate is not None
    }


def _beyond_edge(line: Mapping[float, float], most: int) -> float | None:
    """The next value outwards where the best lies on the edge of `line`; None where it does not, or with
    `most` values tried, or where nothing finished.
    """
    places = sorted(line)
    if not 2 <= len(places) < most or all(math.isinf(loss) for loss in line.values()):
        return None
    best = min(places, key=lambda rate: (line[rate], rate))
    if best == places[0]:
        return _rounded(best * places[0] / places[1])
    if best == places[-1]:
        return _rounded(best * places[-1] / places[-2])
    return None


def _rounded(rate: float) -> float:
    """Three digits: rates are names of folders too."""
    return float(f"{rate:.3g}")
