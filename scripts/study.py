"""The study behind the verdict: many short trainings, two at once, judged on text that no choice looks at.

    python scripts/study.py prepare DATA_DIR       writes runs/study/data: train, valid, test of each corpus
    python scripts/study.py run [PHASE ...]        trains what configs/study.toml plans and is not done yet
    python scripts/study.py baselines [PHASE ...]  n-grams and xz on the same test texts
    python scripts/study.py report                 writes docs/results/study/report.md and report.json

`run` may be started several times at once (one thread each): a trial is taken by one process. Every finished
trial is a line of docs/results/study/trials.jsonl; one that was interrupted is trained again from its
checkpoint.

Hyperparameters are chosen by `valid`; `test` is read by the tables of final phases only.
"""

import click
from study_picture import picture
from study_report import report
from study_runs import run
from study_texts import baselines, prepare


@click.group()
def study() -> None:
    """Train and judge the arms of the study."""


for command in (prepare, run, baselines, report, picture):
    study.add_command(command)

if __name__ == "__main__":
    study()
