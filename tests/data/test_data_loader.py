"""The loader's order is a function of the seed and the consumed sequences, streaming included."""

import itertools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_data import write_jsonl
from torch.distributed import HashStore

from kanlm.config import SourceConfig, UserError
from kanlm.data import TokenLoader, exchange, stream, tokenizer_for, train_caches
from kanlm.data.exchange import Exchange
from kanlm.data.order import CYCLE, Mixture, permute


@pytest.fixture
def stories_and(jsonl):
    return (SourceConfig(source=str(jsonl), weight=3.0), SourceConfig(source="stories", weight=1.0))


@pytest.fixture(params=["cached", "streaming", "cached mixture", "streaming mixture"])
def any_config(request, config_for, jsonl, stories_and):
    """Configurations whose text lasts for some epochs of the tests below."""
    data = {"shuffle_buffer": 20, "streaming": True} if "streaming" in request.param else {}
    if "mixture" in request.param:
        return config_for(mixture=stories_and, max_documents=200, cross_document_attention=False, **data)
    return config_for(jsonl, **data)


def batches(loader, count):
    return [batch["input_ids"] for batch in itertools.islice(loader, count)]


def rows(loader, count):
    """Counter of the first `count` sequences."""
    found = torch.cat(batches(loader, -(-count // loader.micro_batch_size)))[:count]
    return Counter(tuple(row) for row in found.tolist())


def test_order_does_not_depend_on_the_number_of_processes(any_config):
    tokenizer = tokenizer_for(any_config)
    alone = batches(TokenLoader(any_config, tokenizer, micro_batch_size=8), 60)
    for world_size in (2, 4):
        ranks = [
            iter(
                TokenLoader(
                    any_config, tokenizer, rank=rank, world_size=world_size, micro_batch_size=8 // world_size
                )
            )
            for rank in range(world_size)
        ]
        for expected in alone:
            assert torch.equal(torch.cat([next(rank)["input_ids"] for rank in ranks]), expected)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_processes_that_share_the_tokenising_see_the_same_batches(
    jsonl, config_for, stories_and, world_size, mixed, monkeypatch
):
    """Small windows, so that a step spans several; threads stand for processes."""
    monkeypatch.setattr(stream, "_BATCH_CHARACTERS", 1500)
    sources = {"mixture": stories_and} if mixed else {"source": jsonl}
    config = config_for(max_documents=200, streaming=True, shuffle_buffer=3, **sources)
    tokenizer = tokenizer_for(config)
    alone = TokenLoader(config, tokenizer, micro_batch_size=8)
    expected, states = [], []
    for batch in itertools.islice(alone, 60):
        expected.append(batch["input_ids"])
        states.append(alone.state_dict())
    store = HashStore()

    def part(rank):
        loader = TokenLoader(
            config,
            tokenizer,
            rank=rank,
            world_size=world_size,
            micro_batch_size=8 // world_size,
            exchange=Exchange(store, rank, world_size),
        )
        first = batches(loader, 10)
        loader.load_state_dict(json.loads(json.dumps(states[29])))
        return first, batches(loader, 20), loader.state_dict()

    with ThreadPoolExecutor(world_size) as pool:
        parts = list(pool.map(part, range(world_size)))
    for number in range(10):
        assert torch.equal(torch.cat([first[number] for first, _, _ in parts]), expected[number])
    for number in range(20):
        assert torch.equal(torch.cat([later[number] for _, later, _ in parts]), expected[30 + number])
    assert all(state == parts[0][2] for _, _, state in parts)
    resumed = TokenLoader(config, tokenizer, micro_batch_size=8)
    resumed.load_state_dict(parts[0][2])
    assert all(map(torch.equal, batches(resumed, 10), expected[50:]))


def test_process_that_gives_no_tokens_is_named(monkeypatch):
    monkeypatch.setattr(exchange, "SECONDS", 0.05)
    with pytest.raises(UserError, match="data.streaming: process 1 has given no tokens for 0 seconds"):
        Exchange(HashStore(), 0, 2).ids("key", 1, lambda: None)


def test_resuming_anywhere_gives_the_same_batches(any_config):
    tokenizer = tokenizer_for(any_config)
    loader = TokenLoader(any_config, tokenizer, micro_batch_size=8)
    states, expected = [json.dumps(loader.state_dict())], []
    for batch in itertools.islice(loader, 150):
        expected.append(batch["input_ids"])
        states.append(json.dumps(loader.state_dict()))
    assert len({tuple(ids[0].tolist()) for ids in expected}) > 20
    for step in (0, 1, 2, 3, 17, 75, 76, 149):
        resumed = TokenLoader(any_config, tokenizer, micro_batch_size=8)
        resumed.load_state_dict(json.loads(states[step]))
        assert all(map(torch.equal, batches(resumed, 150 - step), expected[step:])), step


def test_state_of_one_rank_serves_any_number_of_processes(any_config):
    tokenizer = tokenizer_for(any_config)
    expected = batches(TokenLoader(any_config, tokenizer, micro_batch_size=8), 40)
    for rank in (0, 1):
        half = TokenLoader(any_config, tokenizer, rank=rank, world_size=2, micro_batch_size=4)
        batches(half, 25)
        alone = TokenLoader(any_config, tokenizer, micro_batch_size=8)
        alone.load_state_dict(half.state_dict())
        assert all(map(torch.equal, batches(alone, 15), expected[25:]))


def test_every_epoch_has_every_block_once_in_another_order(jsonl, config_for):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    (cache,) = train_caches(config, tokenizer)
    number = len(cache) // 32
    blocks = Counter(tuple(cache.tokens(n * 32, n * 32 + 32).tolist()) for n in range(number))
    loader = TokenLoader(config, tokenizer, micro_batch_size=1)
    first, second = batches(loader, number), batches(loader, number)
    for epoch in (first, second):
        assert Counter(tuple(ids[0].tolist()) for ids in epoch) == blocks
    assert sum(map(torch.equal, first, second)) < number / 10
    streamed = TokenLoader(
        config_for(jsonl, streaming=True, shuffle_buffer=20), tokenizer, micro_batch_size=1
    )
    assert rows(streamed, number) == blocks
    assert rows(streamed, number) == blocks


def test_seed_changes_the_order_and_nothing_else(jsonl, config_for):
    tokenizer = tokenizer_for(config_for(jsonl))
    for data in ({}, {"streaming": True, "shuffle_buffer": 10_000}):
        one, same, other = (
            batches(TokenLoader(config_for(jsonl, data_seed=seed, **data), tokenizer, micro_batch_size=4), 20)
            for seed in (1, 1, 2)
        )
        assert all(map(torch.equal, one, same))
        assert sum(map(torch.equal, one, other)) < 3


def test_labels_are_the_inputs_and_positions_restart_at_documents(jsonl, config_for):
    config = config_for(jsonl, cross_document_attention=False)
    tokenizer = tokenizer_for(config)
    restarts = 0
    for batch in itertools.islice(TokenLoader(config, tokenizer, micro_batch_size=3), 30):
        assert batch["input_ids"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64
        assert torch.equal(batch["labels"], batch["input_ids"])
        for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
            expected = 0
            for place, (token, position) in enumerate(zip(ids, positions, strict=True)):
                expected = 0 if place == 0 or token == tokenizer.eos_token_id else expected + 1
                assert position == expected
                restarts += place > 0 and expected == 0
    assert restarts > 10
    plain = next(iter(TokenLoader(config_for(jsonl), tokenizer, micro_batch_size=3)))
    assert set(plain) == {"input_ids", "labels"}


def test_state_of_other_data_is_refused_by_name(jsonl, texts, config_for, tmp_path):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    state = TokenLoader(config, tokenizer).state_dict()
    other_tokenizer = tokenizer_for(config_for(jsonl, vocab_size=300))
    write_jsonl(tmp_path / "other.jsonl", texts[:150])
    for other, its_tokenizer, name in (
        (config_for(jsonl, data_seed=1), tokenizer, "data_seed: 1"),
        (config_for(jsonl, block_size=16), tokenizer, "data.block_size: 16"),
        (
            config_for(jsonl, streaming=True),
            tokenizer,
            "data.streaming: True",
        ),
        (config_for(tmp_path / "other.jsonl"), tokenizer, "data manifest"),
        (config, other_tokenizer, "data manifest"),
    ):
        with pytest.raises(UserError, match=name):
            TokenLoader(other, its_tokenizer).load_state_dict(state)


def test_text_shorter_than_a_block_is_one_line(tmp_path, jsonl, config_for):
    tokenizer = tokenizer_for(config_for(jsonl))
    (tmp_path / "short.txt").write_text("a few words only\n")
    for data in ({}, {"streaming": True}):
        with pytest.raises(
            UserError, match="data.block_size: 32, but the training text .*(only|fewer).*tokens"
        ):
            TokenLoader(config_for(tmp_path / "short.txt", **data), tokenizer)


def test_batch_that_does_not_divide_among_processes_is_one_line(jsonl, config_for):
    config = config_for(jsonl)
    with pytest.raises(UserError, match="train.batch_size: 8 sequences do not divide among 3 processes"):
        TokenLoader(config, tokenizer_for(config), rank=0, world_size=3)


def test_mixture_keeps_its_shares(jsonl, config_for, stories_and):
    config = config_for(mixture=stories_and, max_documents=200)
    tokenizer = tokenizer_for(config)
    texts, stories = train_caches(config, tokenizer)
    loader = TokenLoader(config, tokenizer, micro_batch_size=64)
    found = torch.cat(batches(loader, CYCLE // 64))
    of_stories = {tuple(stories.tokens(n * 32, n * 32 + 32).tolist()) for n in range(len(stories) // 32)}
    share = sum(tuple(row) in of_stories for row in found.tolist()) / CYCLE
    assert share == 0.25
    assert loader.manifest["tokens"] == len(texts) + len(stories)
    assert [part["source"] for part in loader.manifest["sources"]] == [str(jsonl), "stories"]


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**63), min_size=1, max_size=3))
def test_permuted_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, tuple(key)).tolist()) == list(range(size))


def test_permutations_are_uniform():
    """All 24 orders of four items occur about equally often."""
    counts = Counter(tuple(permute(np.arange(4), 4, (7, seed)).tolist()) for seed in range(4800))
    assert len(counts) == 24 and max(counts.values()) < 280 and min(counts.values()) > 130


def test_neighbours_are_scattered():
    places = permute(np.arange(100_000), 100_000, (1, 2))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02
    assert abs(np.abs(np.diff(places)).mean() / 100_000 - 1 / 3) < 0.01


@given(st.lists(st.floats(1, 100), min_size=1, max_size=6), st.integers(0, 3 * CYCLE), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_sources_of_a_mixture_count_their_sequences(weights, consumed, seed):
    mixture = Mixture(weights, seed)
    sources, indices = mixture(np.arange(consumed))
    for source in range(len(weights)):
        assert indices[sources == source].tolist() == list(range((sources == source).sum()))
    assert mixture.counts(consumed).tolist() == np.bincount(sources, minlength=len(weights)).tolist()
    cycle = np.bincount(mixture(np.arange(CYCLE))[0], minlength=len(weights)) / CYCLE
    assert np.abs(cycle - np.array(weights) / sum(weights)).max() <= 1 / CYCLE


def test_tiny_weight_is_one_line():
    with pytest.raises(UserError, match="data.mixture: weight 1e-06 of source 1 is a share below 1/4096"):
        Mixture([1.0, 1e-6], 0)
