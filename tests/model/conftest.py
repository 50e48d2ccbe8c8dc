"""test_defects.py calls tests of the other folder too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "fitting"))
