"""VQA accuracy, by which VQAv2, TextVQA and VizWiz compare an answer with those of ten people.

The rules are those of https://visualqa.org/evaluation.html (Antol et al., arXiv 1505.00468).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LEAST = 4
"""Answers of people that a question needs: of fewer, no answer could have a full score, as three of
the others must agree with it."""

_AGREE = 3

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}

_ARTICLES = ("a", "an", "the")

# Verbs, pronouns and adverbs by what may be added to them after, or with, an apostrophe.
_SHORTENED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "'ve": "could i might must not should they we what where who would you",
    "'d": "he how it somebody someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'m": "i",
}

_CONTRACTIONS = {
    f"{word}{ending}".replace("'", ""): f"{word}{ending}"
    for ending, words in _SHORTENED.items()
    for word in words.split()
} | {"lets": "let's", "maam": "ma'am", "oclock": "o'clock", "yall": "y'all"}

# A comma between digits goes without a trace, other punctuation leaves a space. Apostrophes and
# colons stay: "girl's" is not "girls", and 2:50 is a time.
_COMMA, _PERIOD = re.compile(r"(?<=\d),(?=\d)"), re.compile(r"\.(?!\d)")
_PUNCTUATION = re.compile(r"[;/\[\]\"(){}=+\\_\-><@`,?!]")


def normalise(text: str) -> str:
    """An answer in the form in which VQA accuracy compares it.

    Lower case; number words up to ten are digits ("none" is 0); articles are left out; missing
    apostrophes of contractions are added ("dont" is "don't"); full stops are left out, except those
    of decimals; of other punctuation all but apostrophes and colons become spaces, and a comma
    between digits is left out.

    Args:
        text: An answer, given or expected.
    """
    text = _PERIOD.sub("", _COMMA.sub("", text.lower().replace("’", "'")))
    words = (_NUMBERS.get(word, word) for word in _PUNCTUATION.sub(" ", text).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(given: str, people: Sequence[str]) -> float:
    """How far an answer agrees with those of people.

    It is min(n / 3, 1), where n of the people gave it, averaged over all ways to leave one of the
    people out. Of ten people who all agree it is 1; where 0, 1, 2, 3 or 4 of ten gave the answer it
    is 0, 0.3, 0.6, 0.9 and 1.

    Args:
        given: The answer.
        people: The answers of people, ten in the data sets that are scored so; at least `LEAST`.

    Returns:
        The score, from 0 to 1.
    """
    own = normalise(given)
    same = [normalise(one) == own for one in people]
    agree = sum(same)
    left = [min((agree - one) / _AGREE, 1.0) for one in same]
    return sum(left) / len(left)
