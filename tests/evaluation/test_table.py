"""`kanlm eval` of several models on several texts: table, JSON, differences, losses, lossy tokenizers."""

import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pyarrow import parquet
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kanlm.cli import cli
from kanlm.config import UserError
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.evaluation import table
from kanlm.evaluation.perplexity import evaluate, held_out_documents, token_ids
from kanlm.evaluation.table import difference, evaluate_all, text_table, totals
from kanlm.model import KanLMConfig, KanLMForCausalLM

TEXT = [f"the {name} sat on the {place}, and {name} slept.\n" for name in "abcde" for place in "vwxyz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models `one` and `two` of one tokenizer, `three` of another, and two texts of 25 and 1 documents."""
    folder = tmp_path_factory.mktemp("table")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for seed, (name, vocab_size) in enumerate({"one": 280, "two": 280, "three": 260}.items()):
        tokenizer = trained_tokenizer(iter(TEXT), vocab_size)
        torch.manual_seed(seed)
        config = KanLMConfig(
            vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.3, **sizes
        )
        KanLMForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "many.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    (folder / "single.txt").write_text("".join(TEXT) * 2)
    return folder


def test_every_model_on_every_text(folder, tmp_path):
    models, texts = (
        [folder / name for name in ("one", "two", "three")],
        [folder / "many.jsonl", folder / "single.txt"],
    )
    found = evaluate_all(models, texts, losses=tmp_path / "losses.parquet")
    assert [(r.model, r.dataset) for r in found.reports] == [(str(m), str(t)) for m in models for t in texts]
    for report in found.reports:
        alone = evaluate(report.model, *held_out_documents(report.dataset))
        assert report.nll_nats == pytest.approx(alone.nll_nats, rel=1e-6)
    by = {(d.model, d.dataset): d for d in found.differences}
    assert len(by) == 4 and {d.baseline for d in found.differences} == {str(models[0])}
    two = by[str(models[1]), str(texts[0])]
    expected = found.reports[2].bits_per_byte - found.reports[0].bits_per_byte
    assert two.bits_per_byte == pytest.approx(expected) and two.low < two.bits_per_byte < two.high
    assert (two.pairs, two.paired_by) == (25, "documents")
    single = by[str(models[1]), str(texts[1])]
    assert single.paired_by == "parts of the text" and single.low < single.bits_per_byte < single.high
    other_tokens = by[str(models[2]), str(texts[1])]
    assert (other_tokens.pairs, other_tokens.low, other_tokens.p_value) == (1, None, None)
    assert "no interval: the text is one document" in table.difference_text(other_tokens)
    json.dumps(found.as_json(), allow_nan=False)
    for model, total in zip(models, totals(found.reports), strict=True):
        parts = [report for report in found.reports if report.model == str(model)]
        nats = sum(report.nll_nats for report in parts)
        assert total.loss == pytest.approx(nats / sum(report.tokens for report in parts))
        assert total.bits_per_byte * sum(r.bytes for r in parts) * math.log(2) == pytest.approx(nats)
        assert min(r.loss for r in parts) < total.loss < max(r.loss for r in parts)
    assert totals(found.reports[:1]) == []
    lines = text_table(found).splitlines()
    assert (
        len(lines) == 1 + 6 + 3 + 4
        and "all 2 texts (total)" in lines[7]
        and "bits/byte" in lines[0]
        and "95% interval" in lines[-2]
    )

    rows = parquet.read_table(tmp_path / "losses.parquet").to_pandas()
    for (model, data), part in rows.groupby(["model", "data"]):
        (report,) = [r for r in found.reports if (r.model, r.dataset) == (model, data)]
        assert len(part) == report.tokens and part.nll.sum() == pytest.approx(report.nll_nats, rel=1e-5)
    assert set(rows[rows.data == str(texts[0])].document) == set(range(25))


def test_the_interval_is_that_of_independent_documents():
    """Twenty documents of 10 bytes, differences of 0 and 1 nat in turns; the standard error by hand."""
    from kanlm.evaluation.perplexity import Score

    a = Score(document_nll=[5.0 + i % 2 for i in range(20)], document_bytes=[10] * 20)
    b = Score(document_nll=[5.0] * 20, document_bytes=[10] * 20)

    class Report:
        model, dataset, data_sha256 = "m", "text", "x"

    found = difference(Report, Report, a, b)
    error = math.sqrt(0.25 * 20 / 19) / math.sqrt(20) / 10 / math.log(2)
    assert found.bits_per_byte == pytest.approx(0.05 / math.log(2))
    assert found.high - found.bits_per_byte == pytest.approx(2.0930240544 * error)
    itself = difference(Report, Report, b, b)
    assert (itself.bits_per_byte, itself.low, itself.high, itself.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("models", "texts", "words"),
    [
        (["one", "none/at/all"], ["many.jsonl"], "model .*none/at/all: no such folder"),
        (["one", "many.jsonl"], ["many.jsonl"], "many.jsonl: no config.json there"),
        (["one"], ["many.jsonl", "none.txt"], "no such file or folder: .*none.txt"),
        (["one"], ["many.jsonl", "*.csv"], "no file matches"),
    ],
)
def test_a_mistake_in_the_last_argument_is_told_before_the_first_is_evaluated(
    folder, monkeypatch, models, texts, words
):
    monkeypatch.setattr(table, "score", lambda *a, **b: pytest.fail("evaluated"))
    with pytest.raises(UserError, match=words):
        evaluate_all([folder / name for name in models], [str(folder / name) for name in texts])


def test_losses_as_safetensors_are_those_of_the_text(folder, tmp_path):
    path = tmp_path / "losses.safetensors"
    found = evaluate_all([folder / "one"], [folder / "many.jsonl"], losses=path, stride=4, context_length=8)
    columns = load_file(path)
    assert columns["0.nll"].astype(np.float64).sum() == pytest.approx(found.reports[0].nll_nats, rel=1e-6)
    tokenizer = trained_tokenizer(iter(TEXT), 280)
    first = columns["0.token"][columns["0.document"] == 0].tolist()
    assert tokenizer.decode(first) == TEXT[0]
    with pytest.raises(UserError, match="--token-losses: expected a .safetensors or .parquet"):
        evaluate_all([folder / "one"], [folder / "many.jsonl"], losses=tmp_path / "losses.csv")


def test_the_verb_prints_a_table_or_json(folder, tmp_path):
    asked = [
        "eval",
        str(folder / "one"),
        "--data",
        str(folder / "many.jsonl"),
        "--out",
        str(tmp_path / "a.json"),
    ]
    without_card = CliRunner().invoke(cli, [*asked, "--card"])  # told before anything is evaluated
    assert "no model card" in str(without_card.exception) and not (tmp_path / "a.json").exists()
    table = CliRunner().invoke(cli, asked)
    assert table.exit_code == 0 and table.stdout.startswith("model ") and len(table.stdout.splitlines()) == 2
    printed = json.loads(CliRunner().invoke(cli, [*asked, "--json"]).stdout)
    assert printed["bits_per_byte"] == json.loads((tmp_path / "a.json").read_text())["bits_per_byte"]
    both = CliRunner().invoke(cli, [*asked[:2], str(folder / "two"), *asked[2:], "--json"])
    assert {"reports", "totals", "differences"} == set(json.loads(both.stdout))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_slow_evaluation_tells_how_far_it_is_and_the_time_left(folder, monkeypatch, terminal):
    """A short stride; the clock is one by which every batch takes a while. Without a terminal, lines."""

    class Errors(io.StringIO):
        def isatty(self):
            return terminal

    said, ticks = Errors(), itertools.count(step=4.0)
    monkeypatch.setattr("sys.stderr", said)
    monkeypatch.setattr("tqdm.std.time", lambda: next(ticks))
    evaluate_all([folder / "one"], [folder / "single.txt"], stride=2, batch_size=1)
    bars = re.findall(r"evaluating: +(\d+)%.*<(\d\d:\d\d)", said.getvalue().replace("\r", "\n"))
    shares = [int(share) for share, _ in bars]
    assert len(set(shares)) > 4 and shares == sorted(shares) and 0 < shares[len(shares) // 2] < 100
    assert {left for _, left in bars} - {"00:00"}


def test_a_tokenizer_that_loses_text_is_refused(folder):
    words = models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2, "</s>": 3}, unk_token="[UNK]")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")
    with pytest.raises(UserError, match="tokenizer: loses text: 'dog' comes back as '\\[UNK\\]'"):
        token_ids(lossy, "the dog")
    exact = trained_tokenizer(iter(TEXT), 280)
    for text in ("", " the cat", "naïve ☃ <|endoftext|>\n\n "):
        assert exact.decode(token_ids(exact, text)) == text
