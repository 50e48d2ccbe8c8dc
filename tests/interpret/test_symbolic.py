"""Formulas are recovered where one exists, and say how badly they fit where none does."""

import numpy as np
import pytest

from kanlm.interpret.symbolic import formula

X = np.linspace(-3, 3, 61)


@pytest.mark.parametrize(
    ("name", "y"),
    [
        ("x", 2.5 * X - 1),
        ("x^2", 0.7 * (X - 0.5) ** 2 + 0.2),
        ("silu", 1.3 * (0.9 * X) / (1 + np.exp(-0.9 * X)) - 0.4),
        ("tanh", -2 * np.tanh(1.7 * X + 0.3) + 1),
        ("sin", 0.5 * np.sin(1.9 * X + 0.8) + 3),
        ("gauss", 4 * np.exp(-((1.2 * X - 0.6) ** 2))),
    ],
)
def test_elementary_functions_are_recognised(name, y):
    found = formula(X, y)
    assert found.name == name and found.r2 > 0.9999
    np.testing.assert_allclose(found(X), y, atol=1e-2)


def test_noise_has_no_formula():
    y = np.random.default_rng(0).normal(size=61)
    assert formula(X, y).r2 < 0.5


def test_the_fit_counts_where_inputs_lie():
    y = np.where(np.abs(X) < 1.5, 2 * X, np.random.default_rng(1).normal(0, 2, 61))
    density = np.where(np.abs(X) < 1.5, 1.0, 0.0)
    found = formula(X, y, density)
    inner = np.abs(X) < 1.5
    assert np.abs(found(X) - y)[inner].max() < 0.6 and found.r2 > 0.95
    assert np.abs(formula(X, y)(X) - y)[inner].max() > 1


def test_text_of_a_line_has_no_inner_constants():
    assert str(formula(X, 2.5 * X - 1)) == "2.5 x -1"


def test_points_must_be_finite():
    with pytest.raises(ValueError, match="at least 5 finite"):
        formula([0.0, 1.0, 2.0, 3.0, float("nan")], [0.0] * 5)
