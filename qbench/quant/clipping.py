"""Where clipping a Gauss or Laplace distribution loses least, in closed form: ACIQ. Plain numbers; nothing of a tensor.

All is in units of the distribution's own scale: sigma for Gauss, b = E|x - mean| for Laplace. M bits are 2^M bins of
width 2a / 2^M between -a and a; what is rounded is taken as noise spread evenly over a bin.

Reference: 1810.05723 (ACIQ); the formulas as in the authors' code, their constants as in test_clipping.py
"""

import math
from functools import cache

DISTRIBUTIONS = ("gauss", "laplace")


def error(distribution: str, a: float, bits: float) -> float:
    """Mean squared error of clipping to +-a and rounding to 2^bits bins.

    laplace: 2 exp(-a) + a^2 / (3 4^bits)
    gauss:   (1 + a^2) (1 - erf(a / sqrt 2)) - sqrt(2 / pi) a exp(-a^2 / 2) + a^2 / (3 4^bits)
    """
    rounding = a * a / (3 * math.pow(4, bits))
    if distribution == "laplace":
        return 2 * math.exp(-a) + rounding
    beyond = (1 + a * a) * math.erfc(a / math.sqrt(2)) - math.sqrt(2 / math.pi) * a * math.exp(-a * a / 2)
    return beyond + rounding


def slope(distribution: str, a: float, bits: float) -> float:
    """The derivative of `error` with respect to a."""
    rounding = 2 * a / (3 * math.pow(4, bits))
    if distribution == "laplace":
        return rounding - 2 * math.exp(-a)
    return rounding + 2 * a * math.erfc(a / math.sqrt(2)) - 2 * math.sqrt(2 / math.pi) * math.exp(-a * a / 2)


@cache
def best(distribution: str, bits: float, half: bool = False) -> float:
    """The `a` of least error, found by bisection; of Laplace it is LambertW(3 4^bits).

    half: only 0..a is to be covered, as behind a ReLU. The bins are half as wide then: the best a is that of one more
    bit.
    """
    bits, low, high = bits + half, 0.0, 64.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(distribution, middle, bits) < 0 else (low, middle)
    return high
