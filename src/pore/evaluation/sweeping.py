"""Sweeps: methods at budgets on benchmarks, one load of the model, resumed where it stopped.

The questions of a benchmark are asked under all settings before those of the next. Every cell, a
setting on a benchmark, is kept as soon as it is done, and the table of the cells so far is written.
The same call resumes where an interrupted one stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pore._processes import Processes
from pore.engine.pruner import Pruner
from pore.errors import InputError, PoreError
from pore.evaluation.before import fitting, kept_before, with_former
from pore.evaluation.cells import Benchmark, BenchmarkError, Cell, Row, Sweep, row
from pore.evaluation.files import Results, write_results
from pore.evaluation.outcome import Named, Outcome, common, questions_of, records_of
from pore.evaluation.own import OwnQuestions
from pore.evaluation.results import LeftOut
from pore.evaluation.store import Store
from pore.evaluation.sweep_files import write_sweep
from pore.evaluation.sweep_rows import words
from pore.evaluation.sweep_scores import write_scores
from pore.evaluation.wanted import Setting
from pore.evaluation.work import Progress, Told, Work
from pore.plotting.labels import budget_label

SAMPLES = "samples"
"""The name of one's own questions among benchmarks."""


class OwnBenchmark:
    """Questions of one's own as a benchmark.

    Args:
        questions: The questions.
        name: What the benchmark is called.
    """

    def __init__(self, questions: OwnQuestions, name: str = SAMPLES) -> None:
        self._questions = questions
        self._name = name

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def store(self) -> Store:
        """Where its cells are kept."""
        return self._questions.store

    def ask(self, pruner: Pruner | None, advance: Progress, named: Named) -> Cell:
        """The cell of a setting, as in `cells.Benchmark`."""
        cell = [self._name, *named]
        shown = Outcome(pruner, (), budget=named[2]).named  # as in `results.json`
        outcome = self._questions.ask(pruner, lambda _: None, named=shown, cell=cell)
        advance(1)
        return Cell.of(outcome)

    def release(self) -> None:
        """Let go of the inputs that are held."""
        self._questions.batches.release()


def sweep(
    benchmarks: Sequence[Benchmark],
    settings: Sequence[Setting],
    out: Path,
    *,
    left_out: Sequence[LeftOut] = (),
    circumstances: Mapping[str, Any],
    progress: Told | None = None,
    processes: Processes = Processes(),  # noqa: B008
) -> Sweep:
    """Ask every benchmark under every setting, and write everything into a folder.

    Args:
        benchmarks: What is asked.
        settings: The unpruned model first.
        out: The folder; made if missing. Cells that are there are used.
        left_out: Settings that could not be made.
        circumstances: As from `circumstances.circumstances`.
        progress: Called with what is being done, and the share of the work done so far.
        processes: Those that share every cell; the first of them writes.

    Returns:
        The sweep, with comparable cells that the folder holds from earlier ones.

    Raises:
        PoreError: The unpruned model cannot be asked, or none of the benchmarks.
        OSError: A file cannot be written.
        KeyboardInterrupt: Passed on, with a message that says how to resume.
    """
    run = _Run(benchmarks, settings, out, list(left_out), circumstances, processes)
    work = Work(len(benchmarks) * len(settings), progress)
    try:
        for benchmark in benchmarks:
            run.ask(benchmark, work)
            benchmark.release()
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"{run.done} of {run.asked} cells are done and kept in {out}: the same command resumes "
            f"from there. {error}".strip()
        ) from None
    work.finish()
    if not run.done:
        reasons = " ".join(f"{one.method}: {one.reason}" for one in run.failed)
        raise InputError(f"None of the benchmarks can be asked. {reasons}")
    found = run.found()
    processes.alone(partial(write_scores, found, out))
    return found


class _Run:
    """The state of a sweep.

    Args:
        benchmarks: As in `sweep`.
        settings: As in `sweep`.
        out: As in `sweep`.
        failed: What could not be made or asked so far.
        circumstances: As in `sweep`.
        processes: As in `sweep`.
    """

    def __init__(
        self,
        benchmarks: Sequence[Benchmark],
        settings: Sequence[Setting],
        out: Path,
        failed: list[LeftOut],
        circumstances: Mapping[str, Any],
        processes: Processes,
    ) -> None:
        self._settings, self._out, self.failed = settings, out, failed
        self._circumstances, self._processes = circumstances, processes
        self._before: Mapping[Named, Mapping[str, Cell]] = (
            kept_before(benchmarks, settings) if processes.first else {}
        )
        own = [benchmark.name for benchmark in benchmarks]
        others = (name for found in self._before.values() for name in found)
        self._names = tuple(dict.fromkeys([*own, *others]))
        self._cells: list[dict[str, Cell]] = [{} for _ in settings]
        self._sums: dict[Named, Row] = {}
        self.asked = len(benchmarks) * len(settings)

    @property
    def done(self) -> int:
        """How many cells are done."""
        return sum(map(len, self._cells))

    def ask(self, benchmark: Benchmark, work: Work) -> None:
        """Ask a benchmark under every setting, and write the table after each.

        Args:
            benchmark: It.
            work: The progress.

        Raises:
            PoreError: The unpruned model cannot be asked, for another reason than the benchmark.
        """
        name = benchmark.name
        for number, setting in enumerate(self._settings):
            work.start(f"{name}: {_words(setting)}")
            try:
                cell = benchmark.ask(setting.pruner, work.done(1), setting.named)
            except PoreError as error:
                if setting.pruner is None:
                    if not isinstance(error, BenchmarkError):
                        raise
                    self._leave_out(name, error)
                    work.done(1)(len(self._settings))
                    return
                self.failed.append(_failed(setting, name, error))
                self.asked -= 1
                work.done(1)(1)
            else:
                self._cells[number][name] = cell
                if setting.pruner is None:
                    self._before = fitting(self._before, name, cell)
            self._write()
        self._processes.alone(
            partial(
                _write_questions,
                *(name, self._settings, self._cells, self._out, self._circumstances),
            )
        )

    def found(self) -> Sweep:
        """What was found so far."""
        so_far = dict(self._before) | {
            one.named: {**self._before.get(one.named, {}), **mine}
            for one, mine in zip(self._settings, self._cells, strict=True)
        }
        named = [one.named for one in self._settings]
        rows = _rows(named, so_far, self._names, self._sums)
        waiting = self.asked - self.done
        return Sweep(self._names, rows, tuple(self.failed), self._circumstances, waiting)

    def _write(self) -> None:
        self._processes.alone(partial(write_sweep, self.found(), self._out))

    def _leave_out(self, name: str, error: BenchmarkError) -> None:
        """Leave out a benchmark, which then is no column of the table."""
        self.failed.append(LeftOut(name, 0, str(error)))
        self.asked -= len(self._settings)
        self._names = tuple(one for one in self._names if one != name)
        self._before = {
            named: {one: cell for one, cell in cells.items() if one != name}
            for named, cells in self._before.items()
        }
        if self.done:
            self._write()


def _rows(
    asked: Sequence[Named],
    cells: Mapping[Named, Mapping[str, Cell]],
    names: Sequence[str],
    sums: dict[Named, Row],
) -> tuple[Row, ...]:
    """A row for every setting, those asked first; those that are complete are summed up once."""
    rows = []
    for named in dict.fromkeys([*asked, *cells]):
        if named not in sums:
            made = row(named, cells[named], cells[asked[0]], names)
            if made.relative is None:
                rows.append(made)
                continue
            sums[named] = made
        rows.append(sums[named])
    return tuple(rows)


def _write_questions(
    name: str,
    settings: Sequence[Setting],
    cells: Sequence[Mapping[str, Cell]],
    out: Path,
    circumstances: Mapping[str, Any],
) -> None:
    """The results of a benchmark question by question, for `pore compare` and by group."""
    done = [(s, own[name]) for s, own in zip(settings, cells, strict=True) if name in own]
    if not all(cell.scored for _, cell in done):
        return
    outcomes = common([cell.outcome for _, cell in done])
    # Under the budget that was asked for, by which the split of Downsample finds its partner.
    budgeted = [
        replace(outcome, budget=setting.keep, metric=_by_question(cell))
        for outcome, (setting, cell) in zip(outcomes, done, strict=True)
    ]
    results = Results(circumstances, questions_of(budgeted), records_of(budgeted))
    write_results(out / name, with_former(results, out / name))


def _by_question(cell: Cell) -> str:
    """What the scores of single questions are: of an F1, whether every answer is right."""
    return cell.outcome.metric if cell.units is None else "right answers"


def _words(setting: Setting) -> str:
    method, correction, keep = setting.named
    name = words(method, correction)
    return name if keep is None else f"{name}, {budget_label(keep)}"


def _failed(setting: Setting, benchmark: str, error: PoreError) -> LeftOut:
    method, correction, keep = setting.named
    number = keep if isinstance(keep, (int, float)) else 0
    return LeftOut(f"{words(method, correction)} on {benchmark}", number, str(error))
