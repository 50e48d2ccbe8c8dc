"""Grids that move and get finer, for fitting functions; language models, on uniform grids, need none of it.

adaptive.py   AdaptiveKAN: a KAN layer with knots of its own for each input
refit.py      refine and whiten: other coordinates or a finer grid, the functions stay
knots.py      B-splines on any knots
samples.py    statistics of samples, equal on every rank of a distributed run
"""

from .adaptive import AdaptiveKAN
from .refit import refine, refine_function, whiten

__all__ = ["AdaptiveKAN", "refine", "refine_function", "whiten"]
