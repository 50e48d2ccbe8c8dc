"""`init_from`: training goes on from an exported folder, in a run of its own."""

import json

import pytest
import torch

from kanlm.config import RunConfig, UserError, parse_table
from kanlm.convert import convert
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.evaluation.loading import load_causal_lm
from kanlm.evaluation.perplexity import evaluate
from kanlm.export import export
from kanlm.initial import kan_coefficient_names
from kanlm.model.modeling_converted import CONVERTED
from kanlm.sizing import converted_flops, parameter_counts, plan
from kanlm.train.checkpoint import load_model, load_tokenizer
from kanlm.train.loop import train


def test_training_begins_with_the_exported_model(run_config, run_table, losses, tmp_path):
    first = run_config()
    train(first)
    folder = export(first.run_dir, tmp_path / "exported")
    table = run_table("name=second", "train.learning_rate=1e-12", f"init_from={folder}", "seed=7")
    del table["model"]
    second = parse_table(RunConfig, table, "test")
    train(second)
    config, weights = load_model(second.run_dir)
    assert config.ffn_type == "kan_glu" and config.intermediate_size == 24
    for name, weight in load_model(first.run_dir)[1].items():
        torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=0)
    assert losses(second)[1] < losses(first)[1] - 0.1
    assert load_tokenizer(second.run_dir).get_vocab() == load_tokenizer(first.run_dir).get_vocab()
    assert plan(second)["intermediate_size"] == 24

    for override, message in (
        ("model.intermediate_size=48", "model.intermediate_size: got 48, but the model of init_from has 24"),
        ("tokenizer.path=x", "init_from brings its own tokenizer"),
        ("data.block_size=64", "data.block_size: got 64, more than"),
        (f"init_from={first.run_dir}", "a run, not a model; run `kanlm export`"),
        ("init_from=nowhere", "nowhere has no config.json"),
    ):
        with pytest.raises(UserError, match=message):
            train(parse_table(RunConfig, run_table("name=third", f"init_from={folder}", override), "test"))
    assert not (second.run_dir.parent / "third").exists()

    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="holds a 'gpt2' model"):
        train(parse_table(RunConfig, table | {"name": "third"}, "test"))


def test_the_model_table_is_needed_without_it(run_table):
    table = run_table()
    del table["model"]
    with pytest.raises(UserError, match="model: required, but absent"):
        parse_table(RunConfig, table, "test")


TEXTS = [f"{age} cats see {count} birds.\n" for age in ("old", "new") for count in range(100)]
SIZES = {
    "llama": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2),  # and its dropout, which a resumed run has to repeat
}


def converted_folder(family: str, arm: str, folder):
    """A small model of `family` with learned functions, and the folder `folder`/kan that holds it."""
    torch.manual_seed(0)
    config, model = CONVERTED[family].config_class.__mro__[1], CONVERTED[family].__mro__[2]
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    tied = {} if family == "gpt2" else {"tie_word_embeddings": False}
    sizes = SIZES[family] | ids | tied | dict(vocab_size=300, max_position_embeddings=64)
    model(config(**sizes)).save_pretrained(folder / "original")
    trained_tokenizer(iter(TEXTS), 300).save_pretrained(folder / "original")
    (folder / "text.txt").write_text("".join(TEXTS))
    data = str(folder / "text.txt") if arm == "kan" else None
    convert(folder / "original", arm, folder / "kan", groups=4, data=data, tokens=2048, steps=1)
    return folder / "kan"


@pytest.mark.parametrize(
    "family, arm",
    [("llama", "kan_glu"), ("gpt2", "kan_grouped"), pytest.param("gpt2", "kan", marks=pytest.mark.slow)],
)
def test_converted_model_is_trained_resumed_and_exported(
    family, arm, run_table, interrupt_after, losses, tmp_path
):
    folder = converted_folder(family, arm, tmp_path)

    def config(name: str, *overrides: str) -> RunConfig:
        table = run_table(
            f"name={name}", f"init_from={folder}", "data.cross_document_attention=false", *overrides
        )
        del table["model"]
        return parse_table(RunConfig, table, "test")

    whole, parts = config("whole"), config("parts")
    record = train(whole)
    assert losses(whole)[12] < losses(whole)[1] - 0.1
    interrupt_after(5)
    assert train(parts).state == "interrupted"
    assert train(parts).state == "finished"
    weights = load_model(whole.run_dir)[1]
    for name, weight in load_model(parts.run_dir)[1].items():
        assert torch.equal(weight, weights[name]), name

    model, _ = load_causal_lm(export(whole.run_dir, tmp_path / "exported"))
    assert type(model) is CONVERTED[family] and (tmp_path / "exported/modeling_converted.py").is_file()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    card = (tmp_path / "exported/README.md").read_text()
    assert f"a `{family}` model with `{arm}` feed-forward blocks" in card and "`kanlm eval`" in card
    report = evaluate(tmp_path / "exported", TEXTS[:20], dataset="cats", split="all", context_length=32)
    assert 0 < report.loss < 10
    assert record.parameters == parameter_counts(model.config).total == model.num_parameters()
    with pytest.raises(
        UserError, match=f"a converted 'kanlm_{family}' model, and only kanlm's own are planned"
    ):
        plan(whole)
    asking = whole.model_copy(update={"name": "other", "model": {"ffn_type": "gelu"}})
    with pytest.raises(UserError, match="model.ffn_type: got 'gelu', but the model of init_from has None"):
        train(asking)


def test_functions_alone_of_a_converted_model_are_trained(run_table, tmp_path):
    table = run_table(
        f"init_from={converted_folder('llama', 'kan_glu', tmp_path)}", "train.trainable=functions"
    )
    del table["model"]
    config = parse_table(RunConfig, table, "test")
    train(config)
    before = load_causal_lm(tmp_path / "kan")[0]
    trained = kan_coefficient_names(before)
    after = load_model(config.run_dir)[1]
    changed = {name for name, weight in before.state_dict().items() if not torch.equal(weight, after[name])}
    assert changed == trained and len(trained) == 2


def test_flops_of_a_converted_model_are_those_of_its_matrices(tmp_path):
    config = load_causal_lm(converted_folder("llama", "kan_glu", tmp_path))[0].config
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 24) + 300 * 16  # attention and FFN of two layers, the head
    flops = converted_flops(config, block_size=32)
    assert (flops.matrix, flops.attention) == (6 * matrices, 12 * 2 * 16 * 32)
    assert flops.elementwise == 3 * 2 * 24 * (4 + 2 * 3 + 4)
