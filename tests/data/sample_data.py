"""Text for the tests of kanlm.data."""

import json
import random

WORDS = (
    "the of and moth lantern copper river slow bright été naïve 東京 data=1 x+=2 don't 12 345 — \t ünder"
).split(" ")


def sample_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of unequal lengths with several scripts, repeated blanks and newlines."""
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        words = [
            rng.choice(WORDS) + rng.choice((" ", " ", " ", "  ", "\n", "\n\n"))
            for _ in range(rng.randint(3, 60))
        ]
        texts.append(f"document {number}: " + "".join(words))
    return texts


def write_jsonl(path, texts, column="text") -> None:
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
