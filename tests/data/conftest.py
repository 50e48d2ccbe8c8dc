import pytest
from sample_data import sample_texts, write_jsonl

from kanlm.config import DataConfig, RunConfig, SourceConfig, TokenizerConfig, TrainConfig


@pytest.fixture
def texts() -> list[str]:
    return sample_texts(300)


@pytest.fixture
def config_for(tmp_path):
    """A RunConfig over a cache of its own; keywords are those of `[data]`, and `vocab_size`, `data_seed`."""

    def make(source="", *, vocab_size=320, data_seed=0, tokenizer=None, **data) -> RunConfig:
        data.setdefault("cache_dir", str(tmp_path / "cache"))
        data.setdefault("block_size", 32)
        if source:
            data["source"] = str(source)
        return RunConfig(
            name="test",
            data_seed=data_seed,
            model={},
            tokenizer=TokenizerConfig(vocab_size=vocab_size, path=tokenizer),
            data=DataConfig(**data),
            train=TrainConfig(max_tokens=1000, batch_size=8),
        )

    return make


@pytest.fixture
def jsonl(tmp_path, texts):
    """A .jsonl file of `texts`."""
    path = tmp_path / "texts.jsonl"
    write_jsonl(path, texts)
    return path


@pytest.fixture
def spec_for():
    def make(source, **fields) -> SourceConfig:
        return SourceConfig(source=str(source), **fields)

    return make
