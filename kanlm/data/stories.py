"""Short stories from a seeded grammar of our own, whose entropy is known exactly.

Every random choice adds -log2 p to the story's `bits`, and no two sequences of choices give the same text
(tests/data/test_data_stories.py derives them back), so `bits` = -log2 p(text): the mean over stories is
the entropy of the source, and no model has a lower expected loss. A model's loss minus the known bits is what
it has not learned. What follows from earlier choices costs no bits but must be worked out: sums and
differences, pronouns, plurals and verbs that agree over a distance, who holds what, and where it is.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

LICENCE = "Apache-2.0"
VERSION = "stories-2"
"""Part of every fingerprint: raise it when a seed gives other stories."""
COUNT = 10_000
"""Stories in the source `stories`."""

NAMES = {
    **dict.fromkeys("Mara Ada Lena Dora Hana Fay Cleo Iris Nell Vera Tilda Rosa".split(), ("she", "her")),
    **dict.fromkeys("Tom Ben Emil Gus Ivo Kai Otto Sam Jack Leo Pip Rafe".split(), ("he", "his")),
}
THINGS = {
    **{
        noun: f"{noun}s"
        for noun in "coin shell button marble feather stamp pebble lamp kite drum map ribbon".split()
    },
    "key": "keys",
    "box": "boxes",
    "brush": "brushes",
    "berry": "berries",
    "knife": "knives",
    "leaf": "leaves",
    "goose": "geese",
    "mouse": "mice",
    "loaf": "loaves",
}
ADJECTIVES = (
    "small red old bright heavy golden blue round broken smooth green strange tiny silver dusty warm".split()
)
PLACES = (
    "garden kitchen barn library harbour attic mill orchard tower cellar "
    "bridge market forest meadow station chapel"
).split()
FEELINGS = "happy tired proud curious worried calm cross surprised hungry brave".split()
WEATHERS = "sunny windy cold foggy rainy quiet snowy stormy".split()
SPEECH = "asked whispered shouted said laughed".split()
_UNITS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclass(frozen=True)
class Story:
    text: str
    bits: float
    """-log2 of the probability of `text`."""


Choose = Callable[[Sequence[Any], Sequence[float]], Any]
"""One of the options, given positive weights."""


class RandomChoices:
    """A `Choose` that records what its choices cost."""

    def __init__(self, rng: random.Random):
        self._random = rng.random
        self.bits = 0.0

    def __call__(self, options: Sequence[Any], weights: Sequence[float]) -> Any:
        ends = list(accumulate(weights))
        chosen = bisect(ends, self._random() * ends[-1], hi=len(ends) - 1)
        self.bits += math.log2(ends[-1] / weights[chosen])
        return options[chosen]


def stories(count: int = COUNT, seed: int = 0) -> Iterator[Story]:
    """`count` stories; number i depends on (seed, i) alone."""
    for index in range(count):
        choose = RandomChoices(random.Random(f"{seed}/{index}"))
        yield Story(story(choose), choose.bits)


@cache
def default_stories() -> tuple[Story, ...]:
    """The source `stories`."""
    return tuple(stories())


@cache
def _bits_by_text() -> dict[str, float]:
    return {found.text: found.bits for found in default_stories()}


def known_bits(text: str) -> float:
    """-log2 p of a story of the source `stories`; KeyError for any other text."""
    return _bits_by_text()[text]


def number(n: int) -> str:
    """`n` in words, 0 <= n < 100."""
    if n < 20:
        return _UNITS[n]
    tens = _TENS[n // 10 - 2]
    return f"{tens}-{_UNITS[n % 10]}" if n % 10 else tens


def counted(n: int, thing: str, adjective: str = "") -> str:
    noun = thing if n == 1 else THINGS[thing]
    return " ".join(word for word in (number(n), adjective, noun) if word)


def _zipf(choose: Choose, options: Sequence[Any]) -> Any:
    """One of `options`, the earlier the likelier, as words in texts are."""
    return choose(options, _zipf_weights(len(options)))


@lru_cache
def _zipf_weights(size: int) -> list[float]:
    return [1 / (rank + 2) for rank in range(size)]


class _World:
    """What is true at this point of the story."""

    def __init__(self, choose: Choose):
        self.choose = choose
        names = list(NAMES)
        self.hero = choose(names, [1] * len(names))
        others = [name for name in names if name != self.hero]
        self.friend = choose(others, [1] * len(others))
        self.thing = _zipf(choose, list(THINGS))
        self.adjective = _zipf(choose, ADJECTIVES)
        self.place = _zipf(choose, PLACES)
        self.count = {self.hero: choose(range(2, 13), [1] * 11), self.friend: 0}
        self.home = self.place

    def someone(self) -> str:
        return self.choose((self.hero, self.friend), (2, 1))

    def other(self, name: str) -> str:
        return self.friend if name == self.hero else self.hero


def story(choose: Choose) -> str:
    return " ".join(sentences(choose)) + "\n"


def sentences(choose: Choose) -> Iterator[str]:
    """An opening, events until a choice ends them, and a closing that follows from the rest."""
    world = _World(choose)
    hero, friend = world.hero, world.friend
    she, her = NAMES[hero]
    weather = _zipf(choose, WEATHERS)
    yield f"It was a {weather} day, and {hero} was in the {world.place} with {her} friend {friend}."
    yield f"{she.capitalize()} had {counted(world.count[hero], world.thing, world.adjective)}."
    while True:
        possible = [event for event in EVENTS if event.possible(world)]
        event = choose([*possible, None], [*(event.weight for event in possible), 2])
        if event is None:
            break
        yield event.sentence(world)
    total = sum(world.count.values())
    yield (
        f"When the day ended, {hero} had {counted(world.count[hero], world.thing)} and {friend} had "
        f"{counted(world.count[friend], world.thing)}, {number(total)} in all."
    )
    if world.place == world.home:
        yield f"They were still in the {world.home}."
    else:
        yield f"They had left the {world.home} and were in the {world.place}."


def _find(world: _World) -> str:
    who = world.someone()
    n = world.choose(range(1, 10), [1 / k for k in range(1, 10)])
    world.count[who] += n
    where = _zipf(
        world.choose, ("under a stone", "behind the door", "near the wall", "on a shelf", "in the grass")
    )
    now = counted(world.count[who], world.thing)
    return f"{who} found {counted(n, world.thing)} {where}, so now {NAMES[who][0]} had {now}."


def _give(world: _World) -> str:
    holders = [name for name in world.count if world.count[name]]
    who = world.choose(holders, [1] * len(holders))
    most = min(world.count[who], 9)
    n = world.choose(range(1, most + 1), [1 / k for k in range(1, most + 1)])
    world.count[who] -= n
    world.count[world.other(who)] += n
    left = counted(world.count[who], world.thing)
    return f"{who} gave {counted(n, world.thing)} to {world.other(who)} and kept {left}."


def _lose(world: _World) -> str:
    holders = [name for name in world.count if world.count[name]]
    who = world.choose(holders, [1] * len(holders))
    most = min(world.count[who], 5)
    n = world.choose(range(1, most + 1), [1 / k for k in range(1, most + 1)])
    world.count[who] -= n
    was = "was" if n == 1 else "were"
    return (
        f"Then {counted(n, world.thing)} that {who} had carried all the way from the {world.home} {was} lost."
    )


def _walk(world: _World) -> str:
    elsewhere = [place for place in PLACES if place != world.place]
    before, world.place = world.place, _zipf(world.choose, elsewhere)
    return f"They walked from the {before} to the {world.place}."


def _feel(world: _World) -> str:
    who = world.someone()
    feeling = _zipf(world.choose, FEELINGS)
    because = "because" if world.count[who] else "although"
    return f"{who} felt {feeling}, {because} {NAMES[who][0]} had {counted(world.count[who], world.thing)}."


def _ask(world: _World) -> str:
    who = world.someone()
    verb = _zipf(world.choose, SPEECH)
    n = world.count[world.other(who)]
    answer = f"I have {counted(n, world.thing)}"
    return f'"How many {THINGS[world.thing]} do you have?" {verb} {who}. "{answer}," said {world.other(who)}.'


def _compare(world: _World) -> str:
    mine, yours = world.count[world.hero], world.count[world.friend]
    if mine == yours:
        return f"{world.hero} had as many {THINGS[world.thing]} as {world.friend}."
    more, fewer = (world.hero, world.friend) if mine > yours else (world.friend, world.hero)
    by = number(abs(mine - yours))
    return f"{more} had {by} more than {fewer}."


def _look(world: _World) -> str:
    who = world.someone()
    seen = _zipf(world.choose, [thing for thing in THINGS if thing != world.thing])
    colour = _zipf(world.choose, ADJECTIVES)
    many = world.choose((False, True), (1, 1))
    noun, was, it = (THINGS[seen], "were", "them") if many else (seen, "was", "it")
    the = f"The {colour} {noun} that {who} saw in the {world.place} {was}"
    how = _zipf(world.choose, ("too far away", "locked in", "already sold", "very wet"))
    return f"{the} {how}, and nobody touched {it}."


def _always(world: _World) -> bool:
    return True


def _held(world: _World) -> bool:
    return sum(world.count.values()) > 0


def _room(world: _World) -> bool:
    return sum(world.count.values()) < 90


@dataclass(frozen=True)
class _Event:
    sentence: Callable[[_World], str]
    """What happens, in words; changes the world."""
    weight: float
    possible: Callable[[_World], bool] = _always


EVENTS = (
    _Event(_find, 2, _room),
    _Event(_give, 2, _held),
    _Event(_lose, 1, _held),
    _Event(_walk, 2),
    _Event(_feel, 1),
    _Event(_ask, 1),
    _Event(_compare, 1),
    _Event(_look, 2),
)
