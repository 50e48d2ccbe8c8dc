"""The order of training batches and the held-out tokens, recorded: no change of the readers may alter them.

`python tests/data/test_data_golden.py` writes golden_batches.json anew; a change of it is a change of
numerics.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import tempfile
from pathlib import Path

import pytest
from sample_data import sample_texts, write_jsonl

from kanlm.config import DataConfig, RunConfig, SourceConfig, TokenizerConfig, TrainConfig
from kanlm.data import TokenLoader, token_cache, tokenizer_for
from kanlm.data.tokenizer import tokenizer_hash

RECORDED = Path(__file__).with_name("golden_batches.json")


def sources(folder: Path) -> dict[str, dict]:
    """`[data]` tables over files written below `folder`."""
    texts = sample_texts(300)
    write_jsonl(folder / "rows.jsonl", texts)
    (folder / "separated.txt").write_text("\n---\n".join(texts) + "\n---\n")
    (folder / "few.txt").write_text("\n---\n".join(texts[:40]))
    (folder / "blank.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
    (folder / "one.txt").write_bytes("\r\n".join(texts).encode())
    (folder / "files").mkdir()
    for number in range(3):
        (folder / "files" / f"{number}.txt").write_text("\n".join(texts[number * 100 : number * 100 + 100]))
    stories = SourceConfig(source="stories", weight=1.0)
    mixed = (SourceConfig(source=str(folder / "rows.jsonl"), weight=3.0), stories)
    return {
        "rows": {"source": str(folder / "rows.jsonl")},
        "separated": {"source": str(folder / "separated.txt"), "document_separator": "---"},
        "few": {"source": str(folder / "few.txt"), "document_separator": "---"},
        "blank lines": {"source": str(folder / "blank.txt.gz"), "document_separator": ""},
        "one file": {"source": str(folder / "one.txt")},
        "folder": {"source": str(folder / "files")},
        "folder, separated": {"source": str(folder / "files"), "document_separator": "document 7: the"},
        "mixture": {"mixture": mixed, "max_documents": 200},
    }


def digests(folder: Path, table: dict, streaming: bool) -> dict[str, str]:
    config = RunConfig(
        name="test",
        data_seed=5,
        model={},
        tokenizer=TokenizerConfig(vocab_size=300),
        data=DataConfig(
            block_size=32, cache_dir=str(folder / "cache"), streaming=streaming, shuffle_buffer=20, **table
        ),
        train=TrainConfig(max_tokens=1000, batch_size=8),
    )
    tokenizer = tokenizer_for(config)
    order = hashlib.sha256()
    for batch in itertools.islice(TokenLoader(config, tokenizer), 120):
        order.update(batch["input_ids"].numpy().tobytes())
    return {
        "batches": order.hexdigest()[:16],
        "tokenizer": tokenizer_hash(tokenizer)[:16],
        "held out": token_cache(config, tokenizer, "validation").manifest["sha256"][:16],
    }


def recorded() -> dict[str, dict[str, str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            f"{kind}, {'streamed' if streaming else 'cached'}": digests(folder, table, streaming)
            for kind, table in sources(folder).items()
            for streaming in (False, True)
        }


@pytest.fixture(scope="module")
def now() -> dict[str, dict[str, str]]:
    return recorded()


@pytest.mark.parametrize("kind", sorted(json.loads(RECORDED.read_text())) if RECORDED.exists() else [])
def test_batches_and_held_out_tokens_are_those_recorded(kind, now):
    assert now[kind] == json.loads(RECORDED.read_text())[kind]


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(recorded(), indent=2) + "\n")
