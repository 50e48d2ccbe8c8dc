"""Pruning side by side: parameters, loss by importance and at random, and step times at each share kept.

    python scripts/prune_table.py DATA MODEL... [--out FILE.json]

prints a Markdown table. Of an MLP's block its neurons are pruned, so an MLP among the MODELs is the baseline.
"""

import argparse
from pathlib import Path

from kanlm.prune import prune_table
from kanlm.runs import provenance, write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="text as in `kanlm eval --data`")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--out", type=Path, help="also write rows, machine and versions to this file")
    options = parser.parse_args()
    rows = prune_table(options.models, options.data)
    if options.out is not None:
        write_json(options.out, {"data": options.data, "rows": rows, "provenance": provenance()})
    print("| FFN | keep | parameters | of the FFNs | loss | random channels | ms a step |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['ffn_type']} | {row['keep']:g} | {row['parameters']:,} | {row['ffn_parameters']:,} | "
            f"{row['loss']:.4f} | {row['random']:.4f} | {1e3 * row['step_seconds']:.1f} |"
        )


if __name__ == "__main__":
    main()
