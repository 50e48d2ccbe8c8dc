"""Peak memory of `kanlm tokenize` against the size of the corpus: one huge document, or many small ones, as
rows of one file or as files (of about a thousand bytes each).

    python scripts/bench_memory.py texts.txt [more.txt ...] --megabytes 10 100 1000 --out memory.json

Makes the corpora from the given text files (plain or .xz; paragraphs in a seeded, varied order, repeated
until the size is reached), tokenises each in a process of its own, tokenizer training included, and prints a
table. Memory is what the process holds for itself (anonymous pages) and in all (with mapped files and
libraries), looked at every 0.1 seconds.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kanlm.runs import provenance, write_json

CONFIG = """
name = "memory"
[model]
[tokenizer]
vocab_size = 4096
[data]
source = "{source}"
cache_dir = "{cache}"
[train]
max_tokens = 1_000_000
"""


def paragraphs(files: list[Path]) -> list[str]:
    found: list[str] = []
    for path in files:
        opened = (
            lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8")
        )
        with opened as file:
            found += [part for part in file.read().split("\n") if len(part) > 200]
    return found


FORMS = {"one document": "corpus.txt", "rows": "corpus.jsonl", "files": "corpus/*/*.txt"}
"""And what `data.source` is, in the folder of the corpus."""


def write_corpus(folder: Path, texts: list[str], megabytes: int, form: str) -> int:
    """One document in a .txt file, short rows in a .jsonl file, or short .txt files; how many documents."""
    rng, size, documents = random.Random(0), 0, 0
    with open(folder / ("corpus.jsonl" if form == "rows" else "corpus.txt"), "w", encoding="utf-8") as file:
        while size < megabytes * 1_000_000:
            text = texts[rng.randrange(len(texts))]
            if form == "one document":
                size += len(text.encode()) + 1
                file.write(text + "\n")
                documents = 1
                continue
            for start in range(0, len(text), 1000):
                part = text[start : start + 1000]
                size += len(part.encode())
                if form == "rows":
                    file.write(json.dumps({"text": part}, ensure_ascii=False) + "\n")
                else:
                    below = folder / "corpus" / f"{documents // 1000:04}"
                    below.mkdir(parents=True, exist_ok=True)
                    (below / f"{documents % 1000:03}.txt").write_text(part, encoding="utf-8")
                documents += 1
    return documents


def memory_kib(process_id: int) -> tuple[int, int]:
    """(anonymous, all resident) memory of a process and its children."""
    own = resident = 0
    waiting = [process_id]
    while waiting:
        number = waiting.pop()
        try:
            status = Path(f"/proc/{number}/status").read_text()
            waiting += map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
        values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        own += int(values.get("RssAnon", "0 kB").split()[0])
        resident += int(values.get("VmRSS", "0 kB").split()[0])
    return own, resident


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--forms", nargs="+", default=["one document", "rows"], choices=FORMS)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    texts = paragraphs(arguments.texts)
    rows = []
    for megabytes in arguments.megabytes:
        for form in arguments.forms:
            folder = Path(tempfile.mkdtemp(prefix="kanlm-memory-"))
            documents = write_corpus(folder, texts, megabytes, form)
            source = folder / FORMS[form]
            (folder / "config.toml").write_text(CONFIG.format(source=source, cache=folder / "cache"))
            started, peak = time.monotonic(), (0, 0)
            command = [sys.executable, "-m", "kanlm", "tokenize", str(folder / "config.toml")]
            command += ["--workers", str(arguments.workers)]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while process.poll() is None:
                found = memory_kib(process.pid)
                peak = max(peak[0], found[0]), max(peak[1], found[1])
                time.sleep(0.1)
            seconds = time.monotonic() - started
            usage = os.times()
            if process.returncode:
                sys.exit(f"{' '.join(command)}: status {process.returncode}")
            rows.append(
                {
                    "megabytes": megabytes,
                    "form": form,
                    "documents": documents,
                    "peak_anonymous_mib": round(peak[0] / 1024),
                    "peak_resident_mib": round(peak[1] / 1024),
                    "seconds": round(seconds, 1),
                    "processor_seconds_so_far": round(usage.children_user + usage.children_system, 1),
                }
            )
            print(rows[-1], flush=True)
            shutil.rmtree(folder)
    if arguments.out:
        write_json(arguments.out, {"rows": rows, "workers": arguments.workers, "provenance": provenance()})


if __name__ == "__main__":
    main()
