"""`kanlm export --push-to-hub` against a stand-in for the Hub on this machine."""

import json
import shutil

import pytest
import torch
from hub_server import serving
from huggingface_hub import ModelCard, constants
from synthetic import eval_report, write

from kanlm import KanLMConfig, KanLMForCausalLM, hub
from kanlm.compare.artifacts import CompareDir
from kanlm.config import UserError
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.export import export_model, update_card
from kanlm.runs import EvalReport


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = trained_tokenizer(iter(["some text of a few words"] * 3), 270)
    config = KanLMConfig(
        vocab_size=270, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        kan_num_groups=2,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("hub") / "hf"
    return export_model(KanLMForCausalLM(config), tokenizer, out, {"name": "tiny"})


@pytest.fixture
def server(monkeypatch):
    with serving() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield running


def test_a_model_is_sent_whole_privately_in_one_commit(folder, server):
    lines: list[str] = []
    (address,) = hub.push(folder, "someone/tiny", echo=lines.append)
    repo = server.repos["someone/tiny"]
    assert address == f"{server.url}/someone/tiny" and repo["private"] is True and repo["commits"] == 1
    sent = {path: content for path, content in repo["files"].items() if path != ".gitattributes"}
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "Bearer hf_of_a_test" in server.tokens
    assert any("not evaluated yet" in line for line in lines)


def test_what_is_sent_is_a_card_with_its_results(folder, server, tmp_path):
    update_card(folder, [EvalReport.model_validate(eval_report(2.0, "hf", 1000))])
    hub.push(folder, "someone/evaluated", echo=lambda line: None)
    card = ModelCard(server.repos["someone/evaluated"]["files"]["README.md"].decode())
    assert {result.metric_type for result in card.data.eval_results} >= {"bits_per_byte", "perplexity"}


def test_a_dry_run_lists_every_file_and_needs_no_token(folder, server, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    lines: list[str] = []
    assert hub.push(folder, "someone/tiny", dry_run=True, echo=lines.append) == []
    assert all(path.name in lines[0] for path in folder.iterdir()) and "private" in lines[0]
    assert not server.repos and not server.tokens


def test_mistakes_are_one_line_and_nothing_is_sent(folder, server, monkeypatch, tmp_path):
    server.repos["someone/open"] = {"private": False, "files": {}, "commits": 0}
    with pytest.raises(UserError, match="public already; add --public"):
        hub.push(folder, "someone/open", echo=lambda line: None)
    with pytest.raises(UserError, match="write OWNER/NAME"):
        hub.push(folder, "a/b/c")
    with pytest.raises(UserError, match="has no config.json"):
        hub.push(tmp_path, "someone/none")
    server.refuse = "/commit/"
    with pytest.raises(UserError, match="someone/refused: .*(403|Forbidden)"):
        hub.push(folder, "someone/refused", echo=lambda line: None)
    assert not server.repos["someone/refused"]["files"]
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token .*HF_TOKEN.*--dry-run"):
        hub.push(folder, "someone/tiny")
    assert "someone/tiny" not in server.repos


def test_a_changed_file_is_not_sent(folder, server, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_size": 4}))
    with pytest.raises(UserError, match="config.json"):
        hub.push(copy, "someone/changed", echo=lambda line: None)
    assert not server.repos


def test_a_comparison_becomes_a_model_for_each_arm_and_a_collection(folder, server, tmp_path):
    arms = ("kan", "kan_glu", "swiglu")
    losses = {(arm, seed): 2.0 for arm in arms for seed in range(3)} | {("kan", 0): "diverged"}
    write(tmp_path, losses)
    for run in CompareDir(tmp_path).arms.iterdir():
        shutil.copytree(folder, run / "hf", dirs_exist_ok=True)
    lines: list[str] = []
    addresses = hub.push(tmp_path, "someone/study", echo=lines.append)
    assert list(server.repos) == [f"someone/study-{arm}" for arm in ("kan_glu", "swiglu", "kan")]
    (collection,) = server.collections.values()
    assert collection["private"] and sorted(collection["items"]) == sorted(server.repos)
    assert len(addresses) == 4 and "collections" in addresses[-1]
    assert not any("kan-seed0" in line for line in lines)
