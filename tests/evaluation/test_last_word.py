import json
import math

import pytest
import torch
from test_minimal_pairs import Letters
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from kanlm.config import UserError
from kanlm.evaluation.last_word import LastWords, Passage, read_passages, score_words, text_table
from kanlm.model import KanLMConfig


class SpacedLetters(Letters):
    """The letters a and b, and the space as 2, which is also the prefix."""

    def __call__(self, text, **settings):
        return {"input_ids": ["ab ".index(letter) for letter in text]}


class Copies(nn.Module):
    """After x it says x with probability 0.8, either other letter with 0.1."""

    def __init__(self, positions=8):
        super().__init__()
        self.table = nn.Parameter((torch.full((3, 3), 0.1) + 0.7 * torch.eye(3)).log())
        self.config = KanLMConfig(vocab_size=3, max_position_embeddings=positions)
        self.longest = 0

    def forward(self, input_ids, **kwargs):
        self.longest = max(self.longest, input_ids.shape[1])
        return CausalLMOutput(logits=self.table[input_ids])


def test_a_word_is_right_where_each_of_its_tokens_is_the_most_likely():
    passages = [Passage("ab", "aa"), Passage("b", "b")]
    found = score_words(Copies(), SpacedLetters(), passages)
    # " aa" after "ab": space 0.1, a 0.1, a 0.8; " b" after "b": space 0.1, b 0.1. The space is asked as well.
    assert found.answers == [False, False]
    assert found.nll == [pytest.approx(-math.log(0.008)), pytest.approx(-math.log(0.01))]


def test_batches_and_a_short_context_do_not_change_what_follows_from_the_last_token():
    passages = [Passage("ab" * n, "a") for n in (1, 2, 9, 3)]
    long, short = Copies(64), Copies(4)
    assert (
        score_words(long, SpacedLetters(), passages, batch_size=4).nll
        == score_words(short, SpacedLetters(), passages, batch_size=1).nll
    )
    assert long.longest == 20 and short.longest == 4


def test_the_table_compares_each_model_with_the_first():
    one, two = (
        LastWords([True, False, False], [1.0, 2.0, 3.0]),
        LastWords([True, True, False], [0.5, 1.0, 3.0]),
    )
    table = text_table(["gelu", "kan"], [one, two])
    assert "gelu   33.33% right" in table and "2.0000 nats/word" in table
    assert "kan - gelu: +33.33 points (p = 1, McNemar), -0.5000 nats/word" in table


def test_passages_are_read_from_either_form_and_mistakes_name_the_line(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"context": "a b ", "continuation": "c"}\n{"text": "a b c"}\n')
    assert list(read_passages(file)) == [Passage("a b", "c")] * 2
    for line in ("no json", '{"text": "oneword"}', json.dumps(["a"])):
        file.write_text(line + "\n")
        with pytest.raises(UserError, match=r"p\.jsonl:1: expected an object with context and continuation"):
            list(read_passages(file))
    with pytest.raises(UserError, match="no such file"):
        list(read_passages(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="there is none"):
        score_words(Copies(), SpacedLetters(), [])
