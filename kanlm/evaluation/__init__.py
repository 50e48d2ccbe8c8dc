"""Judges of a finished model: perplexity, minimal pairs, the harness bridge, simple baselines."""
