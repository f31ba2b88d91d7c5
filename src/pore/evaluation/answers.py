"""Whether an answer is right: exact match after a normalisation that forgives only its form."""

from __future__ import annotations

import re
import unicodedata

_EDGES = " \t\n\"'`.,;:!?"
_SPACE = re.compile(r"\s+")


def normalise(text: str) -> str:
    """An answer without what does not count.

    In this order: Unicode NFKC, lower case, runs of white space to one space, and white space,
    quotes and `. , ; : ! ?` taken off both ends. Articles, number words and synonyms count: "2" is
    not "two", and "a cat" is not "cat".

    Args:
        text: An answer, given or expected.

    Returns:
        The form that is compared.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    return _SPACE.sub(" ", text).strip(_EDGES)


def is_right(given: str, expected: str) -> bool:
    """Whether an answer is exactly the expected one, both normalised."""
    return normalise(given) == normalise(expected)
