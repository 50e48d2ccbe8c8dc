"""The stories' entropy is exact: a text has one derivation, and its bits are those of its choices."""

import hashlib
import math
import random
from collections import Counter

import pytest
from scipy.stats import chisquare

from kanlm.data import documents, token_cache, tokenizer_for
from kanlm.data.stories import (
    THINGS,
    RandomChoices,
    counted,
    default_stories,
    known_bits,
    number,
    sentences,
    stories,
)


class Undecided(Exception):
    """A replayed derivation has come to its first undecided choice."""

    def __init__(self, weights):
        self.weights = list(weights)


class Contradicted(Exception):
    """A replayed derivation cannot give the text any more."""


def derivations(text):
    """The probabilities of all sequences of choices that give `text`, by a search of the tree of choices.

    A branch ends where a finished sentence is not the text's next one, or a chosen word is not in the text.
    """

    def replay(decided):
        rest = iter(decided)

        def choose(options, weights):
            index = next(rest, None)
            if index is None:
                raise Undecided(weights)
            option = options[index]
            if isinstance(option, str) and option not in text and THINGS.get(option, option) not in text:
                raise Contradicted
            return option

        told = ""
        for sentence in sentences(choose):
            told += f" {sentence}" if told else sentence
            if not text.startswith(told):
                raise Contradicted
        if text != f"{told}\n":
            raise Contradicted

    found, open_branches = [], [([], 1.0)]
    while open_branches:
        decided, probability = open_branches.pop()
        try:
            replay(decided)
        except Contradicted:
            continue
        except Undecided as choice:
            total = sum(choice.weights)
            for index, weight in enumerate(choice.weights):
                open_branches.append(([*decided, index], probability * weight / total))
        else:
            found.append(probability)
    return found


def test_a_story_has_one_derivation_and_its_bits_are_exact():
    chosen = sorted(stories(60, seed=1), key=lambda found: len(found.text))
    for told in (*chosen[:4], *chosen[28:32]):
        (probability,) = derivations(told.text)
        assert told.bits == pytest.approx(-math.log2(probability), abs=1e-9)


def test_stories_depend_on_seed_and_number_alone():
    first = list(stories(30, seed=3))
    assert list(stories(10, seed=3)) == first[:10]
    assert not {found.text for found in stories(30, seed=4)} & {found.text for found in first}


def test_version_pins_the_stories():
    digest = hashlib.sha256("".join(found.text for found in default_stories()[:500]).encode()).hexdigest()
    assert digest == "89f0122f199332906c3e17ffd1926a379619e8c3e21f534d1216a81187eff125"


def test_choices_follow_their_weights_and_cost_their_bits():
    choose = RandomChoices(random.Random(1))
    counts = Counter(choose("abc", (5, 2, 1)) for _ in range(8000))
    assert chisquare([counts[letter] for letter in "abc"], [5000, 2000, 1000]).pvalue > 1e-3
    expected = 0.678072 * counts["a"] + 2 * counts["b"] + 3 * counts["c"]
    assert choose.bits == pytest.approx(expected, rel=1e-6)


def test_numbers_and_plurals():
    assert [number(n) for n in (0, 1, 13, 20, 21, 99)] == [
        "no",
        "one",
        "thirteen",
        "twenty",
        "twenty-one",
        "ninety-nine",
    ]
    assert counted(1, "knife", "old") == "one old knife" and counted(2, "knife") == "two knives"
    assert all(plural != noun for noun, plural in THINGS.items())


def test_manifest_holds_the_known_bits_of_the_split(config_for):
    config = config_for("stories", max_documents=150, validation_fraction=0.2)
    manifest = token_cache(config, tokenizer_for(config), "validation").manifest
    assert manifest["known_bits"] == pytest.approx(sum(map(known_bits, documents(config.data, "validation"))))
    assert 0.1 < manifest["known_bits"] / manifest["bytes"] < 0.17
