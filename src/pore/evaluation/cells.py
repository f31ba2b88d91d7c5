"""The cells of a sweep: how a setting did on a benchmark; and rows over several benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.made_of import MadeOf, relative_interval
from pore.evaluation.metrics import METRICS
from pore.evaluation.outcome import Named, Outcome
from pore.evaluation.results import LeftOut
from pore.evaluation.store import Store
from pore.evaluation.units import Units
from pore.evaluation.work import Progress

# Benchmarks by what they ask for, by a part of their names.
_ASK_FOR = {
    "OCR": ("textvqa", "ocr", "docvqa", "infovqa", "infographic", "chartqa", "stvqa"),
    "grounding": ("refcoco",),
}


@dataclass(frozen=True)
class Cell:
    """How a setting did on a benchmark.

    Attributes:
        outcome: Its answers; of a benchmark without a score for each, only what they took counts.
        metric: The name of what the benchmark measures.
        value: That, in the unit in which it is published, such as percent.
        ci: Its 95 % interval; None where it is not known what the value is made of.
        scored: Whether every answer has a score of its own.
        units: What the value is made of; None for the mean score of the answers.
        scale: What the mean score or that of the units is multiplied by to make the value.
    """

    outcome: Outcome
    metric: str
    value: float
    ci: tuple[float, float] | None
    scored: bool = True
    units: Units | None = None
    scale: float = 100.0

    @classmethod
    def of(cls, outcome: Outcome, measured: Mapping[str, Any] | None = None) -> Cell:
        """The cell of answers that are kept.

        Args:
            outcome: The answers.
            measured: What a benchmark of lmms-eval measured, as its store keeps it; None for one's
                own questions.
        """
        if measured is None:
            low, high = outcome.ci
            title = METRICS[outcome.metric].title
            return cls(outcome, title, 100 * outcome.accuracy, (100 * low, 100 * high))
        units, scale = Units.read(measured.get("units")), measured["scale"]
        ends = outcome.ci if measured["mean"] else None if units is None else units.interval()
        ci = None if ends is None else (scale * ends[0], scale * ends[1])
        value = scale * measured["value"]
        return cls(outcome, measured["metric"], value, ci, measured["scored"], units, scale)


class BenchmarkError(InputError):
    """A benchmark cannot be asked or scored, whatever the setting: its data cannot be had."""


class Benchmark(Protocol):
    """Questions that a sweep asks: one's own, or a benchmark of lmms-eval."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def store(self) -> Store:
        """Where its cells are kept."""

    def ask(self, pruner: Pruner | None, advance: Progress, named: Named) -> Cell:
        """The cell of a setting: kept from before, or else the model is asked.

        Args:
            pruner: The method, or None for the unpruned model.
            advance: Called with the number of further questions that are done.
            named: The setting's method, correction and budget, which are kept with the answers.

        Raises:
            BenchmarkError: The benchmark cannot be asked.
            PoreError: It cannot be asked under this setting.
        """

    def release(self) -> None:
        """Let go of what is held in memory for further settings."""


@dataclass(frozen=True)
class Row:
    """How a setting did on all benchmarks.

    Attributes:
        method: Name of the method.
        reweight: The correction of position bias, by the name that it was asked for; or None.
        keep: The budget.
        cells: The cell of every benchmark that is done, by its name.
        tokens: Visual tokens of a prompt that reach the last layer, averaged over the benchmarks.
        mean_tokens: Visual tokens averaged over the decoder layers, and over the benchmarks.
        flops: FLOPs of a prefill (true count), averaged over the benchmarks.
        relative: The mean, over benchmarks, of the value relative to that of the unpruned model;
            None until all are done.
        relative_ci: Its 95 % interval; None where one of the values has none.
        relative_by: The same mean by what benchmarks ask for, where they differ in that.
    """

    method: str
    reweight: str | None
    keep: int | float | str | None
    cells: Mapping[str, Cell]
    tokens: float | None = None
    mean_tokens: float | None = None
    flops: float | None = None
    relative: float | None = None
    relative_ci: tuple[float, float] | None = None
    relative_by: Mapping[str, float] | None = None

    @property
    def named(self) -> Named:
        """What its setting is called in results."""
        return self.method, self.reweight, self.keep

    def record(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        return {
            "method": self.method,
            "reweight": self.reweight,
            "keep": self.keep,
            "tokens_after": self.tokens,
            "mean_tokens": self.mean_tokens,
            "flops": self.flops,
            "relative": self.relative,
            "relative_ci": None if self.relative_ci is None else list(self.relative_ci),
            "relative_by": dict(self.relative_by or {}),
            "benchmarks": {
                name: {
                    "metric": cell.metric,
                    "value": cell.value,
                    "ci": None if cell.ci is None else list(cell.ci),
                    "n": len(cell.outcome.answers),
                    "tokens_after": cell.outcome.tokens_after,
                    "mean_tokens": cell.outcome.mean_tokens,
                    "flops": cell.outcome.flops,
                }
                for name, cell in self.cells.items()
            },
        }


@dataclass(frozen=True)
class Sweep:
    """What a sweep found so far.

    Attributes:
        benchmarks: The names of the benchmarks.
        rows: A row for every setting, the unpruned model first.
        left_out: Settings that could not be made or failed, and why.
        circumstances: As from `circumstances.circumstances`.
        waiting: Cells that were asked for and are not done.
    """

    benchmarks: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    waiting: int = 0

    @property
    def done(self) -> bool:
        """Whether all cells that were asked for are done."""
        return self.waiting == 0


def row(
    named: Named,
    cells: Mapping[str, Cell],
    unpruned: Mapping[str, Cell],
    benchmarks: Sequence[str],
) -> Row:
    """Sum up how a setting did.

    Args:
        named: Its method, its correction and its budget.
        cells: Its cells, by benchmark.
        unpruned: Those of the unpruned model.
        benchmarks: The names of all benchmarks of the sweep.

    Returns:
        The row.
    """
    if not benchmarks or not set(benchmarks) <= cells.keys() & unpruned.keys():
        return Row(*named, cells)
    outcomes = [cells[name].outcome for name in benchmarks]
    ratios = {name: _ratio(cells[name], unpruned[name]) for name in benchmarks}
    known = [ratio for ratio in ratios.values() if ratio is not None]
    parts: dict[str, list[float]] = {}
    for name, ratio in ratios.items():
        if ratio is not None:
            parts.setdefault(asks_for(name), []).append(ratio)
    made = [made_of(cells[name], cells[name], unpruned[name]) for name in benchmarks]
    known_parts = [one for one in made if one is not None]
    means = len(known) == len(known_parts) == len(benchmarks)
    return Row(
        *named,
        cells,
        tokens=_mean([outcome.tokens_after for outcome in outcomes]),
        mean_tokens=_mean([outcome.mean_tokens for outcome in outcomes]),
        flops=_mean([outcome.flops for outcome in outcomes]),
        relative=_mean(known) if len(known) == len(benchmarks) else None,
        relative_ci=relative_interval(known_parts) if means else None,
        relative_by={k: sum(v) / len(v) for k, v in parts.items()} if len(parts) > 1 else {},
    )


def asks_for(benchmark: str) -> str:
    """What a benchmark asks for: "OCR", "grounding" or "other"."""
    name = benchmark.lower()
    found = (what for what, parts in _ASK_FOR.items() if any(part in name for part in parts))
    return next(found, "other")


def _ratio(cell: Cell, unpruned: Cell) -> float | None:
    return cell.value / unpruned.value if unpruned.value else None


def made_of(first: Cell, second: Cell, unpruned: Cell) -> MadeOf | None:
    """What the values of two settings on a benchmark are made of; None where it is not known.

    Of questions those that none of the three skipped.
    """
    cells = (first, second, unpruned)
    if any(cell.ci is None for cell in cells):
        return None
    units = [cell.units for cell in cells if cell.units is not None]
    whole = len(units) == len(cells)
    return MadeOf.of(units if whole else [cell.outcome.scores for cell in cells], first.scale)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
