"""Whether an answer is right: an exact match, once differences of form are removed."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_EDGES = " \t\n\"'`.,;:!?"


_SPACE = re.compile(r"\s+")


# A leading point belongs to the number, unless several points lead.
_NUMBER = re.compile(
    rf"[{re.escape(_EDGES)}]*?"
    r"(?P<sign>[-+−]?)"
    r"(?:(?P<groups>[1-9]\d{0,2}(?:,\d{3})+)|(?P<whole>\d+)|(?=(?<!\.)\.\d))"
    r"(?P<fraction>\.\d*)?"
    r"(?P<exponent>e[-+]?\d{1,3})?"
    rf"[{re.escape(_EDGES)}]*?"
    r"(?P<percent>%?)"
    rf"[{re.escape(_EDGES)}]*"
)


def normalise(text: str) -> str:
    """Normalise an answer, so that only differences that matter are left.

    In this order: Unicode NFKC; lower case; every run of white space becomes one space; white
    space, quotes and `. , ; : ! ?` are removed at both ends, unless nothing else is there: "." is
    not "!".

    An answer that is a number is written in the shortest way: ".5", "0.50" and "5e-1" are
    "0.5", "1,000" is "1000" (commas before every three digits; "1,5" is no number), and "−3.0" is
    "-3". The sign % stays: "50 %" is "50%", and neither "50" nor "0.5".

    Articles, number words, units and synonyms count: "2" is not "two", and "a cat" is not "cat".

    Args:
        text: An answer, given or expected.

    Returns:
        The form that is compared.
    """
    text = _SPACE.sub(" ", unicodedata.normalize("NFKC", text).lower()).strip()
    number = _NUMBER.fullmatch(text)
    if number is not None:
        return _number(**number.groupdict(default=""))
    return text.strip(_EDGES) or text


def is_right(given: str, expected: str) -> bool:
    """Whether an answer is exactly the expected one, both normalised."""
    return normalise(given) == normalise(expected)


def _number(sign: str, groups: str, whole: str, fraction: str, exponent: str, percent: str) -> str:
    value = Decimal(f"{groups.replace(',', '') or whole or '0'}{fraction}{exponent}")
    text = f"{value:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return ("-" if sign in ("-", "−") and value else "") + text + percent
