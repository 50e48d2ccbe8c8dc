"""Byte-level BPE gives every text back, and no text can pose as a special token."""

import errno
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_data import sample_texts
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kanlm.config import UserError
from kanlm.data import packing, tokenizer_for
from kanlm.data.packing import Packer, pieces, splits_at_words
from kanlm.data.tokenizer import (
    END_OF_TEXT,
    loaded_tokenizer,
    packing_tokenizer,
    tokenizer_hash,
    trained_tokenizer,
)
from kanlm.runs import save_tokenizer

TOKENIZER = trained_tokenizer(iter(sample_texts(200)), 400)
PACKER = Packer(TOKENIZER)
BLANKS = st.text(st.sampled_from(" \n\t\r\x0b\x1c\x85\u00a0\u2028a'1é."), max_size=80)


@given(st.one_of(st.text(), BLANKS))
@example(END_OF_TEXT)
@example(f" {END_OF_TEXT}\n{END_OF_TEXT * 2}")
@example("\x00\r\n\ufeff \U0001f600 \u0301")
@settings(deadline=None, max_examples=300)
def test_every_text_comes_back_exactly(text):
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.eos_token_id not in ids
    packed = PACKER(list(PACKER.fragments([text, "second"])))
    assert packed.ids.tolist()[: packed.lengths[0]] == [TOKENIZER.eos_token_id, *ids]
    assert packed.counts.bytes == len(text.encode()) + len("second")


@given(st.one_of(st.text(max_size=200), BLANKS))
@settings(deadline=None, max_examples=500)
def test_pieces_give_the_ids_of_the_whole(text):
    backend = packing_tokenizer(TOKENIZER)
    whole = backend.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PIECE_CHARACTERS", 3)
        cut = pieces(text)
    assert "".join(cut) == text
    assert [n for piece in cut for n in backend.encode(piece, add_special_tokens=False).ids] == whole


def test_long_text_is_cut_into_pieces():
    text = "".join(sample_texts(200))
    cut = pieces(text)
    assert "".join(cut) == text
    assert len(cut) > 2 and max(map(len, cut)) < packing.PIECE_CHARACTERS + 100


def test_only_tokenizers_that_allow_it_are_given_pieces():
    assert splits_at_words(packing_tokenizer(TOKENIZER))
    other = loaded_copy(TOKENIZER)
    other.add_tokens(["two words"])
    assert not splits_at_words(packing_tokenizer(other))


def loaded_copy(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=packing_tokenizer(tokenizer), eos_token=END_OF_TEXT)


def test_loads_with_auto_tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"naïve {END_OF_TEXT} 東京"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.eos_token_id == loaded.bos_token_id == loaded.pad_token_id == TOKENIZER.eos_token_id
    assert tokenizer_hash(loaded) == tokenizer_hash(TOKENIZER)


def test_hash_ignores_padding_and_sees_the_vocabulary():
    padded = loaded_copy(TOKENIZER)
    padded.pad_token = END_OF_TEXT
    before = tokenizer_hash(padded)
    padded(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(padded) == before
    assert tokenizer_hash(trained_tokenizer(iter(sample_texts(200)), 401)) != tokenizer_hash(TOKENIZER)


def test_tokenizer_is_trained_once_for_a_text_and_size(jsonl, config_for):
    config = config_for(jsonl)
    first = tokenizer_for(config)
    (folder,) = [path for path in (jsonl.parent / "cache" / "tokenizers").iterdir() if path.is_dir()]
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    assert tokenizer_hash(tokenizer_for(config)) == tokenizer_hash(first)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    assert len(first) == 320
    assert len(tokenizer_for(config_for(jsonl, vocab_size=300))) == 300


def test_training_twice_gives_the_same_tokenizer(jsonl, tmp_path, config_for):
    hashes = {
        tokenizer_hash(tokenizer_for(config_for(jsonl, cache_dir=str(tmp_path / name)))) for name in "ab"
    }
    assert len(hashes) == 1


def test_existing_tokenizer_is_used_and_mistakes_are_one_line(tmp_path, jsonl, config_for):
    TOKENIZER.save_pretrained(tmp_path / "good")
    found = tokenizer_for(config_for(jsonl, tokenizer=str(tmp_path / "good")))
    assert tokenizer_hash(found) == tokenizer_hash(TOKENIZER)
    no_eos = PreTrainedTokenizerFast(tokenizer_object=packing_tokenizer(TOKENIZER))
    no_eos.save_pretrained(tmp_path / "no_eos")
    (tmp_path / "empty").mkdir()
    TOKENIZER.save_pretrained(tmp_path / "damaged")
    content = json.loads((tmp_path / "damaged" / "tokenizer.json").read_text())
    vocabulary, (left, right) = content["model"]["vocab"], content["model"]["merges"][-1]
    vocabulary[left] = vocabulary[right]
    (tmp_path / "damaged" / "tokenizer.json").write_text(json.dumps(content))
    for name, message in (
        ("no_eos", "has no eos token"),
        ("empty", "no tokenizer"),
        ("absent", "no tokenizer"),
        ("damaged", "json: not a tokenizer: .*out of vocabulary"),
    ):
        with pytest.raises(UserError, match=f"tokenizer.*{message}") as caught:
            loaded_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_parts_keep_the_order():
    texts = sample_texts(50)
    parts = list(PACKER._parts(PACKER.fragments(texts), batch_characters=100))
    assert "".join(piece for part in parts for piece in part.pieces) == "".join(texts)
    assert [fragment.text for part in parts for fragment in part.fragments] == texts
    assert len(parts) > 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_full_disk_is_an_error_of_the_system(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError) as refused:
        save_tokenizer(trained_tokenizer(iter(["the cat sat"] * 9), 260), tmp_path)
    assert refused.value.errno == errno.ENOSPC
    assert refused.value.filename == str(tmp_path / "tokenizer.json")
