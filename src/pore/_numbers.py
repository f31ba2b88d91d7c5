"""Numbers as people read them, in the terminal, on pages and in figures: `1.64`, `1,640`, `+1.3`.

No number is written with an exponent, and none is a negative zero. Files for programs (JSON, CSV)
hold the numbers themselves instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

UNKNOWN = "?"
"""What stands for a number that is not known."""


def fixed(value: float, decimals: int = 1) -> str:
    """A number with so many decimals: 1640 as "1,640.0", -0.01 as "0.0"."""
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if not text.strip("-0,.") else text


def number(value: float | None, unit: float = 1.0, digits: int = 3) -> str:
    """A number in a unit, to so many digits: "1.64", "253", "1,640"; "?" if it is not known."""
    if value is None:
        return UNKNOWN
    value /= unit
    if not value or not math.isfinite(value):
        return f"{value:.0f}".removeprefix("-")
    # Rounded first, since 9.999 has a digit more before the point once it has three digits.
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0)
    text = f"{value if decimals == 0 else rounded:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def tokens(value: float) -> str:
    """A mean number of tokens, without decimals if it is whole: "64", "57.6", "1,024"."""
    return fixed(value, 0 if value == round(value) else 1)


def percent(share: float) -> str:
    """A share in percent with one decimal, without the sign of percent: 0.177 as "17.7"."""
    return fixed(100 * share)


def interval(ends: Sequence[float] | None, unit: float = 0.01, decimals: int = 1) -> str:
    """An interval of shares in percent: "[0.0, 17.7]"; nothing where there is none.

    Args:
        ends: Its lower and upper end.
        unit: What they are divided by; 1 for numbers that are no shares.
        decimals: The decimals of both.
    """
    if ends is None:
        return ""
    return f"[{', '.join(fixed(end / unit, decimals) for end in ends)}]"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign: "+1.3", "−0.4", "0.0"."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def signed(value: float) -> str:
    """A difference with its sign and one decimal: "+1.3", "−0.4", "0.0"."""
    return points(value / 100)


def p_value(p: float) -> str:
    """The p of a test to two digits: "0.34", "0.0012", and "<0.0001" below that."""
    return "<0.0001" if p < 1e-4 else number(p, digits=2)


def flops(value: float | None) -> str:
    """Operations with their unit: "1.64 GFLOPs", "9.14 TFLOPs"; "?" if they are not known."""
    if value is None:
        return UNKNOWN
    unit, name = (1e12, "TFLOPs") if value >= 1e12 else (1e9, "GFLOPs")
    return f"{number(value, unit)} {name}"


def spread(middle: float, low: float, high: float) -> str:
    """A measurement with its spread: 253 between 245 and 263 as "253 ± 9".

    Args:
        middle: The median.
        low: The lower quartile.
        high: The upper quartile; the spread is half the distance between the two.
    """
    around = (high - low) / 2
    # As many decimals as the median needs for three digits, so that both line up.
    decimals = max(2 - math.floor(math.log10(abs(middle))), 0) if middle else 0
    return f"{fixed(middle, decimals)} ± {fixed(around, decimals)}"
