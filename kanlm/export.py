"""A trained run as a self-contained transformers folder, for `from_pretrained` and for the Hub as it is.

config.json, model.safetensors, generation_config.json     the model
configuration_kanlm.py, modeling_kanlm.py, ...              its code: loads where kanlm is not installed
tokenizer.json, tokenizer_config.json, ...                  the tokenizer
README.md                                                   the model card, with the evaluation results
SHA256SUMS                                                  of all files but the card, for `sha256sum -c`
"""

from __future__ import annotations

import copy
import html
import inspect
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kanlm import __version__, checksums
from kanlm.config import UserError
from kanlm.edge.onnx_export import must_be_new, needs, write_onnx
from kanlm.evaluation.loading import load_causal_lm
from kanlm.initial import model_class, tied_weights
from kanlm.model import KanLMForCausalLM
from kanlm.model.ffn import FeedForward, find_arm
from kanlm.runs import EvalReport, RunDir, new_folder, read_json, save_tokenizer, write_text
from kanlm.train.checkpoint import load_model, load_tokenizer

LOG = logging.getLogger(__name__)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
METRICS = {
    "bits_per_byte": "Bits per byte",
    "loss": "Loss (nats/token)",
    "perplexity": "Perplexity",
    "word_perplexity": "Word perplexity",
}
EVALUATION = "## Evaluation"


def export(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the newest intact checkpoint of the run in `run_dir` to the new folder `out` (run_dir/hf).

    Reports in run_dir/eval/ go into the card. The folder appears in one rename, whole or not at all.

    Raises:
        UserError: no such run or checkpoint, no tokenizer, or `out` exists.
    """
    run = RunDir(run_dir)
    out = run.hf if out is None else Path(out)
    if not run.config.is_file():
        raise UserError(
            f"{run.root}: not the folder of a run, it has no config.json; train one first: kanlm train"
        )
    _must_be_new(out)
    config, weights = load_model(run.root)
    return export_model(model_of(config, weights), load_tokenizer(run.root), out, card_facts(run))


def export_onnx(
    source: str | Path,
    out: str | Path | None = None,
    int8: bool = False,
    page: bool = False,
    trust_remote_code: bool = False,
    tables: bool = False,
) -> Path:
    """Write the folder `onnx` into the exported model of the run `source`, exporting it first where needed.

    `source` may also be the folder of a model, of kanlm or not.

    Raises:
        UserError: onnx missing, what `export` and `load_causal_lm` refuse, or the folder `onnx` exists.
    """
    needs("onnx", "onnxscript")
    folder = Path(source)
    is_model = (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json")
    if is_model and out is not None:
        raise UserError(f"--out: {source} is exported already and gets the folder onnx; leave --out away")
    if not is_model:
        folder = Path(out) if out is not None else RunDir(source).hf
        if not folder.exists():
            export(source, folder)
    must_be_new(folder / "onnx")
    model, tokenizer = load_causal_lm(folder, device="cpu", trust_remote_code=trust_remote_code)
    LOG.info("%s: tracing the graph; a model of ten layers takes some minutes", folder)
    place = Path(source).resolve()  # a page is for others to see: the run's name, not its path
    name = place.parent.name if place.name == "hf" else place.name
    return write_onnx(model, tokenizer, folder / "onnx", int8, f"kanlm: {name}" if page else None, tables)


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path, card: dict[str, Any]
) -> Path:
    """Write `model`, of kanlm or converted, and `tokenizer` to the new folder `out`.

    `card` may hold `name`, `training` (facts shown as a list; the values are Markdown, see `plain`),
    `datasets` (hub ids) and `eval_reports`. Special token ids that the model's config leaves open are the
    tokenizer's.

    Raises:
        UserError: `out` exists, or the tokenizer has more tokens than the model.
    """
    out = Path(out)
    _must_be_new(out)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"vocab_size: the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}; "
            "export the model with the tokenizer it was trained with"
        )
    model.config.kanlm_version = __version__
    for holder in (model.config, model.generation_config):
        for name in TOKEN_IDS:
            if getattr(holder, name, None) is None:
                setattr(holder, name, getattr(tokenizer, name))
    tokenizer = shipped_tokenizer(tokenizer, model.config.max_position_embeddings)
    reports = list(card.get("eval_reports", ()))
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        if isinstance(model, KanLMForCausalLM):
            add_arm_of_other_package(folder, find_arm(model.config.ffn_type))
        save_tokenizer(tokenizer, folder)
        for weights in folder.glob("*.safetensors"):  # safetensors writes for the owner alone
            weights.chmod((folder / "config.json").stat().st_mode)
        code = "auto_map" in read_json(folder / "tokenizer_config.json")
        facts = {**card, "eval_reports": reports, "tokenizer_has_code": code}
        write_text(folder / "README.md", str(model_card(model, facts)))
        write_text(folder / checksums.NAME, checksums.checksums(folder))
    return out


def add_arm_of_other_package(folder: Path, block: type[FeedForward]) -> None:
    """Put the file of an arm that is not kanlm's own beside the exported code, which then knows the arm.

    UserError where the file cannot stand alone: it may import kanlm.model's files, torch and transformers.
    """
    if block.__module__.startswith("kanlm.model."):
        return
    source = Path(inspect.getfile(block))
    text = source.read_text(encoding="utf-8")
    text = re.sub(r"^from kanlm\.model\.(\w+) import", r"from .\1 import", text, flags=re.MULTILINE)
    text = re.sub(r"^from kanlm\.model import", "from . import", text, flags=re.MULTILINE)
    if foreign := re.search(r"^\s*(?:from|import) (kanlm\S*|\.\.\S*)", text, flags=re.MULTILINE):
        raise UserError(
            f"{source}: an exported arm cannot import {foreign[1]}; import from kanlm.model's files, torch "
            "and transformers only"
        )
    (folder / source.name).write_text(text, encoding="utf-8")
    with (folder / "configuration_kanlm.py").open("a", encoding="utf-8") as file:
        # transformers follows this import when it fetches the model's code.
        file.write(f"\nfrom .{source.stem} import {block.__name__}  # noqa: E402, F401\n")


def shipped_tokenizer(tokenizer: PreTrainedTokenizerBase, positions: int) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` as its users expect it: special tokens in a text are read as such, so that chat
    templates and fine-tuning have a stop token, and truncation cuts at the model's positions.

    Text to train on or to score is kept apart from special tokens by an argument of the call.
    """
    shipped = copy.deepcopy(tokenizer)
    shipped.split_special_tokens = False
    shipped.model_max_length = positions
    shipped.init_kwargs |= {"split_special_tokens": False, "model_max_length": positions}
    return shipped


def model_of(config: Any, weights: dict[str, Any]) -> Any:
    """The fp32 model of `config` with exactly `weights`; a missing or unexpected name is an error."""
    model = model_class(config)(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    for names, what in (
        (set(missing) - set(tied_weights(config)), "lacks"),
        (unexpected, "has, and the model has not,"),
    ):
        if names:
            raise UserError(
                f"checkpoint: it {what} {', '.join(sorted(names))}; train the run with this version again"
            )
    model.tie_weights()
    return model.eval()


def card_facts(run: RunDir) -> dict[str, Any]:
    """What the model card says about `run`, read from its artifacts."""
    config = read_json(run.config)
    record = read_json(run.record) if run.record.is_file() else {}
    data = config.get("data", {})
    sources = [source["source"] for source in data.get("mixture") or [data]]
    training = {"Data": ", ".join(map(code_span, sources))}
    if settings := config.get("train"):
        training |= {
            "Batch": f"{settings['batch_size']} sequences of {data['block_size']} tokens",
            "Optimiser": f"{settings['optimizer']}, peak learning rate {settings['learning_rate']:g}, "
            f"{_kan_rate(settings)} for KAN coefficients, {settings['schedule']}",
            "Seed": str(config["seed"]),
        }
    if record:
        if licence := record.get("provenance", {}).get("data", {}).get("licence"):
            training["Licence of the data"] = plain(licence)
        training |= {
            "Tokens seen": f"{record['tokens']:,}",
            "Steps": f"{record['step']:,}",
            "Training time": f"{record['seconds']:,.0f} s",
        }
        commit = record.get("provenance", {}).get("git", {}).get("commit")
        if commit:
            training["Commit of kanlm"] = code_span(commit)
    return {
        "name": config["name"],
        "training": training,
        "stated_licence": not config.get("init_from") and set(sources) <= {"stdlib", "stories"},
        "datasets": [source for source in sources if _is_hub_id(source)],
        "eval_reports": eval_reports(run),
    }


def eval_reports(run: RunDir) -> list[EvalReport]:
    """The reports in run_dir/eval/, in the order of their file names."""
    return [EvalReport.model_validate(read_json(path)) for path in sorted(run.eval.glob("*.json"))]


def update_card(folder: str | Path, eval_reports: Iterable[EvalReport]) -> None:
    """Replace the evaluation results in the card of the exported `folder`: front matter and text.

    Raises:
        UserError: `folder` has no card.
    """
    path = card_of(folder)
    reports = list(eval_reports)
    card = ModelCard.load(path)
    card.data.eval_results = _eval_results(reports)
    card.text = card.text.partition(EVALUATION)[0].rstrip("\n") + "\n\n" + _evaluation_section(reports)
    write_text(path, str(card))


def card_of(folder: str | Path) -> Path:
    """The model card in the exported `folder`; UserError where there is none."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise UserError(f"{path}: no model card; expected a folder written by `kanlm export`")
    return path


def _kan_rate(settings: dict[str, Any]) -> str:
    """The learning rate of KAN coefficients in words."""
    if rate := settings.get("kan_learning_rate"):
        return f"{rate:g}"
    return f"{settings['kan_lr_multiplier']:g} times that"


def model_card(model: PreTrainedModel, facts: dict[str, Any]) -> ModelCard:
    """The card of `model`: YAML front matter (with a model-index) and a text that ends in the evaluation."""
    config, name = model.config, plain(facts.get("name", "kanlm"))
    reports = facts.get("eval_reports", [])
    converted = not isinstance(model, KanLMForCausalLM)
    arm = config.kan["arm"] if converted else config.ffn_type
    data = ModelCardData(
        model_name=name,
        license="apache-2.0" if facts.get("stated_licence") else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "kanlm",
            "kolmogorov-arnold-network" if find_arm(arm).family == "kan" else "mlp",
            arm,
        ],
        datasets=facts.get("datasets") or None,
        eval_results=_eval_results(reports),
    )
    embedded = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    embedded.add(model.get_output_embeddings().weight)
    embedding = sum(parameter.numel() for parameter in embedded)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ffn = f"`{arm}`"
    body = (
        f"a `{config.model_type.removeprefix('kanlm_')}` model with" if converted else "rotary attention and"
    )
    architecture = {
        "Feed-forward blocks": ffn + _functions(config),
        "Parameters": f"{parameters:,} ({parameters - embedding:,} without embeddings)",
        "Layers": config.num_hidden_layers,
        "Width": config.hidden_size,
        "Attention heads": config.num_attention_heads,
        "Vocabulary": f"{config.vocab_size:,}",
        "Positions": f"{config.max_position_embeddings:,}",
    }
    installed = (
        "`kanlm eval` and its other verbs use the installed package, and ask for no trust."
        if converted
        else "after `import kanlm` the installed package is used, and no trust is asked for."
    )
    trust = bool(facts.get("tokenizer_has_code"))
    text = f"""# {name}

A small decoder-only language model by kanlm {__version__}: {body} {ffn} feed-forward blocks.

{_bullets(architecture)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code={trust})
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer(text, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

`path` is this folder or its id on the Hub. The code beside the weights needs torch and transformers alone;
{installed}

## Training

{_bullets(facts.get("training", {})) or "Not recorded."}

{_licence_sentence(facts)}

A base model: it continues text, it was not taught to follow instructions, and nothing was done against wrong
or harmful text.

"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}{_evaluation_section(reports)}")


def _functions(config: Any) -> str:
    """What a card says of the learned functions, after the arm."""
    if not hasattr(config, "ffn_type"):
        kan = config.kan
        return f" (`{kan['basis']}`, {kan['grid_size']} intervals of order {kan['order']})"
    norm = " with a hidden norm" if config.hidden_norm else ""
    if find_arm(config.ffn_type).family != "kan":
        return norm
    return norm + f" (`{config.kan_basis}`, {config.kan_grid_size} intervals of order {config.kan_order})"


def _licence_sentence(facts: dict[str, Any]) -> str:
    if facts.get("stated_licence"):
        return "The weights and the code beside them are licensed under Apache-2.0."
    return (
        "The code beside the weights is licensed under Apache-2.0. No licence of the weights is stated: it "
        "is for their owner to choose, within what the text they were trained on allows; write it as "
        "`license:` into the front matter of this card."
    )


def plain(text: object) -> str:
    """`text` on one line of Markdown, shown as it is: no HTML, link, table column or code comes out of it."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escaped)


def code_span(text: object) -> str:
    """`text` as Markdown code, without what would end it or stand as HTML in a careless reader."""
    line = " ".join(str(text).split()).replace("`", "'")
    return f"`{line.replace('<', '&lt;').replace('>', '&gt;')}`"


def _bullets(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _evaluation_section(reports: list[EvalReport]) -> str:
    if not reports:
        return f"{EVALUATION}\n\nNot evaluated yet.\n"
    rows = ["| Data | Tokens | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for report in reports:
        values = " | ".join(f"{getattr(report, metric):.4f}" for metric in METRICS)
        rows.append(f"| {plain(report.dataset)} ({plain(report.split)}) | {report.tokens:,} | {values} |")
    return f"{EVALUATION}\n\n" + "\n".join(rows) + "\n"


def _eval_results(reports: list[EvalReport]) -> list[EvalResult] | None:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^A-Za-z0-9._/-]+", "-", report.dataset),
            dataset_name=plain(report.dataset),
            dataset_split=plain(report.split),
            metric_type=metric,
            metric_name=label,
            metric_value=getattr(report, metric),
        )
        for report in reports
        for metric, label in METRICS.items()
    ] or None


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()


def _must_be_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists already; delete it, or choose another folder with --out")
