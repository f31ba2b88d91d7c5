"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pore._numbers import (
    fixed,
    flops,
    interval,
    number,
    p_value,
    percent,
    points,
    spread,
    tokens,
)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (number(1.64e9, 1e9), "1.64"),
        (number(1640), "1,640"),
        (number(9138.6, digits=4), "9,139"),
        (number(1234567), "1,234,567"),
        (number(999.96), "1,000"),
        (number(9.999), "10"),
        (number(0.0000123), "0.0000123"),
        (number(0.0), "0"),
        (number(-0.0), "0"),
        (number(-2.5), "-2.5"),
        (number(None), "?"),
        (number(math.inf), "inf"),
        (fixed(-0.04), "0.0"),
        (fixed(-0.06), "-0.1"),
        (fixed(1640), "1,640.0"),
        (fixed(-0.2, 0), "0"),
        (tokens(57.6), "57.6"),
        (tokens(1024), "1,024"),
        (percent(0.1774), "17.7"),
        (percent(-1e-12), "0.0"),
        (interval([-1e-17, 0.177]), "[0.0, 17.7]"),
        (interval((70.14, 73.2), 1), "[70.1, 73.2]"),
        (interval([0.634, 0.8], decimals=0), "[63, 80]"),
        (interval(None), ""),
        (points(0.0131), "+1.3"),
        (points(-0.0041), "−0.4"),
        (points(-0.0001), "0.0"),
        (p_value(0.338), "0.34"),
        (p_value(0.00121), "0.0012"),
        (p_value(1e-9), "<0.0001"),
        (p_value(1.0), "1"),
        (flops(1.642e9), "1.64 GFLOPs"),
        (flops(9.139e12), "9.14 TFLOPs"),
        (flops(None), "?"),
        (spread(253.2, 244.1, 262.9), "253 ± 9"),
        (spread(1.234, 1.2, 1.3), "1.23 ± 0.05"),
        (spread(5231.0, 5200.0, 5300.0), "5,231 ± 50"),
        (spread(0.0, 0.0, 0.0), "0 ± 0"),
    ],
)
def test_numbers_are_as_people_write_them(found: str, expected: str) -> None:
    assert found == expected


@given(st.floats(-1e300, 1e300), st.integers(1, 6))
def test_a_number_is_near_what_is_written(value: float, digits: int) -> None:
    text = number(value, digits=digits)
    assert "e" not in text
    assert text != "-0"
    close = 0.5 * 10 ** (1 - digits) + 1e-9
    assert math.isclose(float(text.replace(",", "")), value, rel_tol=close)
