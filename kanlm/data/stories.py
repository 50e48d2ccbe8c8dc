"""Short stories from a seeded grammar of our own, whose entropy is known exactly.

Every random choice adds -log2 p to the story's `bits`, and no two sequences of choices give the same text, so
`bits` is -log2 of the text's probability: no model can do better on average, and a model's loss minus the
known entropy is what it has not learned.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

LICENCE = "Apache-2.0"
VERSION = "stories-1"
COUNT = 20_000
T = TypeVar("T")

NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Juno", "Kai", "Lena")
THINGS = ("apple", "button", "coin", "feather", "key", "marble", "pebble", "ribbon", "shell", "stamp")
PLACES = ("attic", "barn", "cellar", "garden", "harbour", "library", "mill", "orchard")


@dataclass(frozen=True)
class Story:
    text: str
    bits: float


@dataclass
class Choices:
    """A source of recorded random choices."""

    rng: random.Random
    bits: float = field(default=0.0)

    def one_of(self, options: Sequence[T]) -> T:
        self.bits += math.log2(len(options))
        return options[int(self.rng.random() * len(options))]


def stories(count: int = COUNT, seed: int = 0) -> Iterator[Story]:
    """`count` stories; story i depends on (seed, i) alone."""
    for index in range(count):
        choices = Choices(random.Random(f"{seed}/{index}"))
        yield Story(story(choices), choices.bits)


def story(choices: Choices) -> str:
    hero = choices.one_of(NAMES)
    friend = choices.one_of([name for name in NAMES if name != hero])
    thing, place = choices.one_of(THINGS), choices.one_of(PLACES)
    had, found = choices.one_of(range(2, 10)), choices.one_of(range(2, 10))
    lines = [
        f"{hero} had {had} {thing}s in the {place}.",
        f"{friend} came and found {found} more.",
        f"Now there were {had + found} {thing}s.",
    ]
    for _ in range(choices.one_of(range(1, 4))):
        place = choices.one_of([other for other in PLACES if other != place])
        lines.append(f"Then {choices.one_of((hero, friend))} took them to the {place}.")
    lines.append(f"In the end {hero} and {friend} kept the {thing}s in the {place}.")
    return " ".join(lines) + "\n"
