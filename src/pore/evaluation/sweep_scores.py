"""What the scores of a sweep are made of, as a file beside it, and sweeps compared by it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pore._files import shown, write_atomic
from pore._saved.forms import Form
from pore._saved.parsing import read_json
from pore._saved.seals import sealed_text
from pore.errors import InputError
from pore.evaluation.cells import Cell, Row, Sweep
from pore.evaluation.files import OF_A_SWEEP, RESULTS, SWEEP, SWEEP_SCORES
from pore.evaluation.made_of import MadeOf, compared, mean_compared
from pore.evaluation.outcome import questions_of
from pore.evaluation.statistics import Judged, Paired, holm
from pore.evaluation.store import digest
from pore.evaluation.sweep_rows import words
from pore.evaluation.units import Units
from pore.plotting.labels import UNPRUNED, budget_label

FILE = "scores.json"
"""Its name; it stands beside `sweep.json`."""

_SCORES = Form(
    SWEEP_SCORES,
    "file of a sweep's scores",
    InputError,
    {"circumstances": dict, "settings": list},
    most=1 << 30,
    elsewhere={SWEEP: OF_A_SWEEP, RESULTS: "it holds results by question; give two of one kind."},
)

_MAX_VALUES = 1 << 26  # a score for every question, setting and benchmark

Score = tuple[float, "Units | tuple[float | None, ...]", str]
"""What a score is scaled by, what it is made of, and a digest of the questions."""


@dataclass(frozen=True)
class Scores:
    """What a setting's scores are made of.

    Attributes:
        method: Name of the method.
        reweight: The correction, by the name that it was asked for; or None.
        keep: The budget.
        made: By benchmark, those of which it is known.
    """

    method: str
    reweight: str | None
    keep: int | float | str | None
    made: Mapping[str, Score]

    @property
    def name(self) -> str:
        """Its method in words, such as "FastV + PoRe"."""
        return words(self.method, self.reweight)

    def record(self) -> dict[str, Any]:
        """It as plain JSON types."""
        named = {"method": self.method, "reweight": self.reweight, "keep": self.keep}
        return {**named, "benchmarks": {name: _record(one) for name, one in self.made.items()}}


@dataclass(frozen=True)
class Change(Judged):
    """Two settings compared on a benchmark or on the mean over all, as one of many comparisons.

    Attributes:
        first: The setting to compare with.
        second: The setting that is compared with it.
        benchmark: The benchmark; None for the mean over all, relative to the unpruned model.
        paired: The second minus the first: in the unit of the benchmark, or a share of the
            unpruned model's score.
    """

    first: Scores
    second: Scores
    benchmark: str | None

    def record(self) -> dict[str, Any]:
        """It as plain JSON types."""
        return {
            "keep": self.second.keep,
            "first": self.first.name,
            "second": self.second.name,
            "benchmark": self.benchmark,
            **super().record(),
        }


def scores_of(rows: Sequence[Row]) -> list[Scores]:
    """What the scores of rows are made of."""
    return [
        Scores(
            one.method,
            one.reweight,
            one.keep,
            {name: _score(cell) for name, cell in one.cells.items() if cell.ci is not None},
        )
        for one in rows
    ]


def write_scores(sweep: Sweep, out: Path) -> Path:
    """Write `scores.json`, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    entries = {
        "circumstances": dict(sweep.circumstances),
        "settings": [one.record() for one in scores_of(sweep.rows)],
    }
    return write_atomic(out / FILE, sealed_text(_SCORES.document(entries)))


def read_scores(path: str | os.PathLike[str]) -> tuple[Mapping[str, Any], list[Scores]]:
    """The circumstances of a sweep, and what its scores are made of.

    Args:
        path: Its `scores.json`.

    Raises:
        InputError: It is none, or damaged.
        OSError: It cannot be read, or is too large.
    """
    with _SCORES.naming(shown(path)):
        return _SCORES.read(
            read_json(path, _SCORES.most, values=_MAX_VALUES),
            lambda entries: (entries["circumstances"], list(map(_read, entries["settings"]))),
        )


def hosts(settings: Sequence[Scores]) -> list[tuple[Scores, Scores]]:
    """Every setting with a correction, after the same without."""
    plain = {(one.method, one.keep): one for one in settings if one.reweight is None}
    return [
        (plain[one.method, one.keep], one)
        for one in settings
        if one.reweight is not None and (one.method, one.keep) in plain
    ]


def changes(
    pairs: Sequence[tuple[Scores, Scores]],
    unpruned: Scores,
    *,
    seed: int = 0,
) -> list[Change]:
    """Compare settings with each other, on every benchmark and on the mean over these.

    Args:
        pairs: The settings.
        unpruned: The unpruned model, which the mean is relative to.
        seed: Seed of the bootstrap and of the permutation tests.

    Returns:
        For every pair the mean, where there are several benchmarks, and every benchmark of which it
        is known what the scores are made of.

    Raises:
        InputError: They were asked other questions.
    """
    found: list[tuple[Paired, Scores, Scores, str | None]] = []
    for one, other in pairs:
        names = [name for name in one.made if name in other.made and name in unpruned.made]
        made = {name: _made(one, other, unpruned, name) for name in names}
        whole = [each for each in made.values() if each.scores()[2] != 0]
        if len(whole) == len(unpruned.made) > 1:
            found.append((mean_compared(whole, seed=seed), one, other, None))
        found += [(compared(each, seed=seed), one, other, name) for name, each in made.items()]
    corrected = holm([paired.p for paired, *_ in found])
    return [
        Change(paired, p, one, other, name)
        for (paired, one, other, name), p in zip(found, corrected, strict=True)
    ]


def judge_sweeps(
    first: Sequence[Scores],
    second: Sequence[Scores],
    *,
    names: tuple[str | None, str | None] = (None, None),
    seed: int = 0,
) -> list[Change]:
    """Compare two sweeps, setting by setting, as `verdicts.judge` compares files of results.

    Args:
        first: What a sweep's scores are made of.
        second: Those of the other, or the same.
        names: As in `verdicts.judge`, such as "FastV + PoRe".
        seed: Seed of the bootstrap and of the permutation tests.

    Raises:
        InputError: They are about other questions, or have no settings to compare.
    """
    pairs = list(_pairs(first, second, names))
    unpruned = next((one for one in first if one.method == UNPRUNED), None)
    if not pairs or unpruned is None:
        raise InputError(
            f"There are no settings to compare at one budget. The first sweep has {_listed(first)};"
            f" the second has {_listed(second)}. Name a method of each with --first and --second."
        )
    return changes(pairs, unpruned, seed=seed)


def _pairs(
    first: Sequence[Scores], second: Sequence[Scores], names: tuple[str | None, str | None]
) -> Iterator[tuple[Scores, Scores]]:
    for other in second:
        for one in first:
            if one.keep != other.keep or one is other or UNPRUNED in (one.method, other.method):
                continue
            together = one.name == other.name if names == (None, None) else True
            if together and _is(one, names[0]) and _is(other, names[1]):
                yield one, other


def _is(setting: Scores, name: str | None) -> bool:
    return name is None or name.lower() == setting.name.lower()


def _listed(settings: Sequence[Scores]) -> str:
    found = (f"{one.name} ({budget_label(one.keep)})" for one in settings if one.keep is not None)
    return ", ".join(dict.fromkeys(found)) or "none"


def _made(first: Scores, second: Scores, unpruned: Scores, benchmark: str) -> MadeOf:
    scored = [one.made[benchmark] for one in (first, second, unpruned)]
    if len({questions for *_, questions in scored}) > 1:
        raise InputError(
            f"{benchmark}: {first.name} and {second.name} were asked other questions, or what is "
            "right has changed. Evaluate both on the same ones (--limit, --samples)."
        )
    return MadeOf.of([made for _, made, _ in scored], scored[0][0])


def _score(cell: Cell) -> Score:
    made = tuple(cell.outcome.scores) if cell.units is None else cell.units
    return cell.scale, made, digest(questions_of([cell.outcome]))[:16]


def _record(score: Score) -> dict[str, Any]:
    scale, made, questions = score
    units = made.record() if isinstance(made, Units) else {"scores": list(made)}
    return {"scale": scale, "questions": questions, **units}


def _read(record: Any) -> Scores:
    try:
        made = {
            name: (float(one["scale"]), _units(one), str(one["questions"]))
            for name, one in record["benchmarks"].items()
        }
        return Scores(str(record["method"]), record["reweight"], record["keep"], made)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a setting in it is not as a sweep writes it: {error}") from error


def _units(record: Mapping[str, Any]) -> Units | tuple[float | None, ...]:
    if "scores" in record:
        return tuple(record["scores"])
    found = Units.read(record)
    assert found is not None
    return found
