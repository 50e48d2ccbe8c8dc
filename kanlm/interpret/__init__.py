"""Learned functions of trained models: curves, importance, pictures."""
