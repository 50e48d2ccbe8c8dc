"""kanlm: language models with Kolmogorov-Arnold (KAN) feed-forward blocks.

After `import kanlm` the Auto classes of transformers know the models, so `from_pretrained` asks for no trust.
"""

import importlib
import sys
from pathlib import Path

__version__ = "0.1.0"


def _is_command_line() -> bool:
    """Whether this process is `kanlm ...` or `python -m kanlm ...`, which imports what its verb needs."""
    words = sys.orig_argv
    run_as_module = "-m" in words and words[words.index("-m") + 1 :][:1] == ["kanlm"]
    return run_as_module or (bool(sys.argv) and Path(sys.argv[0]).name == "kanlm")


if not _is_command_line():  # there `--help` would wait seconds for torch
    importlib.import_module("kanlm.model")
