"""What ``compare`` takes for noise: a time's variance by its rounds, and how large an estimate must be to count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from dla_fast.bench.records import Record

# The chance that a comparison of unchanged code calls something worse, both levels together.
ALARM = 0.025
# How often a change of the size that is said to show is found.
POWER = 0.8
# Rounds of a record that does not say: the least there are.
_FEWEST_ROUNDS = 3
# Standard deviations of the normal distribution between the 20th and the 80th percentile, and to the upper quartile.
_SPAN = NormalDist().inv_cdf(0.8) - NormalDist().inv_cdf(0.2)
QUARTILE = NormalDist().inv_cdf(0.75)


def moved(a: Record, b: Record) -> tuple[float, float]:
    """The change of a time's logarithm from ``a`` to ``b``, and its variance by the rounds of both."""
    variance = 0.0
    for r in (a, b):
        low, high = r.get("p20_ms") or r["median_ms"], r.get("p80_ms") or r["median_ms"]
        # The variance of a median is π/2 times that of a mean.
        variance += math.pi / 2 * (math.log(high / low) / _SPAN) ** 2 / (r.get("rounds") or _FEWEST_ROUNDS)
    return math.log(b["median_ms"] / a["median_ms"]), variance


def quantile(tail: float, degrees: float) -> float:
    """The t that Student's distribution exceeds with a probability of ``tail``.

    Wallace's (1959) approximation by the normal distribution, turned round: with few degrees of freedom up to 6 % too
    large far out.
    """
    z = NormalDist().inv_cdf(1 - tail) * (8 * degrees + 3) / (8 * degrees + 1)
    return math.sqrt(degrees * math.expm1(z * z / degrees))


@dataclass(frozen=True)
class Judge:
    """How large an estimate must be: ``tests`` comparisons share half of :data:`ALARM` at either end."""

    tests: int
    threshold: float

    def least(self, error: float, degrees: float, power: float = 0.5) -> float:
        """The logarithm of the smallest change that is found with a probability of ``power``."""
        bound = max(math.log1p(self.threshold), quantile(ALARM / 2 / self.tests, degrees) * error)
        return bound + NormalDist().inv_cdf(power) * error
