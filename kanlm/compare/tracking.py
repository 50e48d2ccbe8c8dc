"""The final table of a comparison to the configured experiment tracker."""

from __future__ import annotations

from typing import Any

from kanlm.compare.schema import CompareConfig, run_config
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


def track_table(config: CompareConfig, content: dict[str, Any]) -> None:
    """Log the final table: as a table where the tracker has them (wandb), else as one scalar a cell.

    Nothing is done with `tracking.tracker = "none"`; UserError where the tracker cannot start.
    """
    run = run_config(config, config.sizes[-1], {"name": "table"}, config.name)
    if run.tracking.tracker == "none":
        return
    rows = table_rows(content)
    with new_accelerator(run) as accelerator:
        start_trackers(accelerator, run, run.run_dir)
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_table("arms", columns=list(COLUMNS), data=rows)
                continue
            scalars = {
                f"{row[0]}/{row[1]}/{row[2]}/{column}": value
                for row in rows
                for column, value in zip(COLUMNS[3:], row[3:], strict=True)
                if value is not None
            }
            tracker.log(scalars, step=0)
