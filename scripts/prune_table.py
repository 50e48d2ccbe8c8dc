"""Pruning side by side: `python scripts/prune_table.py DATA MODEL...` prints a Markdown table."""

import sys

from kanlm.prune import prune_table

rows = prune_table(sys.argv[2:], sys.argv[1])
print("| FFN | keep | parameters | of the FFNs | loss | random channels | ms a step |")
print("|---|--:|--:|--:|--:|--:|--:|")
for row in rows:
    print(
        f"| {row['ffn_type']} | {row['keep']:g} | {row['parameters']:,} | {row['ffn_parameters']:,} | "
        f"{row['loss']:.4f} | {row['random']:.4f} | {1e3 * row['step_seconds']:.1f} |"
    )
