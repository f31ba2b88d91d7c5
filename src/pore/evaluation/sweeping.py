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
from pore.errors import PoreError
from pore.evaluation.before import kept_before, with_former
from pore.evaluation.cells import Benchmark, Cell, Row, Sweep, row
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
        PoreError: The unpruned model cannot be asked.
        OSError: A file cannot be written.
        KeyboardInterrupt: Passed on, with a message that says how to resume.
    """
    before = kept_before(benchmarks, settings) if processes.first else {}
    own = [benchmark.name for benchmark in benchmarks]
    names = tuple(dict.fromkeys([*own, *(name for found in before.values() for name in found)]))
    work = Work(len(benchmarks) * len(settings), progress)
    failed = list(left_out)
    cells: list[dict[str, Cell]] = [{} for _ in settings]
    sums: dict[Named, Row] = {}
    try:
        for benchmark in benchmarks:
            for number, setting in enumerate(settings):
                work.start(f"{benchmark.name}: {_words(setting)}")
                try:
                    cells[number][benchmark.name] = benchmark.ask(
                        setting.pruner, work.done(1), setting.named
                    )
                except PoreError as error:
                    if setting.pruner is None:
                        raise
                    failed.append(_failed(setting, benchmark.name, error))
                    work.done(1)(1)
                so_far = before | {
                    one.named: before.get(one.named, {}) | mine
                    for one, mine in zip(settings, cells, strict=True)
                }
                waiting = len(benchmarks) * len(settings) - sum(map(len, cells))
                rows = _rows([one.named for one in settings], so_far, names, sums)
                found = Sweep(names, rows, tuple(failed), circumstances, waiting)
                processes.alone(partial(write_sweep, found, out))
            benchmark.release()
            processes.alone(partial(write_scores, found, out))
            processes.alone(
                partial(_write_questions, benchmark.name, settings, cells, out, circumstances)
            )
    except KeyboardInterrupt as error:
        done = sum(map(len, cells))
        raise KeyboardInterrupt(
            f"{done} of {len(benchmarks) * len(settings)} cells are done and kept in {out}: the "
            f"same command resumes from there. {error}".strip()
        ) from None
    work.finish()
    return found


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
