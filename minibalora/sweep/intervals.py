"""Means with 95 % intervals by Student's t."""

import math

LEVEL = 0.95


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval, t·s / √n; the width of a single value is NaN."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, t_quantile(count - 1) * deviation / math.sqrt(count)


def interval_in_words(values: list[float], digits: int, sign: str = "") -> str:
    """Return the mean and its 95 % interval, such as 0.912 (0.880 to 0.944)."""
    if not values:
        return "-"
    mean, half = mean_interval(values)
    bounds = "" if len(values) == 1 else f" ({mean - half:{sign}.{digits}f} to {mean + half:{sign}.{digits}f})"
    return f"{mean:{sign}.{digits}f}{bounds}"


def t_quantile(freedom: int) -> float:
    """Return t with P(|T| <= t) = LEVEL for Student's t, by bisection."""
    low, high = 0.0, 20.0  # with 1 degree of freedom, t is 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < LEVEL else (low, middle)
    return high


def t_within(t: float, freedom: int) -> float:
    """Return P(|T| <= t) of Student's t with a whole number of degrees of freedom.

    The sums of Abramowitz & Stegun 26.7.3 and 26.7.4, with θ = arctan(t / √ν): for an even ν,
    sin θ (1 + 1/2 cos² θ + 1·3/(2·4) cos⁴ θ + ...), and for an odd ν, 2/π (θ + sin θ (cos θ + 2/3 cos³ θ + ...)), both
    up to the power ν − 2.
    """
    angle = math.atan(t / math.sqrt(freedom))
    is_odd = freedom % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if is_odd else 2, freedom, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total
