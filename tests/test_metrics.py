import ast
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanlm import metrics, stats


def test_counts_of_a_document_by_hand():
    counts = metrics.text_counts("Naïve  café\nis open.")
    # 20 characters, of which ï and é take two bytes; words: Naïve, café, is, open.
    assert counts == metrics.TextCounts(documents=1, bytes=22, words=4, lines=1)


def test_white_space_at_an_end_counts_an_empty_word_as_the_harness_does():
    assert metrics.text_counts(" a b\n").words == 4


def test_counts_add_up_over_unequal_documents():
    assert metrics.total_counts(["a b", "c", "d e f\n"]) == metrics.TextCounts(3, 3 + 1 + 6, 2 + 1 + 4, 1)
    assert metrics.total_counts([]) == metrics.TextCounts()


def test_ratios_of_a_hand_worked_text():
    # 8 tokens of 3 bits each in 6 bytes and 2 words.
    nll_nats = 8 * 3 * math.log(2)
    ratios = metrics.ratios(nll_nats, tokens=8, num_bytes=6, words=2)
    assert ratios["loss"] == pytest.approx(3 * math.log(2), rel=1e-15)
    assert ratios["perplexity"] == pytest.approx(8, rel=1e-14)
    assert ratios["word_perplexity"] == pytest.approx(2**12, rel=1e-14)
    assert ratios["bits_per_byte"] == pytest.approx(4, rel=1e-15)


def test_a_perplexity_beyond_floats_is_infinite():
    assert metrics.word_perplexity(1e6, 1) == math.inf


@pytest.mark.parametrize("name", ["tokens", "bytes", "words"])
def test_an_empty_text_has_no_metric(name):
    counts = {"tokens": 4, "bytes": 4, "words": 4} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: got 0"):
        metrics.ratios(1.0, counts["tokens"], counts["bytes"], counts["words"])


@pytest.mark.parametrize("module", [metrics, stats])
def test_metrics_and_statistics_need_no_torch(module):
    nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "math" in imported
    assert not any(name.startswith(("torch", "transformers")) for name in imported)


@given(
    st.text(
        alphabet=st.one_of(
            st.sampled_from(" \n\t\x0b\x1c\x85\u2003\u200b"), st.characters(exclude_categories=["Cs"])
        )
    )
)
def test_words_are_those_of_a_split_at_white_space(document):
    assert metrics.text_counts(document).words == len(re.split(r"\s+", document))
