"""Every kind of source gives the same documents, and every mistake one line."""

import csv
import errno
import gzip
import hashlib
import json
import lzma
import os
import shutil

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kanlm.config import UserError
from kanlm.data import sources, stdlib, text_documents
from kanlm.data.sources import reader
from kanlm.runs import json_sha256

SEPARATOR = "<|endoftext|>"


def as_txt(path, texts):
    # A separator line needs the newline before it, which is then part of the document.
    path.write_text(f"{SEPARATOR}\n".join(f"{text}\n" for text in texts), newline="")


def as_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)))


@pytest.fixture
def every_form(tmp_path, texts):
    """name -> (source, fields of the spec, expected documents)."""
    forms = {}
    as_txt(tmp_path / "a.txt", texts)
    forms["txt"] = (tmp_path / "a.txt", {"document_separator": SEPARATOR}, [f"{text}\n" for text in texts])
    forms["whole txt"] = (tmp_path / "a.txt", {}, [(tmp_path / "a.txt").read_text()])
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress((tmp_path / "a.txt").read_bytes()))
    forms["txt.xz"] = (tmp_path / "a.txt.xz", {"document_separator": SEPARATOR}, forms["txt"][2])
    as_jsonl(tmp_path / "a.jsonl", texts)
    forms["jsonl"] = (tmp_path / "a.jsonl", {}, texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    forms["jsonl.gz"] = (tmp_path / "a.jsonl.gz", {}, texts)
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    forms["json"] = (tmp_path / "a.json", {}, texts)
    table = datasets.Dataset.from_dict({"body": texts})
    table.to_parquet(str(tmp_path / "a[1].parquet"))
    forms["parquet"] = (tmp_path / "a[1].parquet", {"text_column": "body"}, texts)
    table.save_to_disk(str(tmp_path / "saved"))
    forms["saved"] = (tmp_path / "saved", {"text_column": "body"}, texts)
    datasets.DatasetDict(train=table, validation=table.select(range(7))).save_to_disk(
        str(tmp_path / "splits")
    )
    forms["saved split"] = (tmp_path / "splits", {"text_column": "body", "split": "validation"}, texts[:7])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("# About\n\nNot part of the text.\n")
    as_jsonl(folder / "train.jsonl", texts)
    as_jsonl(folder / "validation.jsonl", texts[:9])
    forms["folder"] = (folder, {}, texts)
    forms["folder split"] = (folder, {"split": "validation"}, texts[:9])
    books = tmp_path / "books"
    books.mkdir()
    for number, text in enumerate(texts[:5]):
        (books / f"{number}.txt").write_text(text, newline="")
    forms["folder of texts"] = (books, {}, texts[:5])
    return forms


def test_every_form_gives_the_same_documents(every_form, spec_for):
    for name, (source, fields, expected) in every_form.items():
        assert list(text_documents(spec_for(source, **fields))) == expected, name


def test_reading_goes_on_from_any_saved_chunk(every_form, spec_for, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 7)
    for name in ("txt", "jsonl", "jsonl.gz", "json", "parquet", "saved"):
        source, fields, _ = every_form[name]
        found = reader(spec_for(source, **fields))
        chunks = list(found.chunks(None))
        assert len(chunks) >= 300 // 7
        for number in (0, 1, 5, len(chunks) - 1):
            state = json.loads(json.dumps(chunks[number][0]))
            again = [texts for _, texts in found.chunks(state)]
            assert again == [texts for _, texts in chunks[number:]], (name, number)


def test_line_ends_become_newlines_and_nothing_else_changes(tmp_path, spec_for):
    (tmp_path / "a.txt").write_bytes(b" one\r\ntwo\rthree \x0c \xc2\x85 end")
    assert list(text_documents(spec_for(tmp_path / "a.txt"))) == [" one\ntwo\nthree \x0c \x85 end"]


def test_documents_without_text_are_skipped(tmp_path, spec_for):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": null}\n{"text": "two"}\n')
    assert list(text_documents(spec_for(tmp_path / "a.jsonl"))) == ["one", "two"]
    assert list(text_documents(spec_for(tmp_path / "a.jsonl"), max_documents=1)) == ["one"]


def test_fingerprint_follows_the_content(jsonl, texts, spec_for):
    before = reader(spec_for(jsonl)).fingerprint
    assert reader(spec_for(jsonl)).fingerprint == before
    as_jsonl(jsonl, [*texts, "one more"])
    assert reader(spec_for(jsonl)).fingerprint != before


def test_fingerprint_of_many_files_is_that_of_the_whole_list(tmp_path, spec_for):
    """Written by the piece, it stays the sha256 of one JSON list; names are in pathlib's order."""
    (tmp_path / "a").mkdir()
    for name in ("a/c.txt", "a-b.txt", "d.txt"):
        (tmp_path / name).write_text(name * 3)
    spec = spec_for(tmp_path / "**" / "*.txt")
    names = ["a/c.txt", "a-b.txt", "d.txt"]
    marks = [(3 * len(name), hashlib.sha256(3 * name.encode()).hexdigest()) for name in names]
    whole = [names, marks, *sources._reading(spec, "error")]
    assert reader(spec).fingerprint == json_sha256(whole)
    assert list(text_documents(spec)) == [3 * name for name in names]


@pytest.mark.parametrize("hashed", [2**28, 2**17], ids=["whole", "in blocks"])
def test_fingerprint_is_of_the_content_wherever_it_lies(tmp_path, spec_for, monkeypatch, hashed):
    """A copy is the same source, whatever its path and times; a change in place makes it another one."""
    monkeypatch.setattr(sources, "HASHED_BYTES", hashed)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n" * 500_000)  # 31 blocks
    (folder / "b.txt").write_text("three")
    for path in (folder, folder / "a.txt"):
        before = reader(spec_for(path)).fingerprint
        copy = tmp_path / "there" / path.name
        copy.parent.mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
        changed = copy / "a.txt" if copy.is_dir() else copy
        os.utime(changed, (1, 1))
        assert reader(spec_for(copy)).fingerprint == before
        for place in (0, 1_000_000, 2_000_000 - 4):  # head, middle, tail
            content = changed.read_bytes()
            changed.write_bytes(content[:place] + b"six\n" + content[place + 4 :])
            os.utime(changed, (1, 1))
            assert reader(spec_for(copy)).fingerprint != before
            changed.write_bytes(content)
    names = folder / "b.txt", folder / "c.txt"
    before = reader(spec_for(folder)).fingerprint
    names[0].rename(names[1])
    assert reader(spec_for(folder)).fingerprint != before


def test_large_sources_are_hashed_in_part(tmp_path, spec_for, monkeypatch):
    monkeypatch.setattr(sources, "HASHED_BYTES", 2**18)
    (tmp_path / "a.txt").write_bytes(b"x" * 2**22)  # four blocks: 0, 21, 42 and 63
    before = reader(spec_for(tmp_path)).fingerprint
    for place, seen in ((30 * 2**16, False), (42 * 2**16, True)):
        with open(tmp_path / "a.txt", "r+b") as file:
            file.seek(place)
            file.write(b"y")
        assert (reader(spec_for(tmp_path)).fingerprint != before) == seen


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), True),
        (ConnectionError("Server Disconnected"), True),
        (OSError("Invalid data stream"), False),
        (EOFError("Compressed file ended before the end"), False),
    ],
    ids=str,
)
def test_source_that_cannot_be_read_now_is_told_from_a_damaged_one(spec_for, error, passes):
    with pytest.raises(UserError) as caught, sources._one_line_errors(spec_for("a.bz2"), []):
        raise error
    assert isinstance(caught.value, sources.Unreachable) == passes
    assert "\n" not in str(caught.value)


def test_end_of_a_file_ends_a_document(tmp_path, spec_for):
    (tmp_path / "a.txt").write_text("one\n--\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "c.txt").write_text("four\n--\n")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"five"))
    spec = spec_for(tmp_path, document_separator="--")
    assert list(text_documents(spec)) == ["one\n", "two\n", "three", "four\n", "five"]
    chunks = list(reader(spec).chunks({"file": 1, "cookie": 0, "skip": 0}))
    assert [text for _, texts in chunks for text in texts if text] == ["three", "four\n", "five"]


@pytest.mark.parametrize("where", [0, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 3])
@pytest.mark.parametrize("ending", ["txt", "txt.xz"])
def test_invalid_utf8_is_located_by_file_and_byte(tmp_path, spec_for, where, ending):
    content = ("é" * (1 << 20)).encode()  # two bytes each: an odd offset breaks a character
    content = content[:where] + b"\xff" + content[where:]
    offset = where if where % 2 == 0 else where - 1
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(lzma.compress(content, preset=0) if ending.endswith("xz") else content)
    with pytest.raises(UserError, match=f"bad.{ending}', byte {offset}[ ;:].*invalid_utf8=replace"):
        list(text_documents(spec_for(path)))


def test_invalid_utf8_can_be_replaced(tmp_path, spec_for):
    (tmp_path / "bad.txt").write_bytes(b"a\xffb")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "a\xffb"}\n')
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xffb"]).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "bad.parquet")
    for name, expected in (
        ("bad.txt", ["a\ufffdb"]),
        ("bad.jsonl", ["fine", "a\ufffdb"]),
        ("bad.parquet", ["a\ufffdb"]),
    ):
        with pytest.raises(UserError, match="not UTF-8"):
            list(text_documents(spec_for(tmp_path / name)))
        assert list(text_documents(spec_for(tmp_path / name), invalid_utf8="replace")) == expected


def test_tables_keep_every_text_as_it_is_written(tmp_path, spec_for):
    texts = ["NA", "12", 'two\nlines, "quoted"', "\u00e4", ""]
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows([["n", "body"], *enumerate(texts)])
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    for name in ("a.csv", "a.tsv", "b.csv.gz"):
        found = list(text_documents(spec_for(tmp_path / name, text_column="body")))
        assert found == [text for text in texts if text]
    (tmp_path / "bad.csv").write_bytes(b"text\na\xffb\n")
    with pytest.raises(UserError, match="bad.csv', byte 6: not UTF-8"):
        list(text_documents(spec_for(tmp_path / "bad.csv")))
    assert list(text_documents(spec_for(tmp_path / "bad.csv"), invalid_utf8="replace")) == ["a\ufffdb"]


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_pattern_is_its_files_in_the_order_of_their_names(tmp_path, spec_for, ending):
    def write(path, text):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if ending == "txt" else json.dumps({"text": text}) + "\n")

    for place in ("b/2", "a/1", "a/3", "left/out"):
        write(tmp_path / f"{place}.{ending}", f"text of {place}")
    (tmp_path / "a" / "notes.csv").write_text("text\nno\n")
    pattern = tmp_path / "[ab]" / f"*.{ending}"
    assert list(text_documents(spec_for(pattern))) == ["text of a/1", "text of a/3", "text of b/2"]
    before = reader(spec_for(pattern)).fingerprint
    shutil.copytree(tmp_path, tmp_path.with_name("copy"), dirs_exist_ok=True)
    assert reader(spec_for(tmp_path.with_name("copy") / "[ab]" / f"*.{ending}")).fingerprint == before
    write(tmp_path / "b" / f"4.{ending}", "one more")
    assert reader(spec_for(pattern)).fingerprint != before


def test_mistakes_are_one_line(every_form, tmp_path, spec_for):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "table.xml").write_text("<text>hello</text>")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("a")
    (tmp_path / "mixed" / "b.csv").write_text("text\nb\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "ab"}\n{"text": "ab"\n')
    (tmp_path / "fake.parquet").write_text("x" * 100)
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(b"hello " * 200)[:-20])
    (tmp_path / "numbers.jsonl").write_text('{"text": 3, "body": "b"}\n')
    (tmp_path / "nothing").mkdir()
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(b""))
    mistakes = [
        (tmp_path / "missing.txt", {}, "no such file or folder.*a.txt"),
        ("missing.jsonl", {}, "no such file or folder"),
        (tmp_path / "empty.txt", {}, "is empty"),
        (tmp_path / "nothing", {}, "is empty"),
        (tmp_path / "packed.jsonl.gz", {}, "packed.jsonl.gz.*is empty"),
        (tmp_path / "table.xml", {}, r"unknown ending; known: \.txt"),
        (tmp_path / "mixed" / "b.csv", {"text_column": "body"}, "no column 'body'; it has: text"),
        (tmp_path / "mixed" / "*.md", {}, "no file matches"),
        (tmp_path / "mixed" / "*", {}, r"several kinds \(a.txt, b.csv\); narrow it"),
        (tmp_path / "broken.jsonl", {}, "broken.jsonl.*JSON parse error"),
        (tmp_path / "fake.parquet", {}, "fake.parquet.*Parquet magic bytes"),
        (tmp_path / "cut.txt.xz", {}, "cut.txt.xz.*ended before"),
        (tmp_path / "numbers.jsonl", {}, "holds int64, not text; columns: text .int64., body .string."),
        (tmp_path / "a.jsonl", {"text_column": "body"}, "no column 'body'; it has: text, n"),
        (tmp_path / "a.jsonl", {"split": "test"}, r"split 'test'.*Available splits: \['train'\]"),
        (tmp_path / "a.jsonl", {"config_name": "large"}, "no configurations"),
        (tmp_path / "folder", {"split": "test"}, r"Available splits: \['train', 'validation'\]"),
        (tmp_path / "splits", {"split": "test"}, "no such split; it has: train, validation"),
        ("stdlib", {"split": "test"}, "has only the split 'train'"),
    ]
    for source, fields, message in mistakes:
        with pytest.raises(UserError, match=message) as caught:
            list(text_documents(spec_for(source, **fields)))
        assert "\n" not in str(caught.value)


def test_hub_id_without_network_is_one_line(spec_for, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="'nobody/nothing' is no local path, and the hub cannot be reached"
    ) as caught:
        list(text_documents(spec_for("nobody/nothing")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_id_goes_through_load_dataset(texts, spec_for, monkeypatch, streaming):
    asked = {}

    class Builder:
        hash = "version-1"

    def load_dataset(path, name, *, split, streaming):
        asked.update(path=path, name=name, split=split, streaming=streaming)
        found = datasets.Dataset.from_dict({"body": texts})
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name: Builder)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = spec_for("owner/data", config_name="small", split="test", text_column="body")
    assert list(text_documents(spec, streaming=streaming)) == texts
    assert asked == {"path": "owner/data", "name": "small", "split": "test", "streaming": streaming}
    before = reader(spec).fingerprint
    Builder.hash = "version-2"
    assert reader(spec).fingerprint != before


def test_standard_library_holds_its_text_and_leaves_out_what_varies():
    library = stdlib.standard_library()
    assert library.bytes == sum(len(text.encode()) for text in library.texts) > stdlib.MINIMUM_BYTES
    assert any('"""Heap queue algorithm' in text for text in library.texts)
    assert not any("class TurtleScreen" in text for text in library.texts)


def test_little_library_falls_back_to_the_stories_and_says_so(tmp_path, spec_for, monkeypatch, caplog):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("left out")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "kept.py").write_text("x = 1\n")
    little = stdlib.standard_library(str(tmp_path))
    assert little.texts == ("x = 1\n",)
    monkeypatch.setattr(stdlib, "standard_library", lambda: little)
    found = reader(spec_for("stdlib"))
    assert found.name == "stories"
    assert "only 6 bytes of library sources found; using the story generator" in caplog.text
