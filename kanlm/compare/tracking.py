"""The outcome of a comparison to the experiment tracker: the final table and the learned functions.

The runs themselves are logged while they train, one for each arm and seed. In wandb and trackio all of them,
and this one, stand in one group, the comparison's name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker

from kanlm.compare.artifacts import Artifacts
from kanlm.compare.plots import DRAWN_FUNCTIONS
from kanlm.interpret.pictures import learned_functions_pixels, spread
from kanlm.train.parallel import new_accelerator
from kanlm.train.tracking import start_trackers

COLUMNS = (
    "matching",
    "size",
    "arm",
    "non_embedding_parameters",
    "mismatch",
    "flops_per_token",
    "bits_per_byte",
    "perplexity",
    "tokens_per_second",
    "peak_memory_bytes",
)


def table_rows(content: dict[str, Any]) -> list[list[Any]]:
    """The tables of report.json as rows of COLUMNS."""
    return [
        [table["matching"], table["size"], *(row[column] for column in COLUMNS[2:])]
        for table in content["tables"]
        for row in table["rows"]
    ]


def pictures(artifacts: Artifacts) -> dict[str, np.ndarray]:
    """Learned functions by arm, of the first seed that has some: pixels [height, width, RGB]."""
    colour = artifacts.colours
    found: dict[str, np.ndarray] = {}
    for result in artifacts.shown.results:
        arm = result.trial.arm
        if arm not in found and result.functions and result.functions["curves"]:
            curves = spread(result.functions["curves"], DRAWN_FUNCTIONS)
            found[arm] = learned_functions_pixels(curves, colour[arm])
    return found


def track_outcome(artifacts: Artifacts, content: dict[str, Any]) -> None:
    """Log the final table (of `content`, report.json) and the pictures.

    Nothing is done with `tracking.tracker = "none"`; UserError where the tracker cannot start.
    """
    config = artifacts.config
    run = config.runs[config.sizes[-1].name].model_copy(update={"name": "table"})
    if run.tracking.tracker == "none":
        return
    with new_accelerator(run) as accelerator:
        start_trackers(accelerator, run, run.run_dir)
        for tracker in accelerator.trackers:
            log_outcome(tracker, table_rows(content), pictures(artifacts))


def log_outcome(tracker: GeneralTracker, rows: list[list[Any]], drawn: dict[str, np.ndarray]) -> None:
    """As a table and images where the tracker has them (wandb, trackio), else as one scalar a cell."""
    names = {arm: f"learned functions/{arm}" for arm in drawn}
    if tracker.name == "wandb":
        tracker.log_table("arms", columns=list(COLUMNS), data=rows)
        tracker.log_images({names[arm]: [pixels] for arm, pixels in drawn.items()})
        return
    if tracker.name == "trackio":
        import pandas as pd
        import trackio

        table = trackio.Table(dataframe=pd.DataFrame(rows, columns=list(COLUMNS)))
        images = {names[arm]: trackio.Image(pixels) for arm, pixels in drawn.items()}
        tracker.log({"arms": table, **images})
        return
    scalars = {
        f"{row[0]}/{row[1]}/{row[2]}/{column}": value
        for row in rows
        for column, value in zip(COLUMNS[3:], row[3:], strict=True)
        if value is not None
    }
    tracker.log(scalars, step=0)
    tracker.log_images(
        {names[arm]: pixels[None] for arm, pixels in drawn.items()}, step=0, dataformats="NHWC"
    )
