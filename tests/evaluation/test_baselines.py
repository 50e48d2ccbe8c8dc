import lzma
import math

import numpy as np
import pytest

from kanlm.config import UserError
from kanlm.evaluation.baselines import (
    KneserNey,
    kneser_ney_bits_per_byte,
    kneser_ney_by_order,
    xz_bits_per_byte,
)


def test_bigram_model_of_a_hand_worked_text():
    # Training: abacab with a, b, c = 0, 1, 2. Bigrams: <s>a 1, ab 2, ba 1, ac 1, ca 1.
    # Discount of bigrams: n1 = 4, n2 = 1: 4 / (4 + 2) = 2/3.
    # Unigrams count distinct left neighbours: a 3 (<s>, b, c), b 1, c 1. n1 = 2, n2 = 0: discount 0.75.
    # p1(a) = (3 - 0.75) / 5 + 0.75 * 3 / 5 / 3, p1(b) = p1(c) = (1 - 0.75) / 5 + 0.15.
    p1 = {"a": 2.25 / 5 + 0.15, "b": 0.25 / 5 + 0.15, "c": 0.25 / 5 + 0.15}
    # After a: b twice, c once; two distinct successors, so the mass given back is 2 * 2/3 / 3.
    after_a = {
        "a": 4 / 9 * p1["a"],
        "b": (2 - 2 / 3) / 3 + 4 / 9 * p1["b"],
        "c": (1 - 2 / 3) / 3 + 4 / 9 * p1["c"],
    }
    model = KneserNey([[0, 1, 0, 2, 0, 1]], vocab_size=3, order=2)
    first = (1 - 2 / 3) / 1 + 2 / 3 * p1["a"]  # <s> is followed by a alone
    for symbol, name in enumerate("abc"):
        found = np.exp(model.log_probabilities([[0, symbol]]))
        assert found == pytest.approx([first, after_a[name]], rel=1e-12)
    assert sum(after_a.values()) == pytest.approx(1, rel=1e-12)


def test_the_start_of_a_document_is_counted_by_occurrences():
    # Documents ab and ac; nothing stands left of <s>, so the bigram <s>a counts its two occurrences.
    # Every order has n1 = 2, n2 = 1, discount 1/2, but unigrams: a, b, c have one left neighbour each, 0.75.
    p1 = 0.25 / 3 + 0.75 * 3 / 3 / 3
    p2 = (2 - 0.5) / 2 + 0.5 * 1 / 2 * p1
    p3 = (2 - 0.5) / 2 + 0.5 * 1 / 2 * p2
    model = KneserNey([[0, 1], [0, 2]], vocab_size=3, order=3)
    assert np.exp(model.log_probabilities([[0]])) == pytest.approx([p3], rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_in_every_context(order):
    rng = np.random.default_rng(order)
    training = [rng.integers(0, 5, size) for size in (60, 40, 7, 1, 0)]
    model = KneserNey(training, vocab_size=6, order=order)  # symbol 5 never occurs
    for context in ([], [0], [1, 2], [5, 0], [3, 1, 2, 4], list(training[0][:4])):
        last = [np.exp(model.log_probabilities([[*context, symbol]])[-1]) for symbol in range(6)]
        assert sum(last) == pytest.approx(1, rel=1e-12)
        assert min(last) > 0


def test_documents_are_independent():
    rng = np.random.default_rng(0)
    model = KneserNey([rng.integers(0, 4, 50), rng.integers(0, 4, 30)], vocab_size=4, order=4)
    one, two = rng.integers(0, 4, 9), rng.integers(0, 4, 5)
    together = model.log_probabilities([one, two])
    apart = np.concatenate([model.log_probabilities([one]), model.log_probabilities([two])])
    assert together == pytest.approx(apart, rel=1e-14)
    assert not np.allclose(model.log_probabilities([np.concatenate([one, two])]), apart)


def test_more_context_helps_on_regular_text():
    training = "the cat sat on the mat and the dog sat on the log; " * 30
    held_out = "the dog sat on the mat and the cat sat on the log; "
    bits = [kneser_ney_bits_per_byte([training], [held_out], order) for order in (1, 2, 5)]
    assert bits[0] > 3 > bits[1] > 2 * bits[2]


def test_xz_counts_what_the_held_out_text_adds():
    rng = np.random.default_rng(0)
    noise = "".join(map(chr, rng.integers(33, 97, 20_000)))  # 6 bits a byte
    assert xz_bits_per_byte([noise], [noise]) < 0.1
    assert 5.9 < xz_bits_per_byte(["short"], [noise]) < 6.6
    archive = len(lzma.compress(("ab" + "cd").encode(), preset=9)) - len(lzma.compress(b"ab", preset=9))
    assert xz_bits_per_byte(["ab"], ["c", "d"]) == 8 * archive / 2


def test_bytes_are_what_is_counted():
    # An unseen script costs bits for each of its bytes.
    model = KneserNey([np.frombuffer(b"abcab", dtype=np.uint8)], vocab_size=256, order=2)
    nll = -model.log_probabilities([np.frombuffer("é".encode(), dtype=np.uint8)])
    assert len(nll) == 2
    assert kneser_ney_bits_per_byte(["abcab"], ["é"], order=2) == pytest.approx(nll.mean() / math.log(2))


def test_empty_texts_are_errors():
    for function in (kneser_ney_bits_per_byte, xz_bits_per_byte):
        with pytest.raises(UserError, match="held-out text is empty"):
            function(["abc"], [""])
    with pytest.raises(UserError, match="training text is empty"):
        kneser_ney_bits_per_byte([""], ["abc"])
    with pytest.raises(UserError, match="order"):
        kneser_ney_bits_per_byte(["abc"], ["abc"], order=0)
    with pytest.raises(UserError, match="63 bits"):
        KneserNey([[0, 3]], vocab_size=50_000, order=5)
    with pytest.raises(UserError, match="outside"):
        KneserNey([[0, 3]], vocab_size=3)


def test_orders_up_to_8_are_those_of_the_plain_model():
    """Bytes that the training text has not share a symbol; the numbers are the same."""
    rng = np.random.default_rng(3)
    letters = np.array(list("abcdé \n"))
    training = ["".join(rng.choice(letters, 400)) for _ in range(4)]
    held_out = ["".join(rng.choice(letters, 100)) + "zß€"]
    found = kneser_ney_by_order(training, held_out)
    assert list(found) == [3, 4, 5, 6, 7, 8]
    for order in (3, 5, 7):
        assert found[order] == pytest.approx(kneser_ney_bits_per_byte(training, held_out, order), rel=1e-12)
