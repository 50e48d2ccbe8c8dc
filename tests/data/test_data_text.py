"""Documents of text files are the same whatever is held of them at a time."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_data import sample_texts

from kanlm.config import UserError
from kanlm.data import packing, text, token_cache, tokenizer_for
from kanlm.data.corpus import _hash_rule, _tail_rule
from kanlm.data.packing import Packer
from kanlm.data.text import LongText, TextFile
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.metrics import TextCounts, total_counts

TOKENIZER = trained_tokenizer(iter(sample_texts(200)), 400)
LINES = st.lists(st.sampled_from(["-", "--", "---", "a", "é b", "\n", "\n", "\r\n", "東"]), max_size=40)
SIZES = st.sampled_from([1, 2, 3, 5, 8, 13])


@pytest.fixture(autouse=True)
def sizes_put_back(monkeypatch):
    for module, name in ((text, "BLOCK_CHARACTERS"), (text, "LONG_CHARACTERS")):
        monkeypatch.setattr(module, name, getattr(module, name))


def documents_of(content: str, separator: str | None, block: int, long: int):
    text.BLOCK_CHARACTERS, text.LONG_CHARACTERS = block, long
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "file.txt"
    path.write_bytes(content.encode())
    return folder, TextFile(path, separator, "strict")


@given(LINES, st.sampled_from([None, "", "-", "--", "---"]), SIZES, st.sampled_from([1, 4, 10, 100]))
@settings(deadline=None, max_examples=150)
def test_documents_are_those_between_the_separators_from_any_place_on(parts, separator, block, long):
    content = "".join(parts)
    whole = content.replace("\r\n", "\n")
    expected = [whole]
    if separator is not None:
        expected = re.split(rf"^{re.escape(separator)}(?:\n|(?<=.)\Z)", whole, flags=re.MULTILINE)
    folder, file = documents_of(content, separator, block, long)
    with folder:
        found = list(file.documents())
        assert [str(document) for _, document in found] == expected
        assert [isinstance(document, LongText) for _, document in found] == [len(e) > long for e in expected]
        for number, (place, _) in enumerate(found):
            assert [str(document) for _, document in file.documents(place)] == expected[number:]


@given(LINES, SIZES, st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None, max_examples=100)
def test_long_text_is_cut_searched_and_split_as_a_string(parts, block, start, stop):
    content = "x" + "".join(parts).replace("\r", "")
    folder, file = documents_of(content, None, block, 0)
    with folder:
        ((_, long),) = file.documents()
        assert isinstance(long, LongText) and len(long) == len(content)
        assert str(long[start:stop]) == content[start:stop]
        assert str(long[start:][:stop]) == content[start:][:stop]
        assert long.find("\n", start) == content.find("\n", start)
        for split in ("train", "validation"):
            for rule in (_tail_rule(split, 0.3), _hash_rule(split, 0.5)):
                assert str(rule(long)) == rule(content)


@pytest.mark.parametrize("block", [50, 200, 1 << 20])
def test_fragments_have_the_ids_and_counts_of_the_whole(block, monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "FRAGMENT_CHARACTERS", 100)
    content = "".join(sample_texts(30)) + "a1" * 400 + " end \n"
    (tmp_path / "long.txt").write_text(content)
    monkeypatch.setattr(text, "BLOCK_CHARACTERS", block)
    monkeypatch.setattr(text, "LONG_CHARACTERS", 0)
    packer = Packer(TOKENIZER)
    ((_, long),) = TextFile(tmp_path / "long.txt", None, "strict").documents()
    for document in (content, long):
        fragments = list(packer.fragments([document]))
        assert len(fragments) > 3 or (block > 1000 and document is long)
        assert [fragment.number for fragment in fragments] == list(range(len(fragments)))
        assert [fragment.last for fragment in fragments] == [False] * (len(fragments) - 1) + [True]
        packed = packer(fragments)
        assert packed.ids.tolist() == [TOKENIZER.eos_token_id, *TOKENIZER(content)["input_ids"]]
        assert packed.starts.tolist() == [0] and packed.counts == total_counts([content])
        assert sum((fragment.counts() for fragment in fragments), TextCounts()) == packed.counts


def test_word_without_an_end_is_one_line(monkeypatch):
    monkeypatch.setattr(packing, "FRAGMENT_CHARACTERS", 100)
    monkeypatch.setattr(text, "WORD_CHARACTERS", 1000)
    packer = Packer(TOKENIZER)
    assert len(list(packer.fragments(["a" * 900 + " b"]))) == 1 + 1
    with pytest.raises(UserError, match="a document has 1,000 characters in which no word begins .'aaaa"):
        list(packer.fragments(["a" * 1500]))


def test_cache_of_one_long_file_is_that_of_the_same_file_read_whole(tmp_path, config_for, monkeypatch):
    (tmp_path / "long.txt").write_text("\n".join(sample_texts(200)))
    config = config_for(tmp_path / "long.txt", validation_fraction=0.2)
    tokenizer = tokenizer_for(config)
    whole = [token_cache(config, tokenizer, split) for split in ("train", "validation")]
    monkeypatch.setattr(text, "BLOCK_CHARACTERS", 700)
    monkeypatch.setattr(text, "LONG_CHARACTERS", 2000)
    monkeypatch.setattr(packing, "FRAGMENT_CHARACTERS", 500)
    other = config_for(tmp_path / "long.txt", validation_fraction=0.2, cache_dir=str(tmp_path / "other"))
    for split, expected in zip(("train", "validation"), whole, strict=True):
        found = token_cache(other, tokenizer, split)
        assert found.manifest == expected.manifest
        assert np.array_equal(found.tokens(0, len(found)), expected.tokens(0, len(expected)))
