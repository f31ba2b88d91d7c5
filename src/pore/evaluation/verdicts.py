"""Which differences between two files of results are real.

Every setting of the second file is compared with its partner in the first, on the same questions.
The p-values are corrected for their number by Holm's method, because of twenty comparisons without
any difference one is expected to have p below 0.05.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pore.errors import InputError
from pore.evaluation.files import Results
from pore.evaluation.records import Record
from pore.evaluation.statistics import Judged, holm, paired
from pore.plotting.labels import UNPRUNED, budget_label, label


@dataclass(frozen=True)
class Verdict(Judged):
    """Two settings compared on the same questions, as one of several comparisons.

    Attributes:
        first: The record of the setting to compare with.
        second: The record of the setting that is compared with it.
        paired: The second minus the first.
    """

    first: Record
    second: Record

    def record(self) -> dict[str, Any]:
        """The verdict as plain JSON types."""
        return {
            "keep": self.second["keep"],
            "first": name_of(self.first),
            "second": name_of(self.second),
            **super().record(),
        }


def name_of(record: Record) -> str:
    """The name of a setting's method in `pore compare`, such as "FastV + exponential"."""
    bias = record["reweight"]
    return str(record["method"]) if bias is None else f"{record['method']} + {bias}"


def judge(
    first: Results,
    second: Results,
    *,
    names: tuple[str | None, str | None] = (None, None),
    seed: int = 0,
) -> list[Verdict]:
    """Compare two files of results, setting by setting.

    Args:
        first: What a file holds.
        second: What the other holds, or the same file.
        names: A method of each file to compare at every budget, as `name_of` or `label` gives it;
            None for all methods of the file. If both are None, methods of the same name are
            compared with each other.
        seed: Seed of the bootstrap.

    Returns:
        A verdict for every pair.

    Raises:
        InputError: The files are about other questions, do not say which were answered right, or
            have no settings to compare.
    """
    places = _same_questions(first, second)
    pairs = list(_pairs(first.records, second.records, names))
    if not pairs:
        raise InputError(_no_pair(first.records, second.records, names))
    found = []
    for one, other in pairs:
        scores = [(one["scores"][i], other["scores"][j]) for i, j in places]
        both = [(a, b) for a, b in scores if a is not None and b is not None]
        if not both:
            raise InputError("No question was answered in both files.")
        found.append(paired(*zip(*both, strict=True), seed=seed))
    corrected = holm([one.p for one in found])
    return [Verdict(one, p, *pair) for pair, one, p in zip(pairs, found, corrected, strict=True)]


def _same_questions(first: Results, second: Results) -> list[tuple[int, int]]:
    """The places of every question in the first file and in the second."""
    for number, results in enumerate((first, second), 1):
        if not results.questions or any(record["scores"] is None for record in results.records):
            raise InputError(
                f"File {number} does not say which questions were answered right: an older version "
                "wrote it. Evaluate again."
            )
    metrics = {record["metric"] for results in (first, second) for record in results.records}
    if len(metrics) > 1:
        raise InputError(
            f"The answers are scored by other rules: {' and '.join(sorted(metrics))}. Evaluate "
            "both with the same --metric; into the same --out, what was answered is only scored "
            "anew."
        )
    mine, others = _places(first), _places(second)
    if alone := mine.keys() ^ others.keys():
        some = ", ".join(sorted(name for name, _ in alone)[:3])
        raise InputError(
            f"The files are about other questions: {len(alone)} of "
            f"{len(mine.keys() | others.keys())} are in one of them alone, such as {some}. "
            "Evaluate both on the same samples (--samples, --limit)."
        )
    for key, place in mine.items():
        asked = {first.questions[place]["asked"], second.questions[others[key]]["asked"]}
        if len(asked - {None}) > 1:
            raise InputError(
                f"The files are about other questions: {key[0]} has another question or another "
                "right answer in the second. Evaluate both on the same samples."
            )
    return [(place, others[key]) for key, place in mine.items()]


def _places(results: Results) -> dict[tuple[str, int], int]:
    """The place of every question, by its id and how many before it have the same id."""
    seen: dict[str, int] = {}
    places = {}
    for place, question in enumerate(results.questions):
        name = str(question["id"])
        seen[name] = seen.get(name, 0) + 1
        places[name, seen[name]] = place
    return places


def _pairs(
    first: Sequence[Record], second: Sequence[Record], names: tuple[str | None, str | None]
) -> Iterator[tuple[Record, Record]]:
    for other in second:
        for one in first:
            if one["keep"] != other["keep"]:
                continue
            if names == (None, None):
                together = name_of(one) == name_of(other) and one["layer"] == other["layer"]
            else:
                together = _is(one, names[0]) and _is(other, names[1])
            # The same weights unpruned are the same model: nothing to test.
            same = one["method"] == UNPRUNED and one["weights"] == other["weights"]
            if together and not same and one is not other:
                yield one, other


def _is(record: Record, name: str | None) -> bool:
    """Whether a setting is called so; without a name every method is meant."""
    if name is None:
        return bool(record["method"] != UNPRUNED)
    names = (name_of(record), label(record["method"], record["reweight"]))
    return name.lower() in map(str.lower, names)


def _no_pair(
    first: Sequence[Record], second: Sequence[Record], names: tuple[str | None, str | None]
) -> str:
    def listed(records: Sequence[Mapping[str, Any]]) -> str:
        found = (f"{name_of(record)} ({budget_label(record['keep'])})" for record in records)
        return ", ".join(dict.fromkeys(found))

    called = " and ".join(repr(name) for name in names if name is not None)
    asked = f" called {called}" if called else ""
    return (
        f"There are no settings{asked} to compare at one budget. The first file has "
        f"{listed(first)}; the second has {listed(second)}. Name a method "
        "of each with --first and --second."
    )
