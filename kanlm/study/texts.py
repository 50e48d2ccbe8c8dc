"""The texts of the shipped study, and what counting and compressing reach on them.

Corpora: `wikitext-2`, and `mixed`, equal parts of Python sources, novels, textbooks and stories, each of
which is a corpus of its own, too. Train has other documents than valid and test. WikiText-2's valid and test
have different documents, too; those of the other texts are the alternate pieces of the same documents.
"""

from __future__ import annotations

import lzma
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np

from kanlm.evaluation.baselines import kneser_ney_by_order, xz_bits_per_byte
from kanlm.runs import read_json, write_json
from kanlm.study.plan import ROOT, SEPARATOR, StudyFolder

BYTES_A_TOKEN = 2.59
"""Of the vocabulary of 1,024, in both corpora within 0.2%."""
MIXED = {
    "python": "pystdlib-3.11.7",
    "novels": "eltec-eng",
    "textbooks": "openstax-ccby",
    "stories": "tinystories-mini",
}
"""The parts of `mixed` and their folders; each is a corpus of its own, too."""
TRAINED_ON, HELD_OUT = 5_800_000, 300_000
"""Bytes of each part of `mixed` in train, and in valid and test."""


def prepare(data_dir: Path) -> None:
    """Write the corpora from the folder with wikitext-2, the parts of `mixed`, BLiMP and LAMBADA."""
    out = ROOT / "data"
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        text = lzma.open(data_dir / "wikitext-2" / f"{split}.txt.xz", "rt", encoding="utf-8").read()
        # One document an article; a line " = Title = " begins it.
        articles: list[list[str]] = [[]]
        for line in text.splitlines(keepends=True):
            if line.startswith(" = ") and not line.startswith(" = ="):
                articles.append([])
            articles[-1].append(line)
        write_documents(out / f"wikitext-2.{split}.txt", ["".join(a) for a in articles if "".join(a).strip()])
    for source, name in (("blimp/blimp", "blimp"), ("zeroshot/lambada_openai", "lambada")):
        shutil.copy(data_dir / f"{source}.jsonl.xz", out / f"{name}.jsonl.xz")
    parts: dict[str, list[str]] = defaultdict(list)
    for name, folder in MIXED.items():
        held_out = [
            document
            for split in ("valid", "test")
            if (path := data_dir / folder / f"{split}.txt.xz").is_file()
            for document in read_documents(path)
        ]
        # Few and long documents are held out: valid and test get alternate pieces of each.
        pieces = [d[i : i + 20_000] for d in held_out for i in range(0, len(d), 20_000)]
        part = {
            "train": read_documents(data_dir / folder / "train.txt.xz", TRAINED_ON),
            "valid": up_to(pieces[0::2], HELD_OUT),
            "test": up_to(pieces[1::2], HELD_OUT),
        }
        for split, documents in part.items():
            parts[split] += documents
            write_documents(out / f"{name}.{split}.txt", documents)
    shuffle = np.random.default_rng(0)
    for split, documents in parts.items():
        write_documents(
            out / f"mixed.{split}.txt", [documents[i] for i in shuffle.permutation(len(documents))]
        )


def read_documents(path: Path, size: int | None = None) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        documents = [d.strip("\n") for d in file.read().split(f"\n{SEPARATOR}\n")]
    documents = [d for d in documents if d.strip()]
    return documents if size is None else up_to(spread(documents), size)


def spread(documents: list[str]) -> list[str]:
    """In a seeded order, long ones cut in pieces, so that a prefix is a fair sample."""
    pieces = [d[i : i + 50_000] for d in documents for i in range(0, len(d), 50_000)]
    return [pieces[i] for i in np.random.default_rng(1).permutation(len(pieces))]


def up_to(documents: list[str], size: int) -> list[str]:
    sizes = np.cumsum([len(document.encode()) for document in documents])
    return documents[: int(np.searchsorted(sizes, size)) + 1]


def write_documents(path: Path, documents: list[str]) -> None:
    path.write_text(f"\n{SEPARATOR}\n".join(documents) + "\n", encoding="utf-8")
    print(f"{path}: {len(documents)} documents, {path.stat().st_size:,} bytes")


def count(study: StudyFolder, names: tuple[str, ...]) -> None:
    """Add to baselines.json what counting and compressing reach on the test texts of the phases `names`.

    From all of the training text, and from its first documents, as many bytes as the tokens of each final
    phase are (all, where they are more than one pass).
    """
    path = study.baselines
    found = read_json(path) if path.is_file() else {}
    study.trials_of(names)  # complains of an unknown name
    final = [phase for phase in study.phases() if phase.get("role") == "final"]
    final = [phase for phase in final if not names or phase["name"] in names]
    wanted = {
        counted(phase["corpus"], tokens): (phase["corpus"], tokens)
        for phase in final
        for tokens in (None, phase["tokens"])
    }
    for name, (corpus, tokens) in wanted.items():
        if name in found:
            continue
        whole = found.get(counted(corpus, None))
        if whole is not None and tokens is not None and tokens * BYTES_A_TOKEN >= whole["bytes"]:
            found[name] = whole
            write_json(path, found)
            continue
        train, test = (
            [
                d.strip("\n")
                for d in (ROOT / "data" / f"{corpus}.{split}.txt").read_text("utf-8").split(SEPARATOR)
            ]
            for split in ("train", "test")
        )
        documents = train if tokens is None else up_to(train, round(tokens * BYTES_A_TOKEN))
        found[name] = {
            "bytes": sum(len(document.encode()) for document in documents),
            "kneser_ney_bits_per_byte": kneser_ney_by_order(documents, test, range(3, 9)),
            "xz_bits_per_byte": xz_bits_per_byte(documents, test),
        }
        print(name, found[name], flush=True)
        write_json(path, found)


def counted(corpus: str, tokens: int | None) -> str:
    return f"{corpus}, all" if tokens is None else f"{corpus}, {tokens} tokens"
