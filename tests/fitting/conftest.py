"""test_adaptive.py calls tests of the layer that it extends."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "model"))
