"""Run configuration: strict TOML, overrides, one-line errors that name key, value, rule and remedy."""

import json
import shutil
from pathlib import Path

import pytest

from kanlm.config import RunConfig, UserError, load_run_config, parse_table, with_overrides

CONFIGS = Path(__file__).parent.parent / "configs"

MINIMAL = """
name = "x"
[model]
hidden_size = 64
[train]
max_tokens = 1_000_000
"""


def written(tmp_path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_defaults_and_overrides(tmp_path):
    config = load_run_config(
        written(tmp_path, MINIMAL),
        ["train.learning_rate=0.003", "model.ffn_type=kan", "train.betas=[0.8, 0.9]"],
    )
    assert config.train.learning_rate == 0.003
    assert config.train.betas == (0.8, 0.9)
    assert config.model == {"hidden_size": 64, "ffn_type": "kan"}
    assert config.run_dir == Path("runs/x")


def test_overrides_leave_the_table_alone():
    table = {"train": {"max_tokens": 1}}
    assert with_overrides(table, ["train.max_tokens=2"]) == {"train": {"max_tokens": 2}}
    assert table == {"train": {"max_tokens": 1}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.max_tokens=2.5"], ["train.max_tokens", "2.5", "float"]),
        (["train.learning_rate=inf"], ["train.learning_rate", "inf", "finite"]),
        (["train.eps=nan"], ["train.eps", "nan"]),
        (["model.kan_grid_max=inf"], ["model", "kan_grid_max: inf is not a finite number"]),
        (["train.learing_rate=1e-3"], ["train.learing_rate", "unknown key", "did you mean 'learning_rate'"]),
        (["trian.max_tokens=1"], ["trian", "unknown key", "'train'"]),
        (["train.max_tokens=0"], ["train.max_tokens", "greater than or equal to 1", "0"]),
        (["train.schedule=cosin"], ["train.schedule", "'cosine', 'linear' or 'wsd'", "cosin"]),
        (["train.betas=[0.9, 1.5]"], ["train.betas", "[0, 1)"]),
        (["train.batch_size=6", "train.micro_batch_size=4"], ["train", "not a multiple"]),
        (["name=a/b"], ["name", "a/b"]),
        (["data.mixture=[{source='a', weight=-1.0}]"], ["data.mixture.0.weight", "-1.0"]),
        (["train"], ["'train'", "section.key=value"]),
        (["name.x=1"], ["name is a value, not a table"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, overrides, words):
    with pytest.raises(UserError) as caught:
        load_run_config(written(tmp_path, MINIMAL), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_key_missing_file_and_malformed_file(tmp_path):
    path = written(tmp_path, MINIMAL.replace("max_tokens = 1_000_000", ""))
    with pytest.raises(UserError, match=r"train.max_tokens: required"):
        load_run_config(path)
    with pytest.raises(UserError, match=r"no such config file; .* has: run.toml"):
        load_run_config(tmp_path / "rum.toml")
    path.write_text("name = ")
    with pytest.raises(UserError, match="not valid TOML"):
        load_run_config(path)


def test_whole_number_written_as_a_float_is_a_token_budget(tmp_path):
    config = load_run_config(written(tmp_path, MINIMAL), ["train.max_tokens=1e6"])
    assert config.train.max_tokens == 1_000_000 and isinstance(config.train.max_tokens, int)


def test_paths_of_a_run_are_found_from_anywhere(tmp_path, monkeypatch):
    """From its own directory as they are written; elsewhere from where it was trained, or from around it."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    run = project / "runs" / "x"
    run.mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("train.txt", "a.jsonl"):
        (project / name).write_text("text")
    data = {"source": "train.txt", "validation_source": "own/er", "mixture": [{"source": "*.jsonl"}]}
    table = {"name": "x", "model": {}, "data": data, "train": {"max_tokens": 1}}
    (run / "config.json").write_text(json.dumps(table))
    (run / "working_directory").write_text(f"{project}\n")

    def sources(run: Path) -> tuple[str, str | None, str]:
        data = load_run_config(run / "config.json").data
        return data.source, data.validation_source, data.mixture[0].source

    monkeypatch.chdir(project)
    assert sources(Path("runs/x")) == ("train.txt", "own/er", "*.jsonl")
    monkeypatch.chdir(elsewhere)
    expected = (str(project / "train.txt"), "own/er", str(project / "*.jsonl"))
    assert sources(run) == sources(Path("../project/runs/x")) == expected
    shutil.copytree(run, elsewhere / "moved")
    assert sources(elsewhere / "moved") == expected
    project.rename(tmp_path / "renamed")
    there = str(tmp_path / "renamed")
    assert sources(tmp_path / "renamed/runs/x") == (f"{there}/train.txt", "own/er", f"{there}/*.jsonl")


def test_config_json_of_a_run_is_a_config_file(tmp_path):
    config = load_run_config(written(tmp_path, MINIMAL))
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert load_run_config(path) == config
    path.write_text("[1]")
    with pytest.raises(UserError, match="expected a table of settings, got a list"):
        load_run_config(path)


def test_config_round_trips_through_json(tmp_path):
    config = load_run_config(written(tmp_path, MINIMAL))
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert parse_table(RunConfig, config.model_dump(mode="json"), "config.json") == config


@pytest.mark.parametrize(
    "path",
    sorted(p for k in ("tiny", "small", "base", "plan") for p in CONFIGS.glob(f"{k}-*.toml")),
    ids=lambda p: p.stem,
)
def test_shipped_run_configs_parse(path):
    assert load_run_config(path).name


@pytest.mark.parametrize("override", ["foo.bar=1", "data.block_size=abc", "train.batch_size=0"])
def test_a_mistake_in_an_override_is_not_blamed_on_the_file(override):
    path = CONFIGS / "tiny-kan.toml"
    with pytest.raises(UserError) as caught:
        load_run_config(path, ["train.max_tokens=100", override])
    assert str(caught.value).startswith(f"override {override!r}: ")
    with pytest.raises(UserError, match="tiny-kan.toml: train: batch_size 8 is not"):
        load_run_config(path, ["train.micro_batch_size=3"])


def test_weights_must_sum_to_a_positive_number(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        (CONFIGS / "tiny-kan.toml").read_text() + '\n[[data.mixture]]\nsource = "a.txt"\nweight = 0.0\n'
    )
    with pytest.raises(UserError, match="data.mixture: the weights sum to 0") as caught:
        load_run_config(path)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused_at_any_depth():
    for override in ("train.betas=[nan, 0.9]", "model.kan_grid_max=inf", "model.rope_parameters={theta=inf}"):
        table = {"name": "x", "model": {}, "train": {"max_tokens": 1000}}
        with pytest.raises(UserError, match="finite number"):
            parse_table(RunConfig, with_overrides(table, [override]), "file", [override])
