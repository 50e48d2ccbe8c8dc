"""Where a comparison stands, read from its folder alone; also while it runs."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from kanlm.compare.artifacts import CompareDir, state_of
from kanlm.compare.schema import Trial
from kanlm.config import UserError
from kanlm.runs import read_json
from kanlm.train.lock import is_locked
from kanlm.train.status import fraction_done


def is_comparison(folder: str | Path) -> bool:
    return CompareDir(folder).compare.is_file()


def status(folder: str | Path) -> str:
    """A few lines: how many runs of the present stage are finished, those that run or failed, arms so far."""
    directory = CompareDir(folder)
    if not directory.plan.is_file():
        raise UserError(f"{directory.root}: planned, nothing is trained yet; run `kanlm compare` to go on")
    trials = {trial.name: trial for trial in map(Trial.model_validate, read_json(directory.plan)["trials"])}
    states = {name: state_of(directory.run(name)) for name in trials}
    finished = [name for name, (state, _) in states.items() if state == "finished"]
    stage = next(iter(trials.values())).kind if trials else "final"
    done = fmean(fraction_done(directory.run(name)) for name in trials) if trials else 0.0
    lines = [
        f"{directory.root.name}: {'sweep, ' if stage == 'sweep' else ''}{len(finished)} of {len(trials)} "
        f"runs finished, {done:.0%} of the training done"
    ]
    for name, (state, reason) in states.items():
        run = directory.run(name)
        if is_locked(run):
            lines.append(f"  running  {name}: {fraction_done(run):.0%}")
        elif state not in ("finished", "not run"):
            lines.append(f"  {state:<8} {name}" + (f": {reason}" if reason else ""))
    lines += arm_lines(directory, trials)
    if directory.report_html.is_file():
        lines.append(f"  report   {directory.report_html}")
    return "\n".join(lines)


def arm_lines(directory: CompareDir, trials: dict[str, Trial]) -> list[str]:
    """Bits per byte of the arms whose runs are judged, as far as they are."""
    bits: dict[tuple[str, str, str], list[float]] = {}
    for name, trial in trials.items():
        run = directory.run(name)
        if run.heldout.is_file():
            key = (trial.matching, trial.size, trial.arm)
            bits.setdefault(key, []).append(read_json(run.heldout)["bits_per_byte"])
    return [
        f"  judged   {arm}: {fmean(values):.4f} bits per byte over {len(values)} "
        f"seed{'s' if len(values) > 1 else ''} (equal {matching}, size {size})"
        for (matching, size, arm), values in bits.items()
    ]
