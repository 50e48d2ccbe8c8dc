"""kanlm: language models with Kolmogorov-Arnold (KAN) feed-forward blocks."""

__version__ = "0.1.0"
