"""From a run's folder to a model folder: complete, atomic, with a card that huggingface_hub reads."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from kanlm.config import RunConfig, UserError, parse_table
from kanlm.export import code_span, eval_reports, export, export_model, model_card, model_of, update_card
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.runs import EvalReport, RunDir, read_json, write_json
from kanlm.train.checkpoint import load_model
from kanlm.train.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of three steps."""
    folder = tmp_path_factory.mktemp("export")
    table = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_type": "kan_glu",
        },
        "tokenizer": {"vocab_size": 300},
        "data": {
            "source": "stories",
            "block_size": 32,
            "max_documents": 100,
            "cache_dir": str(folder / "cache"),
            "num_workers": 1,
        },
        "train": {
            "max_tokens": 3 * 4 * 32,
            "batch_size": 4,
            "eval_tokens": 64,
            "kernels": "reference",
            "mixed_precision": "no",
            "num_threads": 1,
        },
    }
    config = parse_table(RunConfig, table, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train(config)
    return config.run_dir


@pytest.fixture
def run(trained, tmp_path) -> RunDir:
    """A copy of the run to do with as a test likes."""
    return RunDir(shutil.copytree(trained, tmp_path / "tiny"))


def report(dataset: str, loss: float) -> EvalReport:
    sums = dict(tokens=1000, bytes=4000, words=800, documents=7, nll_nats=1000 * loss)
    ratios = dict(loss=loss, perplexity=2.0, word_perplexity=3.0, bits_per_byte=loss / 4 / 0.6931471805599453)
    return EvalReport(
        model="tiny",
        dataset=dataset,
        split="test",
        **sums,
        **ratios,
        context_length=32,
        stride=32,
        parameters=5,
        non_embedding_parameters=4,
        seconds=1.0,
        tokens_per_second=1000.0,
        data_sha256="0" * 64,
        dtype="float32",
        device="cpu",
        kanlm_version="0",
        versions={},
    )


def test_the_exported_model_is_the_checkpoint(run):
    folder = export(run.root)
    assert folder == run.hf
    config, weights = load_model(run.root)
    trained = KanLMForCausalLM(config)
    trained.load_state_dict(weights)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, config.vocab_size, (2, 16))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trained.eval()(ids).logits)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name)), name


def test_the_folder_is_complete(run, tmp_path):
    folder = export(run.root, tmp_path / "out" / "model")
    assert {path.name for path in folder.iterdir()} >= {
        "README.md",
        "basis.py",
        "config.json",
        "configuration_kanlm.py",
        "ffn.py",
        "ffn_kan.py",
        "generation_config.json",
        "kan.py",
        "model.safetensors",
        "modeling_kanlm.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not [path for path in folder.rglob("*") if path.is_dir() or path.suffix in (".bin", ".pt", ".pkl")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "naïve ☃\n\n  <|endoftext|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(run.tokenizer).get_vocab()
    settings = read_json(folder / "generation_config.json")
    assert (
        settings["eos_token_id"] == tokenizer.eos_token_id
        and settings["pad_token_id"] == tokenizer.pad_token_id
    )
    assert "kanlm_version" in read_json(folder / "config.json")


def test_the_older_checkpoint_stands_in_for_a_damaged_one(run):
    (newest,) = run.checkpoints.iterdir()
    later = shutil.copytree(newest, run.checkpoint(9))
    (later / "model.safetensors").write_bytes(b"not a checkpoint")
    model = AutoModelForCausalLM.from_pretrained(export(run.root))
    _, weights = load_model(run.root, step=3)
    assert torch.equal(model.model.norm.weight, weights["model.norm.weight"])


def test_card_before_and_after_evaluation(run):
    folder = export(run.root)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and {"kanlm", "kan_glu"} <= set(card.data.tags)
    assert card.data.eval_results is None and "Not evaluated yet." in card.text
    assert "`stories`" in card.text and "AutoModelForCausalLM.from_pretrained" in card.text
    assert "Licence of the data: " in card.text and "peak learning rate" in card.text
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" in card.text

    write_json(run.eval / "stories.json", report("stories", 1.5))
    write_json(run.eval / "WikiText-2 (raw).json", report("WikiText-2 (raw)", 2.5))
    update_card(folder, eval_reports(run))
    card = ModelCard.load(folder / "README.md")
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert len(results) == 8
    assert results["stories", "loss"] == 1.5 and results["WikiText-2 (raw)", "loss"] == 2.5
    index = card.data.to_dict()["model-index"]
    assert index[0]["name"] == "tiny" and len(index[0]["results"]) == 2
    assert "Not evaluated yet." not in card.text and "| stories (test) | 1,000 |" in card.text
    assert card.text.count("## Evaluation") == 1 and card.text.count("## Training") == 1

    once = (folder / "README.md").read_text()
    update_card(folder, eval_reports(run))
    assert (folder / "README.md").read_text() == once
    update_card(folder, [report("stories", 1.25)])
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert [result.metric_value for result in results if result.metric_type == "loss"] == [1.25]
    AutoModelForCausalLM.from_pretrained(folder)  # the folder still loads


def test_reports_that_exist_are_in_the_first_card(run):
    write_json(run.eval / "stories.json", report("stories", 1.5))
    text = (export(run.root) / "README.md").read_text()
    assert text.startswith("---\n") and "model-index:" in text and "| stories (test) |" in text


def test_hub_data_sets_are_in_the_front_matter(run):
    config = read_json(run.config)
    config["data"]["source"] = "roneneldan/TinyStories"
    write_json(run.config, config)
    assert ModelCard.load(export(run.root) / "README.md").data.datasets == ["roneneldan/TinyStories"]


def test_an_existing_folder_is_left_alone(run):
    run.hf.mkdir()
    (run.hf / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already; delete it"):
        export(run.root)
    assert [path.name for path in run.hf.iterdir()] == ["mine.txt"]


def test_a_failed_export_leaves_nothing(run, monkeypatch):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kanlm.export.write_text", full_disk)
    before = sorted(path.name for path in run.root.iterdir())
    with pytest.raises(OSError, match="No space left"):
        export(run.root)
    assert sorted(path.name for path in run.root.iterdir()) == before


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: run.config.unlink(), "not the folder of a run"),
        (lambda run: shutil.rmtree(run.checkpoints), "no intact checkpoint"),
        (lambda run: (run.tokenizer / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
    ids=["no run", "no checkpoint", "no tokenizer"],
)
def test_what_is_not_a_finished_run_is_a_user_error(run, break_it, message):
    break_it(run)
    with pytest.raises(UserError, match=message) as error:
        export(run.root)
    assert "\n" not in str(error.value) and not run.hf.exists()


def test_a_tokenizer_too_large_for_the_model(run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    model = KanLMForCausalLM(KanLMConfig(vocab_size=100, hidden_size=16, ffn_type="gelu"))
    with pytest.raises(
        UserError, match=f"vocab_size: the tokenizer has {len(tokenizer)} tokens and the model 100"
    ):
        export_model(model, tokenizer, tmp_path / "out", {})


def test_weights_that_do_not_fit_are_named(run):
    config, weights = load_model(run.root)
    lost = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    with pytest.raises(UserError, match="lacks model.norm.weight"):
        model_of(config, lost)
    with pytest.raises(UserError, match="has not, model.layers.9.bias"):
        model_of(config, weights | {"model.layers.9.bias": torch.ones(2)})


def test_a_card_shows_names_and_texts_as_they_are_written(run):
    evil = "<img src=x onerror=alert(1)>`|[a](javascript:b)\n# x"
    model = model_of(*load_model(run.root))
    facts = {
        "name": evil,
        "training": {"Data": code_span("a`<img src=x>`")},
        "eval_reports": [report(evil, 1.5)],
    }
    card = str(model_card(model, facts))
    assert "<img" not in card and "\n# x" not in card and card.count("](") == card.count("\\](") > 0
    row = next(line for line in card.splitlines() if "(test)" in line)
    assert row.replace("\\|", "").count("|") == 7


def test_no_licence_is_claimed_for_weights_of_other_texts(run):
    model = model_of(*load_model(run.root))
    stated, unstated = (model_card(model, {"stated_licence": stated}) for stated in (True, False))
    assert stated.data.license == "apache-2.0" and "weights and the code beside them" in stated.text
    assert unstated.data.license is None and "No licence of the weights is stated" in unstated.text
    config = json.loads(run.config.read_text())
    config["data"]["source"] = "someone/texts"
    run.config.write_text(json.dumps(config))
    card = ModelCard.load(export(run.root) / "README.md")
    assert "license" not in card.data.to_dict() and "No licence of the weights is stated" in card.text


def test_no_card_to_update(tmp_path):
    with pytest.raises(UserError, match="no model card"):
        update_card(tmp_path, [])


def test_the_config_says_nothing_about_how_the_run_went(run):
    config = json.loads((export(run.root) / "config.json").read_text())
    assert not {"train", "data", "kernels", "output_dir", "seed"} & set(config)
