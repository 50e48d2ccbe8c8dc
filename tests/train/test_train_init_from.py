"""`init_from`: training goes on from an exported folder, in a run of its own."""

import json

import pytest
import torch

from kanlm.config import RunConfig, UserError, parsed
from kanlm.export import export
from kanlm.sizing import plan
from kanlm.train.checkpoint import load_model, load_tokenizer
from kanlm.train.loop import train


def test_training_begins_with_the_exported_model(run_config, run_table, losses, tmp_path):
    first = run_config()
    train(first)
    folder = export(first.run_dir, tmp_path / "exported")
    table = run_table("name=second", "train.learning_rate=1e-12", f"init_from={folder}", "seed=7")
    del table["model"]
    second = parsed(RunConfig, table, "test")
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
            train(parsed(RunConfig, run_table("name=third", f"init_from={folder}", override), "test"))
    assert not (second.run_dir.parent / "third").exists()

    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="holds a 'gpt2' model"):
        train(parsed(RunConfig, table | {"name": "third"}, "test"))


def test_the_model_table_is_needed_without_it(run_table):
    table = run_table()
    del table["model"]
    with pytest.raises(UserError, match="model: required, but absent"):
        parsed(RunConfig, table, "test")
