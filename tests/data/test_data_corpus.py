"""Held-out text: nothing lost, nothing in both parts."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_data import write_jsonl

from kanlm.config import SourceConfig, UserError
from kanlm.data import documents
from kanlm.data.corpus import TextStream, _tail_rule, split_sources
from kanlm.evaluation.perplexity import held_out_documents


def test_hashed_documents_are_split_without_loss_or_overlap(jsonl, texts, config_for):
    write_jsonl(jsonl, texts + texts[:50])  # duplicates must fall on one side
    config = config_for(jsonl, validation_fraction=0.2)
    train, held_out = list(documents(config.data, "train")), list(documents(config.data, "validation"))
    assert Counter(train + held_out) == Counter(texts + texts[:50])
    assert not set(train) & set(held_out)
    assert 0.1 < len(held_out) / len(texts) < 0.3


def test_of_few_documents_the_tails_are_held_out(tmp_path, texts, config_for):
    write_jsonl(tmp_path / "few.jsonl", texts[:99])
    config = config_for(tmp_path / "few.jsonl", validation_fraction=0.25)
    heads, tails = list(documents(config.data, "train")), list(documents(config.data, "validation"))
    assert [head + tail for head, tail in zip(heads, tails, strict=True)] == texts[:99]
    assert 0.15 < sum(map(len, tails)) / sum(map(len, texts[:99])) < 0.3


@given(st.text(min_size=1), st.floats(0.01, 0.99))
def test_head_and_tail_are_the_document(text, fraction):
    assert _tail_rule("train", fraction)(text) + _tail_rule("validation", fraction)(text) == text


def test_validation_split_and_source(tmp_path, texts, config_for):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", texts)
    write_jsonl(folder / "test.jsonl", ["held out one", "held out two"])
    by_split = config_for(folder, validation_split="test", max_documents=5)
    assert list(documents(by_split.data, "train")) == texts[:5]
    assert list(documents(by_split.data, "validation")) == ["held out one", "held out two"]
    by_source = config_for(folder, validation_source=str(folder / "test.jsonl"))
    assert list(documents(by_source.data, "train")) == texts
    assert list(documents(by_source.data, "validation")) == ["held out one", "held out two"]


def test_held_out_text_that_is_trained_on_is_refused(tmp_path, jsonl, config_for, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for held_out in ({"validation_split": "train"}, {"validation_source": "./texts.jsonl"}):
        with pytest.raises(UserError, match="is what is trained on"):
            list(documents(config_for(jsonl, **held_out).data, "train"))
    mixture = (SourceConfig(source=str(jsonl)), SourceConfig(source="stories"))
    with pytest.raises(UserError, match="is what is trained on"):
        list(documents(config_for(mixture=mixture, validation_source="stories").data, "train"))


def test_mixture_holds_out_a_part_of_each_source(jsonl, texts, config_for):
    mixture = (
        SourceConfig(source=str(jsonl)),
        SourceConfig(source="stories"),
        SourceConfig(source="no/no", weight=0.0),
    )
    config = config_for(mixture=mixture, max_documents=200)
    held_out, train = list(documents(config.data, "validation")), list(documents(config.data, "train"))
    assert {text.startswith("It was a") for text in held_out} == {True, False}
    assert len(held_out) + len(train) == 400


def test_streaming_bounds_the_hashed_out_documents(jsonl, texts, config_for, monkeypatch):
    monkeypatch.setattr("kanlm.data.corpus.STREAMED_VALIDATION_DOCUMENTS", 5)
    whole = config_for(jsonl, validation_fraction=0.3)
    streamed = config_for(jsonl, validation_fraction=0.3, streaming=True)
    assert list(documents(streamed.data, "validation")) == list(documents(whole.data, "validation"))[:5]
    assert list(documents(streamed.data, "train")) == list(documents(whole.data, "train"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_stream_goes_on_after_any_text(jsonl, config_for, monkeypatch, split):
    monkeypatch.setattr("kanlm.data.sources.CHUNK_ROWS", 11)
    (source,) = split_sources(config_for(jsonl, validation_fraction=0.3, max_documents=250).data, split)
    stream, states, found = TextStream(source), [], []
    states.append(stream.state_dict())
    for text in stream:
        found.append(text)
        states.append(stream.state_dict())
    assert len(found) > 50
    for number in (0, 1, 10, 11, 12, 40, len(found)):
        assert list(TextStream(source, states[number])) == found[number:]


def test_rule_of_the_split_is_part_of_its_fingerprint(jsonl, config_for):
    def fingerprint(split="train", **data):
        return split_sources(config_for(jsonl, **data).data, split)[0].fingerprint

    others = [
        fingerprint("validation"),
        fingerprint(validation_fraction=0.1),
        fingerprint(max_documents=200),
        fingerprint(max_documents=20),
        fingerprint(invalid_utf8="replace"),
    ]
    assert len({fingerprint(), *others}) == 6
    assert fingerprint(block_size=64) == fingerprint()


@pytest.mark.parametrize("source", ["stdlib", "stories"])
@pytest.mark.parametrize(
    "data",
    [
        {"validation_fraction": 0.01},
        {"validation_fraction": 0.2},
        {"max_documents": 60},
        {"validation_source": "texts.jsonl"},
        {"mixture": True},
    ],
)
def test_what_eval_scores_of_an_embedded_source_is_never_trained_on(
    source, data, jsonl, config_for, monkeypatch
):
    monkeypatch.chdir(jsonl.parent)
    if data.get("mixture"):
        data = {"mixture": (SourceConfig(source=source), SourceConfig(source=str(jsonl)))}
    scored, name, split = held_out_documents(source)
    scored = set(scored)
    assert len(scored) > 10 and (name, split) == (source, "validation")
    trained = list(documents(config_for("" if "mixture" in data else source, **data).data, "train"))
    assert len(trained) > 40 and scored.isdisjoint(trained)
