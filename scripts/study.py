"""The study behind the verdict: many short trainings, two at once, judged on text that no choice looks at.

    python scripts/study.py prepare DATA_DIR     writes runs/study/data: train, valid and test of each corpus
    python scripts/study.py run [PHASE ...]      trains what configs/study.toml plans and is not done yet
    python scripts/study.py baselines            n-grams and xz on the same test texts
    python scripts/study.py report               writes docs/results/study/report.md and report.json

`run` may be started several times at once (one thread each): a trial is taken by one process. Every finished
trial is a line of docs/results/study/trials.jsonl; one that was interrupted is trained again from its
checkpoint.

Corpora: `wikitext-2`, and `mixed`, equal parts of Python sources, novels, textbooks and stories. Hyper-
parameters are chosen by `valid`; `test` is read by the tables of final phases only. Both are cut from
documents that training never sees.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import lzma
import math
import os
import shutil
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kanlm import kernels
from kanlm.compare.judgement import ArmLosses, Judgement, judge, learned_nothing, sentence
from kanlm.config import RunConfig, parse_table
from kanlm.data import tokenizer_for
from kanlm.data.cache import TokenCache, cached
from kanlm.data.corpus import split_sources
from kanlm.evaluation.baselines import kneser_ney_by_order, xz_bits_per_byte
from kanlm.evaluation.last_word import read_passages, score_words
from kanlm.evaluation.minimal_pairs import read_pairs, score_pairs
from kanlm.evaluation.perplexity import _blocks, _token_nll
from kanlm.export import export_model, model_of
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.ffn import find_arm
from kanlm.model.learned_function import LearnedFunction
from kanlm.runs import RunDir, read_json, write_json
from kanlm.sizing import architecture, matched_width, parameter_counts, training_flops_per_token
from kanlm.stats import Rung, holm, paired_difference, size_ratio, standard_error
from kanlm.train.checkpoint import load_model
from kanlm.train.loop import train

ROOT = Path("runs/study")
PLAN = Path("configs/study.toml")
RESULTS = Path("docs/results/study/trials.jsonl")
SEPARATOR = "<|endoftext|>"
BYTES_A_TOKEN = 2.59
"""Of the vocabulary of 1,024, in both corpora within 0.2%."""
PAIRS_EACH, LAST_WORDS = 100, 1_000
"""Zero-shot questions: pairs of each of BLiMP's 67 paradigms, passages of LAMBADA."""
FROZEN = 1e-12
"""A rate at which coefficients of about 1 stay as they are in fp32."""
AVERAGED, AVERAGED_EVERY = 8, 16
"""Of a final phase's run, the mean weights of the last 8 checkpoints, 16 steps apart, are judged, too."""
SEGMENTS = 64
"""The test text is scored in so many equal parts, whose spread is its sampling error."""

MIXED = {
    "python": "pystdlib-3.11.7",
    "novels": "eltec-eng",
    "textbooks": "openstax-ccby",
    "stories": "tinystories-mini",
}
"""The parts of `mixed` and their folders; each is a corpus of its own, too."""
TRAINED_ON, HELD_OUT = 5_800_000, 300_000
"""Bytes of each part of `mixed` in train, and in valid and test."""

SIZES = {
    "0.1m": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
    "0.3m": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 360},
    "0.6m": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
    "1.2m": {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5, "intermediate_size": 640},
}
"""GELU models; every other arm gets the width with as many parameters."""


@click.group()
def study() -> None:
    """Train and judge the arms of the study."""


@study.command()
@click.argument("data_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def prepare(data_dir: Path) -> None:
    """Write the corpora from the folder with wikitext-2, the parts of `mixed`, BLiMP and LAMBADA."""
    out = ROOT / "data"
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        text = lzma.open(data_dir / "wikitext-2" / f"{split}.txt.xz", "rt", encoding="utf-8").read()
        # One document an article; a line " = Title = " begins it.
        articles = [[]]
        for line in text.splitlines(keepends=True):
            if line.startswith(" = ") and not line.startswith(" = ="):
                articles.append([])
            articles[-1].append(line)
        write_documents(out / f"wikitext-2.{split}.txt", ["".join(a) for a in articles if "".join(a).strip()])
    for source, name in (("blimp/blimp", "blimp"), ("zeroshot/lambada_openai", "lambada")):
        shutil.copy(data_dir / f"{source}.jsonl.xz", out / f"{name}.jsonl.xz")
    parts: dict[str, list[str]] = defaultdict(list)
    for name, folder in MIXED.items():
        held_out = [
            document
            for split in ("valid", "test")
            if (path := data_dir / folder / f"{split}.txt.xz").is_file()
            for document in read_documents(path)
        ]
        # Long documents are cut in pieces, so that valid and test get some of each.
        pieces = [d[i : i + 20_000] for d in held_out for i in range(0, len(d), 20_000)]
        part = {
            "train": read_documents(data_dir / folder / "train.txt.xz", TRAINED_ON),
            "valid": up_to(pieces[0::2], HELD_OUT),
            "test": up_to(pieces[1::2], HELD_OUT),
        }
        for split, documents in part.items():
            parts[split] += documents
            write_documents(out / f"{name}.{split}.txt", documents)
    shuffle = np.random.default_rng(0)
    for split, documents in parts.items():
        write_documents(
            out / f"mixed.{split}.txt", [documents[i] for i in shuffle.permutation(len(documents))]
        )


def read_documents(path: Path, size: int | None = None) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        documents = [d.strip("\n") for d in file.read().split(f"\n{SEPARATOR}\n")]
    documents = [d for d in documents if d.strip()]
    return documents if size is None else up_to(spread(documents), size)


def spread(documents: list[str]) -> list[str]:
    """In a seeded order, long ones cut in pieces, so that a prefix is a fair sample."""
    pieces = [d[i : i + 50_000] for d in documents for i in range(0, len(d), 50_000)]
    return [pieces[i] for i in np.random.default_rng(1).permutation(len(pieces))]


def up_to(documents: list[str], size: int) -> list[str]:
    sizes = np.cumsum([len(document.encode()) for document in documents])
    return documents[: int(np.searchsorted(sizes, size)) + 1]


def write_documents(path: Path, documents: list[str]) -> None:
    path.write_text(f"\n{SEPARATOR}\n".join(documents) + "\n", encoding="utf-8")
    print(f"{path}: {len(documents)} documents, {path.stat().st_size:,} bytes")


OF_A_PHASE = ("name", "about", "arms", "seeds", "ladder")
"""Keys of a phase that change none of its trials."""


def plan() -> list[dict[str, Any]]:
    return tomllib.loads(PLAN.read_text(encoding="utf-8"))["phase"]


def trials_of(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The planned trials in their order; lists in the plan are tried in every combination."""
    found = []
    for phase in plan():
        if names and phase["name"] not in names:
            continue
        common = {key: value for key, value in phase.items() if key not in OF_A_PHASE}
        rows = []
        for arm in phase["arms"]:
            table = {**common, **arm}
            keys = [key for key, value in table.items() if isinstance(value, list)]
            for values in itertools.product(*(table[key] for key in keys)):
                rows.append({**table, **dict(zip(keys, values, strict=True))})
        # Seed after seed, so that a phase that is cut short still has paired seeds.
        for seed in phase["seeds"]:
            found += [{**row, "seed": seed} for row in rows]
    return found


def key_of(trial: dict[str, Any]) -> str:
    """A name from everything that decides the trial's result."""
    fields = [f"{key}={trial[key]}" for key in sorted(trial) if key != "role"]
    return ",".join(fields)


def run_config(trial: dict[str, Any]) -> RunConfig:
    """The run of a trial, its width solved to the parameters of the GELU model of its size."""
    corpus = ROOT / "data" / trial["corpus"]
    sizes = SIZES[trial["size"]]
    base = KanLMConfig(vocab_size=trial["vocab_size"], max_position_embeddings=128, ffn_type="gelu", **sizes)
    own = {
        key: value for key, value in trial.items() if key.startswith("kan_") and key != "kan_learning_rate"
    }
    own["hidden_norm"] = trial.get("hidden_norm", False)
    fields = {**sizes, "vocab_size": trial["vocab_size"], "max_position_embeddings": 128, **own}
    own_base = KanLMConfig(**{**fields, "ffn_type": "gelu"})
    sized, _ = matched_width(own_base, trial["arm"], parameter_counts(base).non_embedding)
    train_table = {
        "max_tokens": trial["tokens"],
        "batch_size": 8,
        "optimizer": trial.get("optimizer", "muon"),
        "learning_rate": trial["learning_rate"],
        "eval_every": 0,
        "save_minutes": 60.0,
        "save_every": AVERAGED_EVERY if trial.get("role") == "final" else 0,
        "keep_last": AVERAGED,
        "min_lr_ratio": trial.get("min_lr_ratio", 0.1),
    }
    if trial.get("frozen"):
        train_table["kan_learning_rate"] = FROZEN
    for name in ("kan_learning_rate", "kan_betas", "weight_decay", "schedule", "max_grad_norm"):
        if name in trial:
            train_table[name] = trial[name]
    table = {
        "name": name_of(trial),
        "output_dir": str(ROOT / "runs"),
        "seed": trial["seed"],
        "model": {**sizes, **own, "ffn_type": trial["arm"], "intermediate_size": sized.intermediate_size},
        "tokenizer": {"vocab_size": trial["vocab_size"]},
        "data": {
            "source": f"{corpus}.train.txt",
            "validation_source": f"{corpus}.valid.txt",
            "document_separator": SEPARATOR,
            "block_size": 128,
            "cache_dir": str(ROOT / "cache"),
        },
        "train": train_table,
    }
    return parse_table(RunConfig, table, "study")


def begun_with_functions(trial: dict[str, Any], config: RunConfig) -> RunConfig:
    """The run of `config`, its functions begun at the shapes of the kept run of seed `functions_of`.

    All other weights are the draws of the trial's own seed.
    """
    own = {key: value for key, value in trial.items() if key not in ("functions_of", "frozen")}
    learned = {**own, "seed": trial["functions_of"], "keep": True, "zero_shot": True}
    if trial.get("frozen"):
        learned["kan_learning_rate"] = trial["frozen"]  # at which they were learned
    source = trained_model(run_config(learned))
    return begun_at(trial, config, coefficients_of(source))


def begun_with_waves(trial: dict[str, Any], config: RunConfig) -> RunConfig:
    """The run of `config`, the first `waves` functions of each layer begun as `gelu_wave`."""
    torch.manual_seed(trial["seed"])
    model = KanLMForCausalLM(architecture(config))
    waves = KanLMForCausalLM(KanLMConfig(**{**model.config.to_dict(), "kan_initial": "gelu_wave"}))
    shapes, count = coefficients_of(model), trial["waves"]
    for name, value in coefficients_of(waves).items():
        shapes[name] = torch.cat((value[:count], shapes[name][count:]))
    return begun_at(trial, config, shapes)


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


def name_of(trial: dict[str, Any]) -> str:
    return f"{trial['arm']}-{hashlib.sha256(key_of(trial).encode()).hexdigest()[:12]}"


@study.command()
@click.argument("phases", nargs=-1)
def run(phases: tuple[str, ...]) -> None:
    """Train the planned trials that are not done yet, the plan's first ones first."""
    torch.set_num_threads(1)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    (ROOT / "locks").mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    while True:
        done = {row["key"] for row in results()}
        for trial in trials_of(phases):  # read anew each time: the plan may have grown
            if key_of(trial) in done:
                continue
            lock = FileLock(ROOT / "locks" / name_of(trial))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                if key_of(trial) in {row["key"] for row in results()}:
                    continue
                result = train_and_judge(trial)
                with FileLock(f"{ROOT}/results.lock"), RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
            finally:
                lock.release()
            break
        else:
            return


def results() -> list[dict[str, Any]]:
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def train_and_judge(trial: dict[str, Any]) -> dict[str, Any]:
    config = run_config(trial)
    if "functions_of" in trial:
        config = begun_with_functions(trial, config)
    if "waves" in trial:
        config = begun_with_waves(trial, config)
    result: dict[str, Any] = {"key": key_of(trial), **trial}
    print(key_of(trial), flush=True)
    try:
        with one_function_for_all_layers() if trial.get("shared") else nullcontext():
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


@contextmanager
def one_function_for_all_layers() -> Iterator[None]:
    """Within, functions of all layers take one step, by their mean gradient: begun equal, they stay so."""

    def share(optimizer, *_) -> None:
        for group in optimizer.param_groups:
            if group["name"] == "kan":
                mean_gradient = torch.stack([p.grad for p in group["params"]]).mean(dim=0)
                for parameter in group["params"]:
                    parameter.grad.copy_(mean_gradient)

    hook = register_optimizer_step_pre_hook(share)
    try:
        yield
    finally:
        hook.remove()


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
    source = config.data.validation_source.replace(".valid.", f".{split}.")
    other = config.model_copy(update={"data": config.data.model_copy(update={"validation_source": source})})
    return cached(split_sources(other.data, "validation"), other, tokenizer, "validation")


@torch.no_grad()
def segment_nll(model: torch.nn.Module, cache: TokenCache, block_size: int = 128) -> np.ndarray:
    """Summed nats of SEGMENTS equal parts of the text, each block scored by itself, [SEGMENTS]."""
    targets = len(cache) - 1
    starts = range(0, targets, block_size)
    sums = np.zeros(SEGMENTS)
    for i in range(0, len(starts), 32):
        batch = starts[i : i + 32]
        inputs, labels, _ = _blocks(cache, batch, block_size, targets, True)
        nll = _token_nll(model(input_ids=inputs, use_cache=False).logits, labels)
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


@study.command()
def baselines() -> None:
    """Add to docs/results/study/baselines.json what counting and compressing reach on the test texts.

    From all of the training text, and from its first documents, as many bytes as the tokens of each final
    phase are.
    """
    path = RESULTS.with_name("baselines.json")
    found = read_json(path) if path.is_file() else {}
    final = [phase for phase in plan() if phase.get("role") == "final"]
    wanted = {
        counted(phase["corpus"], tokens): (phase["corpus"], tokens)
        for phase in final
        for tokens in (None, phase["tokens"])
    }
    for name, (corpus, tokens) in wanted.items():
        if name in found:
            continue
        train, test = (
            [
                d.strip("\n")
                for d in (ROOT / "data" / f"{corpus}.{split}.txt").read_text("utf-8").split(SEPARATOR)
            ]
            for split in ("train", "test")
        )
        documents = train if tokens is None else up_to(train, round(tokens * BYTES_A_TOKEN))
        found[name] = {
            "bytes": sum(len(document.encode()) for document in documents),
            "kneser_ney_bits_per_byte": kneser_ney_by_order(documents, test, range(3, 9)),
            "xz_bits_per_byte": xz_bits_per_byte(documents, test),
        }
        print(name, found[name], flush=True)
        write_json(path, found)


def counted(corpus: str, tokens: int | None) -> str:
    return f"{corpus}, all" if tokens is None else f"{corpus}, {tokens} tokens"


@study.command()
@click.option("--out", default="docs/images/functions.png")
def picture(out: str) -> None:
    """Draw the learned functions of the run of the phase `picture`, whose folder is kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    [trial] = trials_of(("picture",))
    config = run_config(trial)
    model = trained_model(config)
    cache = text_cache(config, tokenizer_for(config), "valid")
    inputs, *_ = _blocks(cache, range(0, 32 * 128, 128), 128, 32 * 128, True)
    seen: dict[str, torch.Tensor] = {}
    functions = {name: m for name, m in model.named_modules() if isinstance(m, LearnedFunction)}
    for name, module in functions.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    with torch.no_grad():
        model(input_ids=inputs, use_cache=False)
    groups = next(iter(functions.values())).groups
    figure, axes = plt.subplots(len(functions), groups, figsize=(1.5 * groups, 1.6 * len(functions)), dpi=110)
    x = torch.linspace(-4, 4, 400)
    for row, (name, module) in zip(axes, functions.items(), strict=True):
        start = LearnedFunction(
            groups, groups=groups, grid_size=module.basis.grid_size, initial=module.initial
        )
        learned = LearnedFunction(groups, groups=groups, grid_size=module.basis.grid_size)
        learned.load_state_dict(module.state_dict())
        points = x[:, None].expand(-1, groups)
        with torch.no_grad():
            curves, begun = learned(points), start(points)
        values = seen[name].reshape(-1, groups, module.channels // groups)
        for group, axis in enumerate(row):
            axis.hist(
                values[:, group].flatten().numpy(), bins=60, range=(-4, 4), density=True, color="#d4d4dc"
            )
            axis.plot(x, begun[:, group], ":", color="#374151", linewidth=1)
            axis.plot(x, curves[:, group], color="#c2410c", linewidth=1.6)
            axis.set(xlim=(-4, 4), ylim=(-1.2, 3.2), xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_color("#e5e7eb")
        row[0].set_ylabel(f"layer {name.split('.')[2]}", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(out)
    print(out)


LABELS = (
    "arm",
    "hidden_norm",
    "kan_num_groups",
    "kan_grid_size",
    "kan_initial",
    "min_lr_ratio",
    "weight_decay",
)


def label_of(row: dict[str, Any]) -> str:
    """The arm of a trial for a reader, e.g. `gelu, normed`."""
    parts = [row["arm"]] + (["normed"] if row.get("hidden_norm") else [])
    if "functions_of" in row:
        shapes = "frozen at shapes" if "frozen" in row else "from shapes"
        parts.append(f"{shapes} of seed {row['functions_of']}")
    elif "frozen" in row:
        parts.append("frozen")
    if "waves" in row:
        parts.append(f"{row['waves']} functions of a layer from gelu_wave")
    if "shared" in row:
        parts.append("one function for all layers")
    return ", ".join(parts + [f"{key}={row[key]}" for key in LABELS[2:] if key in row])


def rates_of(row: dict[str, Any]) -> str:
    own = f" / {row['kan_learning_rate']:g}" if "kan_learning_rate" in row else ""
    own = " / 0" if "frozen" in row else own
    return f"{row['learning_rate']:g}{own}"


@study.command()
def report() -> None:
    """Write docs/results/study/report.md and report.json from trials.jsonl: every number from there."""
    rows = {row["key"]: row for row in results()}
    parts, judged = [HEADER], []
    for phase in plan():
        done = [rows[key] for trial in trials_of((phase["name"],)) if (key := key_of(trial)) in rows]
        if not done:
            continue
        title = f"## {phase['name']}\n\n{phase.get('about', '')}\n"
        if phase.get("role") == "final":
            if len({row["arm"] for row in done}) < 2:
                continue  # nothing to judge yet
            found, text = judged_phase(phase, done)
            judged += found
        else:
            text = seeds_table(done) if len(phase["seeds"]) > 1 else rates_table(done)
        parts.append(f"{title}\n{text}")
    parts += ladders(rows)
    RESULTS.with_name("report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_json(RESULTS.with_name("report.json"), {"verdict": {"judgements": judged}})
    print(RESULTS.with_name("report.md"))


HEADER = """# The study: learned activations against fixed ones at equal parameters

Written by `python scripts/study.py report` from trials.jsonl (a line for each training) and
configs/study.toml (the plan). Loss in nats/token: lower is better. Rates are chosen by the validation text
with a seed that no verdict uses; only final phases read the test text. The twin of `kan_act, normed` is
`gelu, normed`: the same block with the function fixed at its start. "Detectable" is the true difference that
so many seeds find in 80% of studies, "text" what another test text of this kind would change in the
difference (standard error over 64 parts)."""


def rates_table(done: list[dict[str, Any]]) -> str:
    """Every trial of a search, the best of each arm marked."""
    by_arm = defaultdict(list)
    for row in done:
        by_arm[label_of(row)].append(row)
    lines = ["| arm | rates of matrices / coefficients | validation | seed |", "|---|---|---|---|"]
    for label, own in sorted(by_arm.items(), key=lambda item: min(r.get("valid", math.inf) for r in item[1])):
        best = min(own, key=lambda row: row.get("valid", math.inf))
        for row in sorted(own, key=lambda row: (row["learning_rate"], row.get("kan_learning_rate", 0))):
            loss = f"{row['valid']:.4f}" if "valid" in row else "diverged"
            loss = f"**{loss}**" if row is best else loss
            lines.append(f"| {label} | {rates_of(row)} | {loss} | {row['seed']} |")
    return "\n".join(lines)


def seeds_table(done: list[dict[str, Any]]) -> str:
    """Trials of several seeds: the mean of each, and its paired difference to the normed GELU."""
    by_trial: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in done:
        by_trial[label_of(row), rates_of(row)][row["seed"]] = row.get("valid", math.inf)
    twin = next((own for (label, _), own in by_trial.items() if label == "gelu, normed"), {})
    lines = [
        "| arm | rates of matrices / coefficients | validation | seeds | less the normed GELU, 95% |",
        "|---|---|---|---|---|",
    ]
    for (label, rates), own in sorted(by_trial.items(), key=lambda item: fmean([*item[1].values()])):
        seeds = sorted(set(own) & set(twin)) if own is not twin else []
        gap = ""
        if len(seeds) > 1:
            found = paired_difference([own[s] for s in seeds], [twin[s] for s in seeds])
            gap = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
        lines.append(f"| {label} | {rates} | {fmean([*own.values()]):.4f} | {len(own)} | {gap} |")
    return "\n".join(lines)


def judged_phase(phase: dict[str, Any], done: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The judgements of a final phase and their table; the validation text chooses the baseline."""
    by_arm = defaultdict(list)
    for row in done:
        by_arm[label_of(row)].append(row)
    arms = [
        ArmLosses(
            label,
            "control" if "frozen" in own[0] else find_arm(own[0]["arm"]).family,
            validation={row["seed"]: row["valid"] for row in own if "valid" in row},
            test={row["seed"]: row["test"] for row in own if "test" in row},
            diverged=[row["seed"] for row in own if row["state"] == "diverged"],
            bits_per_byte={row["seed"]: row["test_bits_per_byte"] for row in own if "test" in row},
        )
        for label, own in by_arm.items()
    ]
    size, counts = f"{phase['corpus']} {phase['size']}", counts_of(phase)
    idle = [
        arm.name
        for arm in arms
        if arm.bits_per_byte and learned_nothing(fmean([*arm.bits_per_byte.values()]), counts)
    ]
    judgements = [
        replace(one, text_error_nats=text_error(by_arm, one))
        for one in judge(arms, size=size, learned_nothing=idle)
    ]
    lines = [
        "| arm | rates | parameters | MFLOPs a token | seeds | validation | test | bits per byte | "
        "functions at their start |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(arms, key=lambda arm: np.mean(list(arm.validation.values() or [math.inf]))):
        own = by_arm[arm.name]
        fixed = [r["test_with_initial_functions"] for r in own if "test_with_initial_functions" in r]
        cells = [
            f"{np.mean(list(values.values())):.4f}"
            for values in (arm.validation, arm.test, arm.bits_per_byte)
        ]
        cells.append(f"{np.mean(fixed):.4f}" if fixed else "")
        size = next((row["non_embedding_parameters"] for row in own if "valid" in row), 0)
        lines.append(
            f"| {arm.name} | {rates_of(own[0])} | {size:,} | {megaflops(own[0]):.3f} | {len(arm.test)} | "
            f"{' | '.join(cells)} |"
        )
    lines += ["", *(f"- {sentence(one)}{beaten(one, counts)}" for one in judgements), *counting(phase), ""]
    lines += [
        "| arm against | seeds | difference | interval | bootstrap | sign flips p | detectable | text |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for one in judgements:
        # Against its own twin too, which is the attribution: what the learning of the function gave.
        lines += [difference_row(one)] + [
            difference_row(other)
            for twin in arms
            if twin.family == "mlp" and twin.name != one.baseline
            for other in judge([next(a for a in arms if a.name == one.arm), twin])
        ]
    lines += spreads(arms, judgements)
    lines += averaging(by_arm, judgements)
    lines += zero_shot_table(by_arm, judgements)
    return [{**one.as_dict(), "phase": phase["name"]} for one in judgements], "\n".join(lines)


def megaflops(trial: dict[str, Any]) -> float:
    """Of a training step, for each token."""
    return training_flops_per_token(architecture(run_config(trial)), 128) / 1e6


def text_error(by_arm: dict[str, list[dict[str, Any]]], one: Judgement) -> float | None:
    """What another test text of this kind would change in the difference, from its segments, nats/token."""
    own, other = (
        {row["seed"]: row for row in by_arm[name] if "test" in row} for name in (one.arm, one.baseline)
    )
    seeds = sorted(set(own) & set(other))
    if not seeds:
        return None
    gaps = [np.subtract(own[seed]["test_segments"], other[seed]["test_segments"]) for seed in seeds]
    tokens = sum(own[seeds[0]]["test_segments"]) / own[seeds[0]]["test"]
    return standard_error(np.mean(gaps, axis=0).tolist(), [tokens / SEGMENTS] * SEGMENTS)


def spreads(arms: list[ArmLosses], judgements: list[Judgement]) -> list[str]:
    """What pairing by seed (equal draws by name, equal order of data) does to the spread of differences."""
    lines = []
    for one in judgements:
        own, other = (next(arm.test for arm in arms if arm.name == name) for name in (one.arm, one.baseline))
        seeds = sorted(set(own) & set(other))
        if len(seeds) < 3:
            continue
        a, b = (np.array([losses[seed] for seed in seeds]) for losses in (own, other))
        paired, apart = np.std(a - b, ddof=1), math.sqrt(np.var(a, ddof=1) + np.var(b, ddof=1))
        lines.append(
            f"\nStandard deviation over seeds: {one.arm} {np.std(a, ddof=1):.4f}, {one.baseline} "
            f"{np.std(b, ddof=1):.4f}; of the differences {paired:.4f} in pairs of one seed, {apart:.4f} if "
            "seeds were unrelated."
        )
    return lines


def averaging(by_arm: dict[str, list[dict[str, Any]]], judgements: list[Judgement]) -> list[str]:
    """The differences with the last checkpoints averaged, beside those of the same seeds without."""
    lines = []
    for one in judgements:
        own, other = (
            {row["seed"]: row for row in by_arm[name] if "test_averaged" in row}
            for name in (one.arm, one.baseline)
        )
        seeds = sorted(set(own) & set(other))
        if len(seeds) < 2:
            continue
        lines += [
            "",
            f"| test, weights of {len(seeds)} seeds | {one.arm} | {one.baseline} | difference | interval | "
            "spread |",
            "|---|---|---|---|---|---|",
        ]
        for words, key in (("the last", "test"), (f"mean of {AVERAGED} checkpoints", "test_averaged")):
            a, b = ([rows[seed][key] for seed in seeds] for rows in (own, other))
            gap, spread = paired_difference(a, b), np.std(np.subtract(a, b), ddof=1)
            lines.append(
                f"| {words} | {fmean(a):.4f} | {fmean(b):.4f} | {gap.mean:+.4f} | "
                f"{gap.low:+.4f} to {gap.high:+.4f} | {spread:.4f} |"
            )
    return lines


def ladders(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Power laws over the phases of each ladder: how many times the MLP's parameters the KAN needs."""
    by_ladder = defaultdict(list)
    for phase in plan():
        if "ladder" in phase:
            by_ladder[phase["ladder"]].append(phase)
    parts = []
    for name, phases in by_ladder.items():
        rungs, lines = (
            [],
            ["| parameters | tokens | seeds | KAN | MLP | difference |", "|---|---|---|---|---|---|"],
        )
        for phase in phases:
            arms: dict[str, dict[int, dict[str, Any]]] = {"kan": {}, "mlp": {}}
            for trial in trials_of((phase["name"],)):
                row = rows.get(key_of(trial), {})
                if "test" in row:
                    arms[find_arm(row["arm"]).family][row["seed"]] = row
            seeds = sorted(set(arms["kan"]) & set(arms["mlp"]))
            if not seeds:
                continue
            own, other = ([arms[f][seed] for seed in seeds] for f in ("kan", "mlp"))
            losses = [[row["test"] for row in both] for both in (own, other)]
            sizes = [both[0]["non_embedding_parameters"] for both in (own, other)]
            rungs.append(Rung(*map(float, sizes), *losses))
            gap = f"{fmean(losses[0]) - fmean(losses[1]):+.4f}"
            if len(seeds) > 1:
                found = paired_difference(*losses)
                gap += f" ({found.low:+.4f} to {found.high:+.4f})"
            lines.append(
                f"| {sizes[0]:,} | {phase['tokens']:,} | {len(seeds)} | {fmean(losses[0]):.4f} | "
                f"{fmean(losses[1]):.4f} | {gap} |"
            )
        if not rungs:
            continue
        parts.append(f"## Ladder: {name}\n\n" + "\n".join(lines) + "\n\n" + ladder_sentence(rungs))
    return parts


def ladder_sentence(rungs: list[Rung]) -> str:
    if len(rungs) < 3:
        return f"{len(rungs)} of the sizes are trained; a power law needs three."
    found = size_ratio(rungs)
    by_size = ", ".join(
        f"{float(size):,.0f}: {'beyond' if value is None else f'{value:.2f}'}"
        for size, value in found.by_size.items()
    )
    laws = "; ".join(
        f"{arm} {fit.irreducible:.2f} + ({fit.scale:.3g} / N)^{fit.exponent:.3f}"
        for arm, fit in (("KAN", found.fit), ("MLP", found.other_fit))
    )
    ratio = "no ratio" if found.ratio is None else f"{found.ratio:.2f} times the MLP's parameters"
    if found.low is not None:
        ratio += f" ({found.low:.2f} to {found.high:.2f}, 95%)"
    short = f" Too short to say: {found.too_short}." if found.too_short else ""
    return (
        f"For equal loss the KAN needs {ratio}, claimed 1/100; by size {by_size}. Loss in nats/token of N "
        f"parameters: {laws}.{short}"
    )


def zero_shot_table(by_arm: dict[str, list[dict[str, Any]]], judgements: list[Judgement]) -> list[str]:
    """BLiMP and LAMBADA of each judged arm beside its baseline, paired by seed, Holm over the lines."""
    lines = []
    for one in judgements:
        own, other = (
            {row["seed"]: row for row in by_arm[name] if "blimp" in row} for name in (one.arm, one.baseline)
        )
        seeds = sorted(set(own) & set(other))
        if len(seeds) < 2:
            continue
        asked = {
            "LAMBADA, nats a word": lambda row: row["lambada_nats"],
            "LAMBADA, % right": lambda row: 100 * row["lambada_accuracy"],
            "BLiMP, % over paradigms": lambda row: 100 * row["blimp"],
        }
        asked |= {
            f"BLiMP, {name.replace('_', ' ')}, %": lambda row, name=name: 100 * row["blimp_phenomena"][name]
            for name in own[seeds[0]]["blimp_phenomena"]
        }
        rows = [
            ([value(own[s]) for s in seeds], [value(other[s]) for s in seeds]) for value in asked.values()
        ]
        found = [paired_difference(*row) for row in rows]
        adjusted = holm([difference.p_value for difference in found])
        lines += [
            "",
            f"| zero-shot | {one.arm} | {one.baseline} | difference | 95% interval | p (Holm) |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {fmean(a):.3f} | {fmean(b):.3f} | {gap.mean:+.3f} | "
            f"{gap.low:+.3f} to {gap.high:+.3f} | {p:.2g} |"
            for name, (a, b), gap, p in zip(asked, rows, found, adjusted, strict=True)
        ]
    return lines


def counts_of(phase: dict[str, Any]) -> list[dict[str, Any]]:
    """What n-grams and xz reach from as much text as the phase's models saw; empty before `baselines`."""
    path = RESULTS.with_name("baselines.json")
    row = read_json(path).get(counted(phase["corpus"], phase["tokens"])) if path.is_file() else None
    if row is None:
        return []
    orders = row["kneser_ney_bits_per_byte"]
    order, best = min(orders.items(), key=lambda item: item[1])
    return [
        {"name": f"Kneser-Ney of order {order}", "bits_per_byte": best, "orders": orders},
        {"name": "xz", "bits_per_byte": row["xz_bits_per_byte"]},
    ]


def beaten(one: Judgement, counts: list[dict[str, Any]]) -> str:
    """What a sentence has to add where counting or compressing predicts the text better than both arms."""
    bits = [value for value in (one.arm_bits_per_byte, one.baseline_bits_per_byte) if value is not None]
    better = [row for row in counts if bits and row["bits_per_byte"] <= min(bits)]
    if not better:
        return ""
    listed = " and ".join(f"{row['name']} ({row['bits_per_byte']:.4f})" for row in better)
    return f" From as much text, {listed} predict{'s' if len(better) == 1 else ''} better than both."


def counting(phase: dict[str, Any]) -> list[str]:
    """What needs no neural network on the phase's test text."""
    path = RESULTS.with_name("baselines.json")
    lines = []
    for tokens, words in (
        (phase["tokens"], "as much training text as the models saw"),
        (None, "all training text"),
    ):
        row = read_json(path).get(counted(phase["corpus"], tokens)) if path.is_file() else None
        if row is None:
            continue
        order, best = min(row["kneser_ney_bits_per_byte"].items(), key=lambda item: item[1])
        lines.append(
            f"- Counting, from {words} ({row['bytes']:,} bytes): Kneser-Ney of order {order} "
            f"{best:.4f} bits per byte, xz {row['xz_bits_per_byte']:.4f}."
        )
    return lines


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def difference_row(one: Judgement) -> str:
    def pair(interval: Any) -> str:
        return f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""

    if one.difference_nats is None:
        return f"| {one.arm} against {one.baseline} | 0 | | | | | | |"
    p = "" if one.p_sign_flip is None else p_text(one.p_sign_flip)
    detectable = "" if one.detectable_nats is None else f"{one.detectable_nats:.4f}"
    text = "" if one.text_error_nats is None else f"{one.text_error_nats:.4f}"
    return (
        f"| {one.arm} against {one.baseline} | {one.seeds} | {one.difference_nats:+.4f} | "
        f"{pair(one.interval_nats)} | {pair(one.bootstrap_nats)} | {p} | {detectable} | {text} |"
    )


if __name__ == "__main__":
    study()
