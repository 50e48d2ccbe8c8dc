"""`kanlm tokenize`: the token caches of a configuration ahead of training, alone or a share of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kanlm.config import RunConfig, UserError
from kanlm.data import remote
from kanlm.data.cache import TokenCache, pack_share, token_cache, train_caches
from kanlm.data.corpus import split_sources
from kanlm.data.tokenizer import tokenizer_for, tokenizer_hash
from kanlm.runs import new_folder, save_tokenizer


def tokenize(config: RunConfig, workers: int | None, shard: str | None, push: str | None) -> Iterator[str]:
    """Build tokenizer and caches, or the share `shard` ("2/8") of them, and say line by line what there is.

    `workers` processes tokenise, by default those of the configuration. `push` is a URL as of
    `data.cache_url`.
    """
    share = parsed_share(shard) if shard is not None else None
    if share is not None and push is not None:
        raise UserError(
            "--push: takes whole caches, and --shard makes a part; push when all shards are there"
        )
    if config.data.streaming:
        raise UserError("data.streaming: true reads no token cache; add data.streaming=false")
    if config.data.cache_url is not None:
        raise UserError("data.cache_url: names tokens that are there already; leave it out to make some")
    if push is not None:
        remote.must_be_place(push)
    if workers is not None:
        data = config.data.model_copy(update={"num_workers": workers})
        config = config.model_copy(update={"data": data})
    tokenizer = tokenizer_for(config)
    if share is not None:
        yield from _share(config, tokenizer, share)
        return
    train = train_caches(config, tokenizer)
    validation = token_cache(config, tokenizer, "validation")
    yield from map(_described, [*train, validation])
    if push is not None:
        folder = Path(config.data.cache_dir) / "tokenizers" / f"published-{tokenizer_hash(tokenizer)[:16]}"
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as temporary:
            save_tokenizer(tokenizer, temporary)
        local = remote.Published(folder, tuple(cache.folder for cache in train), validation.folder)
        yield f"pushed: {remote.publish(config, push.rstrip('/'), local)}"


def _share(config: RunConfig, tokenizer: PreTrainedTokenizerFast, share: tuple[int, int]) -> Iterator[str]:
    for source in split_sources(config.data, "train"):
        made = pack_share((source,), config, tokenizer, "train", share)
        if isinstance(made, TokenCache):
            yield _described(made)
        else:
            part = f"share {share[0] + 1}/{share[1]}"
            yield f"{source.name}: {part} is packed; {made} shards of others are missing"
    if share[0] == 0:  # little text, and one after another it is cut as for one machine
        yield _described(token_cache(config, tokenizer, "validation"))


def _described(cache: TokenCache) -> str:
    manifest = cache.manifest
    return (
        f"{manifest['split']}: {manifest['tokens']:,} tokens, {manifest['documents']:,} documents, "
        f"{manifest['bytes']:,} bytes of {manifest['source']}: {cache.folder}"
    )


def parsed_share(text: str) -> tuple[int, int]:
    """(i, n) of "I/N", i from 0; UserError unless 1 <= I <= N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard: expected I/N with 1 <= I <= N, e.g. 2/8, got {text!r}")
    return int(found[1]) - 1, int(found[2])
