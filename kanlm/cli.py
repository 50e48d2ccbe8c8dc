"""The command line: parse, call, exit. One verb a stage; no logic here.

Exit status 0 only when the work was done, 2 for a user's mistake (one line on standard error).
KANLM_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import os
import sys
from pathlib import Path

import click
from safetensors import SafetensorError

from kanlm import __version__
from kanlm.config import UserError, load_run_config, one_line
from kanlm.train import launcher


def verb(name: str, example: str, **settings):
    """A subcommand whose help ends in an example."""
    return cli.command(name, epilog=f"\b\nExample:\n  {example}", **settings)


def trust_option(function):
    """Whether code that comes with a model may run."""
    return click.option(
        "--trust-remote-code", is_flag=True, help="Run Python code that comes with MODEL; kanlm's needs none."
    )(function)


def model_argument(function):
    return click.argument("model")(trust_option(function))


def models_argument(function):
    return click.argument("models", metavar="MODEL...", nargs=-1, required=True)(trust_option(function))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="kanlm")
def cli() -> None:
    """KAN-based small language models: train, export, evaluate, compare."""


@verb(
    "train",
    "accelerate launch -m kanlm train tiny-kan_glu train.max_tokens=2_000_000",
    short_help="Train a run; goes on where it stopped.",
)
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1)
def train_verb(config: str, overrides: tuple[str, ...]) -> None:
    """Train the run of CONFIG (TOML), with section.key=value OVERRIDES; goes on where it stopped.

    CONFIG is a file or a name from kanlm configs.
    """
    launcher.end_with_launcher()
    run = load_run_config(config, overrides)  # a mistake in it is told before the seconds that torch takes
    from kanlm.train.loop import train

    train(run)


@verb(
    "plan", "kanlm plan tiny-kan", short_help="Parameters, FLOPs, memory and matched widths; trains nothing."
)
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_verb(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Parameters, FLOPs, memory and the matched baseline's width of CONFIG; trains nothing."""
    run = load_run_config(config, overrides)
    from kanlm.sizing import plan, plan_text

    planned = plan(run)
    click.echo(json.dumps(planned, indent=2) if as_json else plan_text(planned))


@cli.group(
    "configs",
    invoke_without_command=True,
    epilog="\b\nExample:\n  kanlm configs copy tiny-kan_glu",
    short_help="List or copy the configurations that come with kanlm.",
)
@click.pass_context
def configs_group(context: click.Context) -> None:
    """The configurations that come with kanlm; train, plan and compare take their names."""
    if context.invoked_subcommand is None:
        from kanlm.shipped import listing

        click.echo(listing())


@configs_group.command("copy", epilog="\b\nExample:\n  kanlm configs copy tiny-kan_glu my-configs")
@click.argument("name")
@click.argument("directory", type=click.Path(file_okay=False), default=".")
def configs_copy_verb(name: str, directory: str) -> None:
    """Write the configuration NAME into DIRECTORY, to change it."""
    from kanlm.shipped import copy

    click.echo(copy(name, directory))


@verb("tokenize", "kanlm tokenize small-kan_glu --workers 16")
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--workers", type=click.IntRange(min=0), help="Processes; default: data.num_workers.")
@click.option("--shard", metavar="I/N", help="Only share I of N of the training tokens, for N machines.")
@click.option(
    "--push", metavar="URL", help="Publish the result: s3://..., hf://datasets/OWNER/NAME, a folder."
)
def tokenize_verb(config: str, overrides: tuple[str, ...], **settings) -> None:
    """Build the token cache of CONFIG ahead of training; resumable."""
    from kanlm.data.prepare import tokenize

    for line in tokenize(load_run_config(config, overrides), **settings):
        click.echo(line)


@verb("export", "kanlm export runs/tiny-kan_glu")
@click.argument("run", type=click.Path())
@click.option("--out", type=click.Path(), help="Folder to write; default RUN/hf.")
@click.option(
    "--onnx", is_flag=True, help="Also write OUT/onnx for ONNX Runtime; RUN may be a model's folder."
)
@click.option("--int8", is_flag=True, help="With --onnx: also a graph with int8 weights.")
@click.option(
    "--tables", is_flag=True, help="With --onnx: also an fp32 graph whose learned functions are tables."
)
@click.option("--page", is_flag=True, help="With --onnx: also a page that runs it in a browser; needs npm.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with a model RUN.")
@click.option("--push-to-hub", "repo", help="Also send it to the Hub as OWNER/NAME, privately.")
@click.option("--public", is_flag=True, help="For everyone to see.")
@click.option("--dry-run", is_flag=True, help="Only list what --push-to-hub would send.")
def export_verb(
    run: str,
    out: str | None,
    onnx: bool,
    int8: bool,
    tables: bool,
    page: bool,
    trust_remote_code: bool,
    repo: str | None,
    public: bool,
    dry_run: bool,
) -> None:
    """Write the trained RUN as a self-contained transformers folder.

    With --push-to-hub RUN may also be an exported folder, or a comparison: a model for each of its arms, and
    a collection of them.
    """
    if repo is None and (public or dry_run):
        raise click.UsageError(f"{'--public' if public else '--dry-run'} belongs to --push-to-hub OWNER/NAME")
    from kanlm.export import export, export_onnx

    if onnx or int8 or tables or page:
        click.echo(export_onnx(run, out, int8, page, trust_remote_code, tables))
    elif repo is None:
        click.echo(export(run, out))
    if repo is not None:
        from kanlm.hub import push

        push(run, repo, out=out, private=not public, dry_run=dry_run, echo=click.echo)


@verb(
    "eval",
    "kanlm eval runs/tiny-kan_glu/hf --data stdlib --out eval.json",
    short_help="Perplexity of causal language models; several are compared.",
)
@models_argument
@click.option(
    "--data",
    "texts",
    required=True,
    multiple=True,
    help="Held-out text: a file, folder, run folder, embedded source or hub id; may be repeated.",
)
@click.option("--split", help="Split of the data; default: the held-out one.")
@click.option("--text-column", default="text", show_default=True)
@click.option("--context-length", type=click.IntRange(min=2), help="Default: the model's own.")
@click.option("--stride", type=click.IntRange(min=1), help="Default: the context length.")
@click.option("--document-separator", help="Text files: a line between documents, e.g. <|endoftext|>.")
@click.option(
    "--invalid-utf8",
    type=click.Choice(["error", "replace"]),
    default="error",
    show_default=True,
    help="Bytes of a file that are not UTF-8.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--max-documents", type=click.IntRange(min=1))
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True
)
@click.option("--device", default=None, help="Default: cuda if there is one, else cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--out", type=click.Path(), help="Also write the JSON to this file.")
@click.option(
    "--token-losses",
    "losses",
    type=click.Path(),
    help="Write each token's loss: FILE.safetensors or .parquet.",
)
@click.option("--card", is_flag=True, help="Also show the reports in the card of the exported folder MODEL.")
def eval_verb(
    models: tuple[str, ...], texts: tuple[str, ...], as_json: bool, out: str | None, card: bool, **settings
) -> None:
    """Perplexity of any causal language MODELS (folders or hub ids); more than one are compared."""
    from kanlm.evaluation.table import evaluate_all, text_table
    from kanlm.export import card_of, update_card
    from kanlm.runs import write_json

    for model in models if card else ():
        card_of(model)  # a missing one is told before the hours of an evaluation
    evaluation = evaluate_all(models, texts, **settings)
    click.echo(json.dumps(evaluation.as_json(), indent=2) if as_json else text_table(evaluation))
    if out:  # shown first: a disk may be full
        write_json(out, evaluation.as_json())
    for model in models if card else ():
        update_card(model, [report for report in evaluation.reports if report.model == model])


@verb(
    "pairs",
    "kanlm pairs runs/a/hf runs/b/hf blimp.jsonl",
    short_help="Zero-shot grammar: minimal pairs (BLiMP form).",
)
@models_argument
@click.argument("file", type=click.Path())
@click.option("--each", type=click.IntRange(min=1), help="Of every paradigm the first so many pairs.")
@click.option("--batch-size", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--device", default=None, help="Default: cuda if there is one, else cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every paradigm in it.")
def pairs_verb(models: tuple[str, ...], file: str, as_json: bool, **settings) -> None:
    """Zero-shot grammar: share of the minimal pairs in FILE (BLiMP form) that MODELS get right.

    By phenomenon, with 95% intervals; several models are compared with the first, pair by pair.
    """
    from kanlm.evaluation import minimal_pairs as task

    results = [task.evaluate_minimal_pairs(model, file, **settings) for model in models]
    differences = [dataclasses.asdict(task.difference(one, results[0])) for one in results[1:]]
    zero_shot_output(models, results, differences, task.text_table(models, results), as_json)


@verb(
    "last-word",
    "kanlm last-word runs/a/hf runs/b/hf lambada.jsonl",
    short_help="Zero-shot: the word that ends a passage (LAMBADA form).",
)
@models_argument
@click.argument("file", type=click.Path())
@click.option("--first", type=click.IntRange(min=1), help="Only the first so many passages.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--device", default=None, help="Default: cuda if there is one, else cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def last_word_verb(models: tuple[str, ...], file: str, as_json: bool, **settings) -> None:
    """Zero-shot last words: how often MODELS know the word that ends a passage of FILE (LAMBADA form)."""
    from kanlm.evaluation import last_word as task

    results = [task.evaluate_last_words(model, file, **settings) for model in models]
    zero_shot_output(models, results, [], task.text_table(models, results), as_json)


def zero_shot_output(models, results, differences, table: str, as_json: bool) -> None:
    """The table, or JSON: a model's own object where there is one model."""
    if not as_json:
        click.echo(table)
        return
    reports = [{"model": model, **result.as_json()} for model, result in zip(models, results, strict=True)]
    content = reports[0] if len(reports) == 1 else {"reports": reports, "differences": differences}
    click.echo(json.dumps(content, indent=2))


@verb(
    "compare", "kanlm compare demo", short_help="Plan, train, judge and report arms of equal size; resumable."
)
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Runs, tokens, hours, detectable difference; trains nothing.")
def compare_verb(config: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Plan the arms of CONFIG, train, export and evaluate them, write the report; resumable."""
    if dry_run:
        from kanlm.compare.estimate import estimate

        click.echo(estimate(config, overrides))
        return
    from kanlm.compare.comparison import compare

    compare(config, overrides)


@verb(
    "report",
    "kanlm report runs/demo",
    short_help="Write a comparison's report again, or set two side by side.",
)
@click.argument("directory", type=click.Path())
@click.argument("other", type=click.Path(), required=False)
@click.option(
    "--bundle", type=click.Path(), help="Folder for bundle.json: what the report is made of, to commit."
)
def report_verb(directory: str, other: str | None, bundle: str | None) -> None:
    """Rebuild the report of a comparison from its artifacts, or its bundle.json, alone; or that of a study.

    With OTHER, a second comparison: both side by side.
    """
    from kanlm.compare import artifacts, beside, report

    if other is not None:
        click.echo(beside.side_by_side(directory, other))
    elif bundle is not None:
        click.echo(artifacts.write_bundle(directory, bundle))
    elif any((Path(directory) / name).is_file() for name in ("trials.jsonl", "plan.toml")):
        from kanlm.study.report import report as study_report

        click.echo(study_report(directory))
    else:
        click.echo(report.report(directory))


@cli.group("study", short_help="Many short trainings in phases, judged by paired seeds.")
def study_group() -> None:
    """The study behind the verdict, or one of your own.

    A study is a folder: its plan.toml (without it the shipped `study`), a line for each trial in
    trials.jsonl, and what `kanlm report FOLDER` makes of them.
    """


folder_option = click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="docs/results/study",
    show_default=True,
    help="Of the study.",
)


def study_command(name: str, example: str):
    """A subcommand for one folder, and the phases of its plan."""

    def decorated(function):
        function = click.argument("phases", metavar="[PHASE]...", nargs=-1)(folder_option(function))
        return study_group.command(name, epilog=f"\b\nExample:\n  {example}")(function)

    return decorated


@study_group.command("prepare", epilog="\b\nExample:\n  kanlm study prepare ~/corpora")
@click.argument("data_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def study_prepare_verb(data_dir: Path) -> None:
    """Write the shipped study's texts from DATA_DIR into runs/study/data."""
    from kanlm.study.texts import prepare

    prepare(data_dir)


@study_command("run", "kanlm study run --jobs 2 --folder runs/again final-0.3m-wikitext-2")
@click.option("--jobs", type=click.IntRange(1), default=1, help="Trials at once, each on one thread.")
def study_run_verb(folder: Path, phases: tuple[str, ...], jobs: int) -> None:
    """Train what each PHASE, or the plan, asks for and the folder has not yet; goes on where it stopped."""
    from kanlm.study.plan import StudyFolder
    from kanlm.study.runs import run, run_at_once

    if jobs > 1:
        run_at_once(jobs, StudyFolder(folder), phases)
    else:
        run(StudyFolder(folder), phases)


@study_command("baselines", "kanlm study baselines final-0.3m-wikitext-2")
def study_baselines_verb(folder: Path, phases: tuple[str, ...]) -> None:
    """Add n-grams and xz on the same test texts to the folder's baselines.json."""
    from kanlm.study.plan import StudyFolder
    from kanlm.study.texts import count

    count(StudyFolder(folder), phases)


@study_group.command("functions", epilog="\b\nExample:\n  kanlm study functions")
@folder_option
def study_functions_verb(folder: Path) -> None:
    """Write what the runs of the plan's phases `picture...` learned into the folder's functions.json."""
    from kanlm.study.picture import write_functions
    from kanlm.study.plan import StudyFolder

    click.echo(write_functions(StudyFolder(folder)))


@verb("status", "kanlm status runs/tiny-kan_glu")
@click.argument("run", type=click.Path())
def status_verb(run: str) -> None:
    """Where a RUN, or a comparison, stands, also while it runs."""
    from kanlm.compare import status as comparison
    from kanlm.train.status import status

    click.echo(comparison.status(run) if comparison.is_comparison(run) else status(run))


@verb("generate", 'kanlm generate runs/tiny-kan_glu/hf --prompt "def main("')
@model_argument
@click.option(
    "--prompt", "prompts", multiple=True, help="May be repeated (one batch); default: standard input."
)
@click.option(
    "--interactive", "-i", is_flag=True, help="Continue line after line; the default at a terminal."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 = greedy."
)
@click.option("--top-k", type=click.IntRange(min=0), default=50, show_default=True, help="0 = all.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that have this share together.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--device", default=None, help="Default: cuda if there is one, else cpu.")
@click.option(
    "--weights",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="int8: the native decoder reads a quarter of the bytes and rounds the weights.",
)
def generate_verb(model: str, prompts: tuple[str, ...], interactive: bool, **settings) -> None:
    """Continue texts with MODEL, streamed to standard output."""
    from kanlm.evaluation.generation import converse, generate, typed_lines

    if interactive or not prompts and sys.stdin.isatty():
        converse(model, itertools.chain(prompts, typed_lines()), **settings)
    else:
        generate(model, prompts or sys.stdin.read().removesuffix("\n"), **settings)  # as echo writes it


@verb(
    "inspect",
    "kanlm inspect runs/tiny-kan_glu/hf --data stdlib --out inspect/",
    short_help="What a model's functions do on real text, as one page.",
)
@model_argument
@click.option(
    "--out", type=click.Path(), default="inspect", show_default=True, help="Folder for the page and JSON."
)
@click.option("--data", help="Text as in `kanlm eval`; default: text that the model writes itself.")
@click.option("--split", help="Split of the data; default: the held-out one.")
@click.option("--tokens", type=int, default=4096, show_default=True, help="Half for fits, half for losses.")
@click.option(
    "--functions", type=click.IntRange(min=1), default=12, show_default=True, help="Drawn for each layer."
)
@click.option(
    "--weight",
    type=click.FloatRange(0, 1),
    default=0.2,
    show_default=True,
    help="Of a formula's simplicity against its fit.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.99,
    show_default=True,
    help="R^2 from which a formula replaces its function.",
)
def inspect_verb(model: str, out: str, data: str | None, **settings) -> None:
    """What the functions of MODEL do on real text, with controls: one HTML page and JSON."""
    from kanlm.interpret.inspect import inspect

    click.echo(inspect(model, out, data, **settings))


@verb(
    "prune",
    "kanlm prune runs/tiny-kan_glu/hf --keep 0.8 --data stdlib --out runs/tiny-kan_glu/pruned",
    short_help="Take the least important hidden channels out of a model.",
)
@model_argument
@click.option("--data", required=True, help="Text that decides what goes, as in `kanlm eval`.")
@click.option("--out", required=True, type=click.Path(), help="New folder for the pruned model.")
@click.option("--keep", type=float, default=0.8, show_default=True, help="Share that stays, in (0, 1].")
@click.option(
    "--what",
    type=click.Choice(["channels", "edges"]),
    default="channels",
    show_default=True,
    help="Hidden channels (a smaller model), or edge functions set to zero (the same size).",
)
@click.option("--split", help="Split of the data; default: the held-out one.")
@click.option("--tokens", type=click.IntRange(min=64), default=16_384, show_default=True)
def prune_verb(model: str, out: str, data: str, **settings) -> None:
    """Take the least important hidden channels out of MODEL and export what is left."""
    from kanlm.prune import prune

    click.echo(prune(model, out, data, **settings))


@verb(
    "convert",
    "kanlm convert HuggingFaceTB/SmolLM2-135M --arm kan_glu --out smollm2-kan --data stdlib",
    short_help="Turn a model of another family into a KAN, equal at the start.",
)
@model_argument
@click.option(
    "--arm",
    required=True,
    help="kan_glu (Llama-like models), kan_act or kan_grouped (GPT-2-like), kan (both, distilled).",
)
@click.option("--out", required=True, type=click.Path(), help="New folder for the converted model.")
@click.option(
    "--data", help="Text as in `kanlm eval`, for the perplexity and, with --arm kan, to learn from."
)
@click.option("--split", help="Split of the data; default: the held-out one.")
@click.option("--tokens", type=click.IntRange(min=256), default=65_536, show_default=True)
@click.option(
    "--steps", type=click.IntRange(min=1), default=300, show_default=True, help="--arm kan: steps a block."
)
@click.option("--groups", type=click.IntRange(min=1), default=8, show_default=True, help="Functions a layer.")
@click.option("--grid-size", type=click.IntRange(min=1), default=16, show_default=True)
def convert_verb(model: str, arm: str, out: str, **settings) -> None:
    """Turn a causal language MODEL of another family into a KAN that starts as the same model."""
    from kanlm.convert import convert

    click.echo(convert(model, arm, out, **settings))


@cli.group("bench", short_help="Speed and memory of KAN and MLP arms, side by side.")
def bench_group() -> None:
    """Side-by-side speed and memory of KAN and MLP arms, as a table and dated JSON."""


def bench_options(seconds: float):
    """What every benchmark takes."""

    def decorated(function):
        for option in (
            click.option("--out", type=click.Path(), help="JSON file; default: runs/benchmarks/, dated."),
            click.option(
                "--memory/--no-memory", default=True, show_default=True, help="Also measure peak memory."
            ),
            click.option("--seconds", type=click.FloatRange(min=1), default=seconds, show_default=True),
            click.option("--device", default="cpu", show_default=True),
            click.option(
                "--backend", default="auto", show_default=True, help="auto, reference, cpu or triton."
            ),
            click.option("--arm", "arms", multiple=True, help="Only these arms; may be repeated."),
        ):
            function = option(function)
        return function

    return decorated


@bench_group.command("layer", epilog="\b\nExample:\n  kanlm bench layer --inputs 512 --grid 8")
@click.option("--inputs", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--outputs", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--grid", type=click.IntRange(min=1), default=8, show_default=True, help="Grid intervals G.")
@click.option(
    "--order", type=click.IntRange(min=0, max=5), default=3, show_default=True, help="Spline order k."
)
@click.option("--tokens", type=click.IntRange(min=1), default=4096, show_default=True)
@bench_options(seconds=60.0)
def bench_layer_verb(**settings) -> None:
    """One full-edge KAN layer against an MLP layer and the peers, forward and backward."""
    from kanlm.bench.layer import run

    run(**settings)


@bench_group.command("train", epilog="\b\nExample:\n  kanlm bench train --size 1m --arm swiglu --arm kan_glu")
@click.option(
    "--size", default="1m", show_default=True, help="Parameters without embeddings: 0.3m, 1m, 10m or 100m."
)
@click.option("--compile", "compiled", is_flag=True, help="Each arm with torch.compile, too.")
@click.option("--optimizer", type=click.Choice(["adamw", "muon"]), default="adamw", show_default=True)
@bench_options(seconds=60.0)
def bench_train_verb(**settings) -> None:
    """Whole training steps of models with equally many parameters."""
    from kanlm.bench.train import run

    run(**settings)


@bench_group.command("decode", epilog="\b\nExample:\n  kanlm bench decode --size 1m")
@click.option(
    "--size", default="1m", show_default=True, help="Parameters without embeddings: 0.3m, 1m, 10m or 100m."
)
@click.option(
    "--path",
    "paths",
    multiple=True,
    help="native, eager, int8, onnx or llama; may be repeated. Default: all, the last three of two arms.",
)
@bench_options(seconds=40.0)
def bench_decode_verb(**settings) -> None:
    """Cached decoding, batch 1."""
    from kanlm.bench.decode import run

    run(**settings)


@bench_group.command("eval", epilog="\b\nExample:\n  kanlm bench eval --size 1m --arm gelu --arm kan_act")
@click.option(
    "--size", default="1m", show_default=True, help="Parameters without embeddings: 0.3m, 1m, 10m or 100m."
)
@bench_options(seconds=60.0)
def bench_eval_verb(**settings) -> None:
    """Scoring a text and reading a prompt by exported models, against the forward pass of training."""
    from kanlm.bench.reading import run

    run(**settings)


FULL, CLOSED = "free some space or choose another folder", "get the right to it or choose another folder"
BROKEN = "run the same command again, or choose a folder on another disk"
STORAGE_ERRORS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
    errno.EROFS: CLOSED,
    errno.EIO: BROKEN,
    errno.ESTALE: BROKEN,
    errno.EINTR: BROKEN,
    errno.EMFILE: "allow more open files (ulimit -n)",
}
"""What a disk answers, and the remedy."""


def complaint(error: BaseException) -> str | None:
    """The line for a user's mistake or a full disk; None for what is our own fault."""
    if isinstance(error, UserError):
        return one_line(error)
    if isinstance(error, FileNotFoundError):
        return f"{error.filename or one_line(error)}: no such file or folder"
    if isinstance(error, OSError):
        if error.errno not in STORAGE_ERRORS:
            return None
        where = Path(error.filename).resolve() if error.filename else "output"
        return f"{where}: {error.strerror}; {STORAGE_ERRORS[error.errno]}"
    if isinstance(error, SafetensorError):
        remedy = "free some space or choose another folder" if "os error" in str(error) else "write it again"
        return f"model file: {one_line(error)}; {remedy}"
    if isinstance(error, ValueError):
        return f"{one_line(error)} (KANLM_DEBUG=1 shows where)"
    return None


def main() -> None:
    """Run the command line and exit with its status."""
    logging.getLogger("kanlm").setLevel(logging.INFO)
    logging.getLogger("kanlm").addHandler(logging.StreamHandler())
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # "metadata block was not found"
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # a damaged file is our line
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except (OSError, ValueError, SafetensorError) as error:
        line = complaint(error)
        if line is None or os.environ.get("KANLM_DEBUG") == "1":
            raise
        launcher.tell(line)
        sys.exit(2)


if __name__ == "__main__":
    main()
