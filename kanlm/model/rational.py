# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""Rational functions: ten coefficients that are no sum over basis functions.

Shapes: ... leading, C channels.

Reference: Yang & Wang 2024, arXiv:2409.10594 (safe Pade activations with shared coefficients).
"""

from dataclasses import dataclass

from torch import Tensor

from .basis import Basis, per_channel

FITS = {
    "silu": (
        (3.4949337e-06, 0.5, 0.24998142, 0.053008988, 0.0056863941, 0.000260205),
        (0.26493473, -0.013261471, 0.18928171, 0.01856188),
    ),
    "gelu": (
        (-0.0023883712, 0.5, 0.41356217, 0.11339915, 0.010300634, 0.0),
        (0.40959986, 0.0, 0.24295322, 0.0),
    ),
}
"""Numerator and denominator of the least-squares fits on [-4, 4]; maximal errors 1.2e-5 and 2.4e-3."""


@dataclass(frozen=True)
class Rational(Basis):
    """phi(x) = P(x) / Q(x) with coefficients p_0..p_5, q_0..q_3; the grid says where inputs are expected.

    P(x) = sum_n p_n x^n and Q(x) = 1 + (q_0 x + q_1 x^2)^2 + (q_2 x + q_3 x^2)^2. Q is positive everywhere;
    its gradient vanishes only at q = 0, where no fit starts.
    """

    @property
    def num_functions(self) -> int:
        return 10

    def combine(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """P/Q of every channel's group: coefficients [groups, 10] and x [..., C] to [..., C]."""
        c = per_channel(coefficients, x.shape[-1])  # [10, C]
        numerator = c[5]
        for n in range(4, -1, -1):
            numerator = numerator * x + c[n]
        return numerator / (1 + ((c[6] + c[7] * x) * x).square() + ((c[8] + c[9] * x) * x).square())


def initial_rational(name: str) -> tuple[float, ...]:
    """The ten coefficients of a fit, or of exactly the identity.

    Raises:
        ValueError: "zero", whose numerator would get no gradient through any denominator, and "gelu_wave".
    """
    if name in ("zero", "gelu_wave"):
        raise ValueError(
            f"initial: a rational function cannot start at {name!r}; choose 'identity' or 'gelu'"
        )
    if name in FITS:
        numerator, denominator = FITS[name]
    else:  # x = x Q(x) / Q(x), with the Q of SiLU
        denominator = FITS["silu"][1]
        q0, q1, q2, q3 = denominator
        numerator = (0.0, 1.0, 0.0, q0**2 + q2**2, 2 * (q0 * q1 + q2 * q3), q1**2 + q3**2)
    return numerator + denominator
