import json
import lzma
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from kanlm.config import UserError
from kanlm.evaluation.minimal_pairs import (
    MinimalPairs,
    Pair,
    difference,
    evaluate_minimal_pairs,
    read_pairs,
    score_pairs,
    text_table,
)
from kanlm.model import KanLMConfig, KanLMForCausalLM


class Letters:
    """A tokenizer of the letters a and b; </s> is 2."""

    bos_token_id, eos_token_id = None, 2

    def __call__(self, text, **settings):
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


class Unigram(nn.Module):
    """p(a) = 0.6, p(b) = 0.3, whatever came before."""

    def __init__(self, positions=8):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.6, 0.3, 0.1]).log())
        self.config = KanLMConfig(vocab_size=3, max_position_embeddings=positions)

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, 3))


def test_score_is_the_mean_over_paradigms_not_over_pairs():
    pairs = [
        Pair("one", good="aab", bad="abb"),  # more likely: a win
        Pair("two", good="ab", bad="a"),  # a longer sentence is less likely: a loss
        Pair("two", good="ba", bad="ab"),  # a tie: no win
        Pair("two", good="a", bad="b"),  # a win
    ]
    result = score_pairs(Unigram(), Letters(), pairs)
    assert result.paradigms == {"one": 1.0, "two": pytest.approx(1 / 3)}
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.pairs == 4


def test_batching_does_not_change_the_score(tmp_path):
    from kanlm.data.tokenizer import trained_tokenizer

    rng = torch.Generator().manual_seed(0)
    words = ["the", "cats", "cat", "sees", "see", "nobody", "ever"]
    sentences = [
        " ".join(words[i] for i in torch.randint(7, (size,), generator=rng).tolist())
        for size in (3, 5, 4, 9, 1, 2, 6, 6)
    ]
    pairs = [
        Pair(str(i % 2), good, bad)
        for i, (good, bad) in enumerate(zip(sentences[::2], sentences[1::2], strict=True))
    ]
    tokenizer = trained_tokenizer(iter(sentences), vocab_size=280)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = KanLMForCausalLM(KanLMConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes))
    results = [score_pairs(model, tokenizer, pairs, batch_size=size) for size in (2, 3, 16)]
    assert results[0] == results[1] == results[2]

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "pairs.jsonl"
    lines = [{"uid": pair.paradigm, "good": pair.good, "bad": pair.bad} for pair in pairs]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert evaluate_minimal_pairs(tmp_path, file) == results[0]


def test_pairs_are_read_from_either_form_and_from_archives(tmp_path):
    row = {"sentence_good": "a", "sentence_bad": "b", "UID": "agreement"}
    with lzma.open(tmp_path / "p.jsonl.xz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    assert list(read_pairs(tmp_path / "p.jsonl.xz")) == [Pair("agreement", "a", "b")]
    (tmp_path / "p.jsonl").write_text('{"good": "a", "bad": "b"}\n')
    assert list(read_pairs(tmp_path / "p.jsonl")) == [Pair("all", "a", "b")]


def test_the_first_pairs_of_every_paradigm_are_read(tmp_path):
    lines = [{"uid": str(i % 2), "term": "islands", "good": f"g{i}", "bad": "b"} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = list(read_pairs(tmp_path / "p.jsonl", each=2))
    assert [pair.good for pair in found] == ["g0", "g1", "g2", "g3"]
    assert {pair.phenomenon for pair in found} == {"islands"}


def test_phenomena_have_intervals_and_two_models_are_tested_on_the_same_pairs():
    half = [True, False] * 20
    phenomenon_of = {"a": "one", "b": "one", "c": "two"}
    model = MinimalPairs({"a": [True] * 40, "b": [True] * 40, "c": half}, phenomenon_of)
    other = MinimalPairs({"a": half, "b": half, "c": half}, phenomenon_of)
    share = other.phenomena["one"]
    assert (share.right, share.asked, share.share) == (40, 80, 0.5)
    assert share.low == pytest.approx(0.393, abs=1e-3) and share.high == pytest.approx(0.607, abs=1e-3)
    found = difference(model, other)
    assert found.accuracy == pytest.approx(1 / 3) and found.low < 0 < found.high, "three paradigms say little"
    assert (found.phenomena["one"].only_model, found.phenomena["one"].only_baseline) == (40, 0)
    assert found.phenomena["one"].p_value == pytest.approx(2 * 0.5**40)
    assert found.p_holm == {"one": pytest.approx(4 * 0.5**40), "two": 1.0}
    table = text_table(["gelu", "kan"], [other, model])
    assert (
        "kan - gelu: +33.33 points" in table and "one: +50.0 points, 40 pairs right alone against 0" in table
    )
    assert "  two:" not in table, "only what differs beyond chance is a line"


def test_mistakes_name_file_and_line(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"good": "a", "bad": "b"}\n{"good": "a"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:2: expected an object with good and bad"):
        list(read_pairs(file))
    file.write_text("not json\n")
    with pytest.raises(UserError, match=r"p\.jsonl:1"):
        list(read_pairs(file))
    with pytest.raises(UserError, match="no such file"):
        list(read_pairs(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="there is none"):
        score_pairs(Unigram(), Letters(), [])
    with pytest.raises(UserError, match="9 tokens, expected 1 to 8"):
        score_pairs(Unigram(positions=8), Letters(), [Pair("x", "a" * 9, "b")])
    with pytest.raises(UserError, match="batch_size"):
        score_pairs(Unigram(), Letters(), [Pair("x", "a", "b")], batch_size=1)


def test_blimp_is_complete():
    default = Path(__file__).parents[2].parent / "shared" / "data"
    file = Path(os.environ.get("KANLM_TEST_DATA", default)) / "blimp" / "blimp.jsonl.xz"
    if not file.is_file():
        pytest.skip(f"BLiMP is not at {file}; set KANLM_TEST_DATA to the folder of test corpora")
    pairs = list(read_pairs(file))
    assert len(pairs) == 67_000
    assert len({pair.paradigm for pair in pairs}) == 67
