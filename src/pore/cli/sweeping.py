"""`pore evaluate --tasks --methods`: methods at budgets on benchmarks, in one table."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore._numbers import interval
from pore._progress import progress
from pore._screen import cell
from pore.cli.about import command_line
from pore.cli.checks import naming
from pore.cli.printing import note, plain_table, say, stdout
from pore.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from pore._processes import Processes
    from pore.cli.evaluate_options import Options
    from pore.data.samples import Sample
    from pore.evaluation.cells import Benchmark, Sweep
    from pore.evaluation.harness.sweep import Tasks
    from pore.evaluation.published import PublishedTable
    from pore.evaluation.results import LeftOut, SurveySettings

# How wide the names of methods are in the table, these with what a method costs, and a benchmark.
_NAMES, _COSTS, _BENCHMARK = 22, 57, 20


def is_sweep(options: Options) -> bool:
    """Whether benchmarks or several methods are asked for."""
    return bool(options.tasks or options.methods or options.table1 or options.table)


def asks_samples(options: Options) -> bool:
    """Whether one's own questions are asked, those of --samples."""
    from pore.evaluation.sweeping import SAMPLES
    from pore.evaluation.wanted import texts

    if options.table1 or options.table:
        return False
    return SAMPLES in (texts(options.tasks or ()) or [SAMPLES])


def check_sweep(options: Options) -> None:
    """Refuse a table, methods and tasks that there are not."""
    from pore.evaluation.sweeping import SAMPLES
    from pore.evaluation.wanted import read_wanted

    names, wanted = asked_of(options)
    with naming("--methods"):
        read_wanted(wanted)
    others = tuple(name for name in names if name != SAMPLES)
    if others:
        _tasks(others, options.include_path)


def asked_of(options: Options) -> tuple[list[str], list[str]]:
    """The benchmarks and the methods of a sweep, those that count where none are named too."""
    from pore.evaluation.sweeping import SAMPLES

    names, wanted = _asked(options, _published(options))
    return names or [SAMPLES], wanted or ["fastv", "pore"]


def warnings_of(options: Options) -> tuple[str, ...]:
    """What to know of who scores the tasks of a sweep, before a model is loaded."""
    from pore.evaluation.sweeping import SAMPLES

    others = tuple(name for name in asked_of(options)[0] if name != SAMPLES)
    return _tasks(others, options.include_path).warnings if others else ()


def sweep_methods(
    options: Options,
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    settings: SurveySettings,
    guide: tuple[Any, Any] | None,
    processes: Processes,
) -> None:
    """Ask every benchmark under every method at every budget, and print the table.

    Args:
        options: The options of the command.
        model: The model.
        processor: Its processor.
        samples: One's own questions, where `asks_samples`.
        settings: Budgets, batches and seed.
        guide: The model that guides SGL and its processor; None for the model itself.
        processes: Those that share every cell.
    """
    from pore.data.sources import load_samples
    from pore.evaluation.guided import Guiding
    from pore.evaluation.reweighting import biases_named
    from pore.evaluation.sweeping import sweep
    from pore.evaluation.wanted import Corrections, planned, read_wanted
    from pore.identity import forget

    table = _published(options)
    names, wanted = asked_of(options)
    if table is not None:
        settings = replace(settings, keeps=table.keeps)
        if processes.first:
            note(*table.notes)
    methods = read_wanted(wanted)
    began, out = time.monotonic(), options.out or Path("runs/sweep")
    forget(model)  # so that a change of the weights since the last call is noticed

    source = str(options.calibration)

    def calibration() -> Sequence[Sample]:
        return list(load_samples(source, limit=options.images))

    given = biases_named(options.reweight, options.allow or (), model, processor, ())
    corrections = Corrections(
        model, processor, calibration, source, out, settings, given, processes
    )
    guiding = Guiding(
        *(guide or (model, processor)), max_new_tokens=options.max_new_tokens, itself=guide is None
    )
    asked = options, names, model, processor, samples, settings, out, processes
    benchmarks = list(_benchmarks(*asked))
    with progress(show=processes.first) as told:
        plan, left_out = planned(
            model,
            methods,
            settings,
            corrections,
            guiding,
            told=lambda what: told(what, 0.0),
            visual=_usual(options, model, processor, samples),
        )
        _some_asked(bool(plan[1:]), left_out)
        result = sweep(
            benchmarks,
            plan,
            out,
            left_out=left_out,
            circumstances=_circumstances(options, model, processes),
            progress=told,
            processes=processes,
        )
    if processes.first:
        _show(result, table, out, time.monotonic() - began)
    pruned = {one.named for one in plan[1:]}
    _some_asked(any(row.cells for row in result.rows if row.named in pruned), result.left_out)


def _some_asked(some: bool, left_out: Sequence[LeftOut]) -> None:
    """Refuse a sweep in which every method was left out."""
    if not some:
        reasons = " ".join(f"{one.method}: {one.reason}" for one in left_out)
        raise InputError(f"No method can be asked. {reasons}")


def _circumstances(options: Options, model: Any, processes: Processes) -> dict[str, Any]:
    """Under which circumstances the sweep is run, with the number of its processes."""
    from pore.evaluation.circumstances import circumstances

    made = circumstances(model.device, options.seed, command_line())
    if processes.size > 1:
        made["hardware"]["processes"] = processes.size
    return made


def _show(result: Sweep, table: PublishedTable | None, out: Path, seconds: float) -> None:
    """Print the table of a sweep, what was left out, and where the files are."""
    if table is not None:
        note(f"Wrote {table.write_page(result, out)}.")
    screen = stdout()
    for each in tables(result, screen.width):
        screen.print(each)
    say(*(f"Left out: {one.method}: {one.reason}" for one in result.left_out))
    note(f"\nWrote {out}/sweep.html, .json, .csv and .tex in {seconds:.0f} s.")


def _usual(options: Options, model: Any, processor: Any, samples: Sequence[Sample]) -> int | None:
    """The visual tokens that images of one's own questions usually have, where --average asks."""
    from pore.cli.asking import sizes_asked

    return sizes_asked(options, model, processor, samples).get("visual") if samples else None


def _published(options: Options) -> PublishedTable | None:
    """The published table that is asked for."""
    from pore.evaluation.published_tables import TABLE1, TABLES

    if options.table is None:
        return TABLE1 if options.table1 else None
    if options.table1 or options.table not in TABLES:
        raise InputError(
            f"--table is one of {', '.join(TABLES)}, not {options.table!r}."
            if options.table not in TABLES
            else "--table1 is --table table1; give one of them."
        )
    return TABLES[options.table]


def _asked(options: Options, table: PublishedTable | None) -> tuple[list[str], list[str]]:
    """The benchmarks and the methods."""
    from pore.evaluation.wanted import texts

    names, wanted = texts(options.tasks or ()), texts(options.methods or ())
    if table is None:
        return names, wanted
    flag = "--table1" if options.table1 else f"--table {table.name}"
    if names or wanted or options.keep:
        raise InputError(f"{flag} sets --tasks, --methods and --keep; leave them out.")
    given = options.calibration  # by default the scenes that come with pore, of another model
    own = options.reweight or (given is not None and not given.startswith("embedded:"))
    if table.profile is not None and not own:
        raise InputError(
            f"{flag} needs P of the model: give --reweight FILE, made by pore calibrate, or "
            "--calibration SAMPLES to measure it on."
        )
    return list(table.tasks.values()), table.wanted


@functools.cache
def _tasks(names: tuple[str, ...], folder: Path | None) -> Tasks:
    """The tasks of lmms-eval, which are looked up once: its index takes many seconds."""
    from pore.evaluation.harness.sweep import Tasks

    return Tasks(names, folder)


def _benchmarks(
    options: Options,
    names: Sequence[str],
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    settings: SurveySettings,
    out: Path,
    processes: Processes,
) -> Iterator[Benchmark]:
    """One's own questions, and tasks of lmms-eval, which is imported only for these."""
    from pore.evaluation.own import OwnQuestions
    from pore.evaluation.predictions import Predictions
    from pore.evaluation.sweeping import SAMPLES, OwnBenchmark

    if SAMPLES in names:
        told = Predictions(out / SAMPLES)
        yield OwnBenchmark(OwnQuestions(model, processor, samples, out, settings, processes, told))
    others = tuple(name for name in names if name != SAMPLES)
    if not others:
        return
    from pore.evaluation.harness.model import PoreHF
    from pore.evaluation.harness.sweep import HarnessBenchmark

    tasks = _tasks(others, options.include_path)
    lm = PoreHF(model=model, processor=processor, batch_size=settings.batch_size)
    for name in tasks.names:
        yield HarnessBenchmark(name, tasks, lm, out, limit=options.limit, seed=options.seed)


def tables(sweep: Sweep, width: int) -> Iterator[Table]:
    """The table of a sweep; several, where it has more columns than a screen."""
    names = list(sweep.benchmarks)
    if _COSTS + _BENCHMARK * len(names) <= width:
        yield _table(sweep, names, costs=True)
        return
    yield _table(sweep, [], costs=True)
    room = max((width - _NAMES) // _BENCHMARK, 1)
    for first in range(0, len(names), room):
        yield _table(sweep, names[first : first + room], costs=False)


def _table(sweep: Sweep, names: Sequence[str], *, costs: bool) -> Table:
    """A table of some benchmarks; with `costs`, what belongs to a method over all of them too."""
    from pore.evaluation import sweep_rows

    about = ("tokens", "GFLOPs") if costs else ()
    made = plain_table("method", *about, *names, *(("relative, %",) if costs else ()))
    for budget, rows in sweep_rows.blocks(sweep):
        made.add_section()
        made.add_row(cell(budget, "bold"))
        for one in rows:
            found = [one.cells.get(name) for name in names]
            row = [f"  {sweep_rows.name_of(one)}", *(sweep_rows.costs(one) if costs else ())]
            row += [
                f"{sweep_rows.value(each)} {interval(each.ci if each else None, 1)}"
                for each in found
            ]
            last = [cell(" ".join(sweep_rows.relative(one)), "bold")] if costs else []
            made.add_row(*map(cell, row), *last)
    return made
