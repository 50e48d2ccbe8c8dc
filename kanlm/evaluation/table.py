"""`kanlm eval`: several models on several texts, one table, and the differences between the models.

A difference is that of bits per byte on the same documents, so models with different tokenizers compare; its
interval is the sampling error of the text. Where a text has few documents and the tokenizers are the same,
the pairs are consecutive parts of it.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats as distributions

from kanlm import metrics, stats
from kanlm.config import UserError
from kanlm.evaluation.loading import must_be_model
from kanlm.evaluation.perplexity import (
    Score,
    held_out_documents,
    load_fast,
    report_of,
    score,
    usable_context,
)
from kanlm.runs import EvalReport, json_sha256

FEWEST_DOCUMENTS = 20
"""Fewer are too few pairs for an interval."""


@dataclass(frozen=True)
class Difference:
    """Bits per byte of `model` less those of `baseline` on a text, with a 95% interval; below 0 is better.

    No interval where there is a single pair: one document, and tokenizers that differ.
    """

    model: str
    baseline: str
    dataset: str
    bits_per_byte: float
    low: float | None
    high: float | None
    p_value: float | None
    pairs: int
    paired_by: str
    """`documents` or `parts of the text`."""


@dataclass(frozen=True)
class Evaluation:
    """Reports in the order models x texts, and each model against the first."""

    reports: list[EvalReport]
    differences: list[Difference]

    def as_json(self) -> Any:
        """The report alone where there is one, else both lists."""
        if len(self.reports) == 1:
            return self.reports[0].model_dump(mode="json")
        return {
            "reports": [report.model_dump(mode="json") for report in self.reports],
            "totals": [report.model_dump(mode="json") for report in totals(self.reports)],
            "differences": [asdict(difference) for difference in self.differences],
        }


def evaluate_all(
    models: Sequence[str | Path],
    texts: Sequence[str | Path],
    *,
    split: str | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    losses: str | Path | None = None,
    progress: bool = True,
    **reading: Any,
) -> Evaluation:
    """Score every one of `models` on every one of `texts`; `reading` is that of `held_out_documents`.

    losses: a .safetensors or .parquet file for the loss of each token, see `write_losses`.

    Raises:
        UserError: as `score`, `load_causal_lm` and `held_out_documents`; or another kind of file.
    """
    if losses is not None and Path(losses).suffix not in (".safetensors", ".parquet"):
        raise UserError(f"--token-losses: expected a .safetensors or .parquet file, got {losses}")
    reports: list[EvalReport] = []
    scores: list[Score] = []
    for one in models:  # the last one's mistake is told before the hours that the first may take
        must_be_model(one)
    sizes = [_bytes(text, split, reading, progress) for text in texts]
    for model_path in models:
        model, tokenizer = load_fast(model_path, dtype, device, trust_remote_code)
        context = usable_context(model, context_length, str(model_path))
        for text, total_bytes in zip(texts, sizes, strict=True):
            documents, dataset, part = held_out_documents(text, split, **reading)
            result = score(
                model,
                tokenizer,
                documents,
                context_length=context,
                stride=stride,
                batch_size=batch_size,
                progress=progress,
                total_bytes=total_bytes,
                keep_tokens=losses is not None,
            )
            scores.append(result)
            reports.append(
                report_of(model, result, str(model_path), dataset, part, context, stride or context)
            )
    if losses is not None:
        write_losses(losses, reports, scores)
    return Evaluation(reports, list(_differences(reports, scores, len(texts))))


def _bytes(text: str | Path, split: str | None, reading: dict[str, Any], counted: bool) -> int | None:
    """Size of a local text, for the time left; None where it is not `counted`, or where reading it twice
    means fetching it twice. UserError where there is no such text.
    """
    documents, _, _ = held_out_documents(text, split, **reading)
    local = Path(text).exists() or glob.has_magic(str(text)) or str(text) in ("stdlib", "stories")
    if not (counted and local):
        return None
    return sum(len(document.encode("utf-8")) for document in documents)


def _differences(reports: list[EvalReport], scores: list[Score], texts: int) -> Iterator[Difference]:
    for row in range(texts, len(reports)):
        first = row % texts
        yield difference(reports[row], reports[first], scores[row], scores[first])


def difference(ours: EvalReport, theirs: EvalReport, a: Score, b: Score) -> Difference:
    """`ours` less `theirs`, both scored on the same text; a t interval over documents, else over parts."""
    assert ours.data_sha256 == theirs.data_sha256, "two texts"
    nll, bytes_of, paired_by = _pairs(a, b)
    difference = sum(nll) / sum(bytes_of) / math.log(2)
    names = ours.model, theirs.model, ours.dataset
    if len(nll) < 2:
        return Difference(*names, difference, None, None, None, len(nll), paired_by)
    error = stats.standard_error(nll, bytes_of) / math.log(2)
    half = float(distributions.t.ppf(0.975, len(nll) - 1)) * error
    # A model against itself differs nowhere.
    t = abs(difference) / error if error > 0 else math.inf if difference else 0.0
    p_value = float(2 * distributions.t.sf(t, len(nll) - 1))
    return Difference(*names, difference, difference - half, difference + half, p_value, len(nll), paired_by)


def _pairs(a: Score, b: Score) -> tuple[list[float], list[float], str]:
    """(differences of nll_nats, bytes, what a pair is)."""
    sized = [
        (ours - theirs, float(size))
        for ours, theirs, size in zip(a.document_nll, b.document_nll, a.document_bytes, strict=True)
        if size
    ]
    if (
        len(sized) < FEWEST_DOCUMENTS
        and a.window_tokens == b.window_tokens
        and len(a.window_tokens) > len(sized)
    ):
        token_bytes = sum(a.document_bytes) / a.tokens
        return (
            [ours - theirs for (_, ours), (_, theirs) in zip(a.parts(), b.parts(), strict=True)],
            [tokens * token_bytes for tokens, _ in a.parts()],
            "parts of the text",
        )
    return [nll for nll, _ in sized], [size for _, size in sized], "documents"


def write_losses(path: str | Path, reports: list[EvalReport], scores: list[Score]) -> None:
    """The loss of each token, in nats: .parquet with columns model, data, document, token, nll; .safetensors
    with `R.document`, `R.token` and `R.nll` for report R (0, 1, ...), whose model and text are its metadata.
    """
    import numpy as np

    columns: list[dict[str, np.ndarray]] = []
    for result in scores:
        assert result.token_losses is not None
        lengths = [len(row) for row in result.scored_tokens]
        columns.append(
            {
                "document": np.repeat(np.array(result.window_documents, dtype=np.int32), lengths),
                "token": np.array([token for row in result.scored_tokens for token in row], dtype=np.int32),
                "nll": np.array([nll for row in result.token_losses for nll in row], dtype=np.float32),
            }
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == ".safetensors":
        from safetensors.numpy import save_file

        tensors = {
            f"{row}.{name}": column for row, table in enumerate(columns) for name, column in table.items()
        }
        names = {f"{row}": f"{report.model} on {report.dataset}" for row, report in enumerate(reports)}
        save_file(tensors, path, names)
        return
    import pyarrow
    from pyarrow import parquet

    tables = [
        pyarrow.table(
            {
                "model": [report.model] * len(table["nll"]),
                "data": [report.dataset] * len(table["nll"]),
                **table,
            }
        )
        for report, table in zip(reports, columns, strict=True)
    ]
    parquet.write_table(pyarrow.concat_tables(tables), path)


def totals(reports: Sequence[EvalReport]) -> list[EvalReport]:
    """For each model all its texts as one, by their sums; none where there is a single text."""
    by_model: dict[str, list[EvalReport]] = {}
    for report in reports:
        by_model.setdefault(report.model, []).append(report)
    return [_total(ours) for ours in by_model.values() if len(ours) > 1]


SUMMED = ("tokens", "bytes", "words", "lines", "documents", "nll_nats", "seconds")


def _total(reports: list[EvalReport]) -> EvalReport:
    sums = {name: sum(getattr(report, name) for report in reports) for name in SUMMED}
    derived = {
        **metrics.ratios(sums["nll_nats"], sums["tokens"], sums["bytes"], sums["words"]),
        "dataset": f"all {len(reports)} texts",
        "split": "total",
        "tokens_per_second": sums["tokens"] / sums["seconds"],
        "data_sha256": json_sha256([report.data_sha256 for report in reports]),
        "parts": [],
    }
    return reports[0].model_copy(update=sums | derived)


COLUMNS = {
    "model": lambda report: report.model,
    "data": lambda report: f"{report.dataset} ({report.split})",
    "bits/byte": lambda report: f"{report.bits_per_byte:.4f}",
    "nats/token": lambda report: f"{report.loss:.4f}",
    "perplexity": lambda report: f"{report.perplexity:,.2f}",
    "word perplexity": lambda report: f"{report.word_perplexity:,.1f}",
    "tokens": lambda report: f"{report.tokens:,}",
    "parameters": lambda report: f"{report.parameters:,}",
    "tokens/s": lambda report: f"{report.tokens_per_second:,.0f}",
}


def text_table(evaluation: Evaluation) -> str:
    """What a person reads: a line a report, one for each model's texts together, then a line a difference."""
    reports = [*evaluation.reports, *totals(evaluation.reports)]
    rows = [list(COLUMNS), *([show(report) for show in COLUMNS.values()] for report in reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *map(difference_text, evaluation.differences)])


def difference_text(found: Difference) -> str:
    line = f"{found.model} - {found.baseline} on {found.dataset}: {found.bits_per_byte:+.4f} bits/byte, "
    if found.low is None:
        return line + (
            "no interval: the text is one document and the tokenizers differ; --document-separator, or a "
            "document a row, gives pairs"
        )
    return line + (
        f"95% interval [{found.low:+.4f}, {found.high:+.4f}] over {found.pairs} {found.paired_by}, "
        f"p = {found.p_value:.2g}"
    )
