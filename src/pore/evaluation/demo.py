"""The main job from end to end: calibrate, fit, prune, ask, compare and report.

Calibration sees the calibration samples only. Nothing is chosen by looking at the test samples:
the layer, the budgets and the form of P are fixed beforehand, and the results are reported as they
are. Every setting answers the first few questions before any answers the rest, for an early table.
Sums and answers are kept in the folder, and the same call goes on where one was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pore._files import write_atomic
from pore.calibration.calibrating import calibrate
from pore.calibration.page import Drawn, figures
from pore.calibration.sums import Calibration
from pore.data.samples import Sample
from pore.engine.corrections import Correction
from pore.engine.limits import check_limits
from pore.engine.pruner import Pruner
from pore.errors import InputError, PoreError
from pore.evaluation.circumstances import circumstances
from pore.evaluation.differences import Difference, compare
from pore.evaluation.drawing import over_flops
from pore.evaluation.examples import examples
from pore.evaluation.files import Results, write_differences, write_results
from pore.evaluation.hosts import HostMeasure
from pore.evaluation.outcome import Outcome, common, questions_of, records_of
from pore.evaluation.own import OwnQuestions
from pore.evaluation.page import write_demo
from pore.evaluation.records import Record
from pore.evaluation.results import (
    About,
    DemoResult,
    DemoSettings,
    Example,
    Figure,
    SurveySettings,
)
from pore.evaluation.reweighting import rope_bias
from pore.evaluation.running import time_some, timed_samples
from pore.evaluation.sizes import ImageSizes, images_asked
from pore.evaluation.store import slug
from pore.evaluation.work import Told, Work, cost
from pore.families.registry import family_of
from pore.identity import forget
from pore.layout import Image
from pore.methods.downsample import NO_GRID, Downsample
from pore.methods.fastv import FastV
from pore.methods.random import Random
from pore.plotting.labels import budget_label

_ROPE_SAMPLES = 64


_LONGEST_ANSWER = 8


FIRST = 32
"""How many questions are asked before the first table, in whole batches."""

Shown = Callable[[Sequence[Record]], None]
"""Called with the records of the first questions, before the rest are asked."""

# Costs of one sample relative to the unpruned model, for the progress bar only.
_CALIBRATION_COST, _TIMED_COST = 0.4, 0.8


def run(
    model: Any,
    processor: Any,
    *,
    calibration: Sequence[Sample],
    test: Sequence[Sample],
    out: Path,
    settings: DemoSettings,
    about: About,
    progress: Told | None = None,
    shown: Shown | None = None,
) -> DemoResult:
    """Calibrate, fit, prune and ask, and write everything into a folder.

    Files are written whole or not at all, each as soon as its content is known, but figures at the
    end. Sums and answers of an earlier call in the same folder are used if the conditions are the
    same.

    Args:
        model: A supported model. Where its images have no common grid, P is a function of the
            distance to the text, and what such images do not allow is left out and named.
        processor: Its processor.
        calibration: Samples that P is measured on.
        test: Samples with answers, none of them among `calibration`.
        out: The folder; made if missing.
        settings: Settings of the demo.
        about: The circumstances of the run, for the report.
        progress: Called with what is being done, and the share of the work done so far.
        shown: Called with the records of the first questions, unless they are all.

    Returns:
        The result.

    Raises:
        PoreError: The model, samples or settings do not fit.
        OSError: A file cannot be written.
        KeyboardInterrupt: Passed on, with a message that says how to resume.
    """
    forget(model)  # so that a change of the weights since the last call is noticed
    questions = OwnQuestions(model, processor, test, out, _asking(settings))
    batches = questions.batches
    images = images_asked(batches)
    sizes = ImageSizes.of(model, images)
    for keep in settings.keeps:  # so that an image too small for it is known before the long part
        sizes.budget(keep)
    rope, left_out = _baselines(model, processor, calibration, images)
    each = partial(cost, visual=sizes.usual, layers=len(family_of(model).layers(model)))
    costs = [each(pruner) for _, pruner in lineup(settings, None, rope, left_out)]
    work = Work(_all_work(costs, len(calibration), len(test)), progress)

    work.start("measuring the position bias")
    samples = partial(work.through, calibration, _CALIBRATION_COST)
    try:
        measured, bias = _measure(model, processor, samples, out, settings, about.calibration)
        planned = lineup(settings, bias, rope, left_out)
        outcomes = _ask(questions, planned, work, each, shown)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"What was measured and answered is kept in {out}: the same command goes on from "
            f"there. {error}".strip()
        ) from None
    work.start("timing the prefill, methods in turns")
    pruners = [outcome.pruner for outcome in outcomes]
    times = time_some(model, processor, batches.good, pruners, work.done(_TIMED_COST))
    outcomes = [replace(o, prefill=spent) for o, spent in zip(outcomes, times, strict=True)]
    differences = tuple(_differences(outcomes, settings))
    made = circumstances(model.device, settings.seed, about.command)
    drawn_flops = _write(outcomes, differences, made, out)

    work.start("drawing examples and the report")
    result = DemoResult(
        settings=settings,
        calibration=measured,
        bias=bias,
        rope=rope,
        outcomes=tuple(outcomes),
        differences=differences,
        left_out=left_out,
        figures=_figures(measured, bias, out),
        over_flops=drawn_flops,
        examples=_examples(model, processor, batches.good, outcomes, settings, out),
        report=out / "report.html",
    )
    write_demo(result, about, out)
    work.finish()
    return result


def _write(
    outcomes: Sequence[Outcome],
    differences: Sequence[Difference],
    made: Mapping[str, Any],
    out: Path,
) -> Figure | None:
    """The files of results; the figure of accuracy over FLOPs where these are known."""
    records = records_of(outcomes)
    write_results(out, Results(made, questions_of(outcomes), records))
    write_differences(out, [difference.record() for difference in differences], made)
    return over_flops(records, out / "figure3.png")


def _baselines(
    model: Any, processor: Any, calibration: Sequence[Sample], images: Sequence[Image]
) -> tuple[Correction | None, dict[str, str]]:
    """The data-free prior, and the methods that the model does not take, with the reasons."""
    rope, left_out = None, {}
    try:
        rope = rope_bias(model, processor, calibration[:_ROPE_SAMPLES])
    except PoreError as error:
        left_out["FastV + RoPE prior"] = str(error)
    averaged = Downsample(keep=1.0, fair=True)
    try:
        check_limits(averaged, family_of(model))
        averaged.check(model, family_of(model))
        if not all(i.grid and len(i.columns) == i.grid[0] * i.grid[1] for i in images):
            raise InputError(NO_GRID)
    except PoreError as error:
        left_out[averaged.name] = str(error)
    return rope, left_out


def _asking(settings: DemoSettings) -> SurveySettings:
    """The settings of the demo as those of asking and measuring."""
    return SurveySettings(
        kind=settings.kind,
        batch_size=settings.batch_size,
        max_new_tokens=_LONGEST_ANSWER,
        max_bad=settings.max_bad,
    )


def _measure(
    model: Any,
    processor: Any,
    samples: Callable[[], Iterable[Sample]],
    out: Path,
    settings: DemoSettings,
    source: str,
) -> tuple[Calibration, Drawn]:
    """Ā and P, saved."""
    take = partial(calibrate, model, processor, layer=settings.layer)
    measure = HostMeasure(FastV.name, slug(FastV.name), _CALIBRATION_COST, take)
    sums = out / "calibration.json"
    (measured,) = measure.measured(samples, sums, _asking(settings), source=source)
    one_grid = family_of(model).common_grid(model) is not None
    bias: Drawn = measured.fit(settings.kind) if one_grid else measured.fit_any_size()
    bias.save(out / "profile.json")
    return measured, bias


def _figures(measured: Calibration, bias: Drawn, out: Path) -> tuple[Figure, ...]:
    """The figures of Ā and P; drawn at the end, since the first table does not need them."""
    return tuple(
        Figure(one.caption, write_atomic(out / f"{one.name}.png", one.png), one.narrow)
        for one in figures(measured, bias)
    )


def _ask(
    questions: OwnQuestions,
    planned: Sequence[tuple[int | float | None, Pruner | None]],
    work: Work,
    each: Callable[[Pruner | None], float],
    shown: Shown | None,
) -> list[Outcome]:
    """The outcomes of every setting, over the questions that all of them answered."""
    batches = questions.batches
    first = min(-(-FIRST // batches.batch_size), len(batches))
    outcomes = [Outcome(pruner, (), budget=keep) for keep, pruner in planned]
    for part in range(first), range(first, len(batches)):
        for number, (keep, pruner) in enumerate(planned if part else ()):
            where = "" if keep is None else f", {budget_label(keep)}"
            work.start(f"asking: {outcomes[number].label}{where}")
            more = questions.ask(pruner, work.done(each(pruner)), part)
            outcomes[number] = _longer(outcomes[number], more)
        if shown is not None and part.stop < len(batches):
            shown(records_of(common(outcomes)))
    return common(outcomes)


def _longer(so_far: Outcome, more: Outcome) -> Outcome:
    """The answers to the first questions, and those to further ones."""
    answers, skipped = so_far.answers + more.answers, so_far.skipped + more.skipped
    return replace(so_far, answers=answers, skipped=skipped, asked=more.asked)


def lineup(
    settings: DemoSettings,
    bias: Correction | None,
    rope: Correction | None,
    left_out: Mapping[str, str],
) -> list[tuple[int | float | None, Pruner | None]]:
    """All that is compared: the unpruned model, then five methods at every budget.

    Args:
        settings: Layer, budgets and seed.
        bias: P as measured.
        rope: The data-free prior.
        left_out: Methods that the model does not take.

    Returns:
        Budgets and methods; both None for the unpruned model.
    """
    lined_up: list[tuple[int | float | None, Pruner | None]] = [(None, None)]
    for keep in settings.keeps:
        host = FastV(keep=keep, layer=settings.layer)
        methods: list[Pruner] = [host, replace(host, reweight=bias)]
        if rope is not None:
            methods.append(replace(host, reweight=rope))
        methods.append(Random(keep=keep, layer=settings.layer, seed=settings.seed))
        if Downsample.name not in left_out:
            methods.append(Downsample(keep=keep, fair=True))
        lined_up += [(keep, method) for method in methods]
    return lined_up


def _all_work(costs: Sequence[float], calibration: int, test: int) -> float:
    """The whole amount of work, in units of asking the unpruned model one question."""
    timed = timed_samples(test, len(costs)) * _TIMED_COST
    return calibration * _CALIBRATION_COST + test * sum(costs) + timed


def _differences(outcomes: Sequence[Outcome], settings: DemoSettings) -> Iterator[Difference]:
    """Every method compared with plain FastV at the same budget, in the order of `lineup`."""
    pruned = outcomes[1:]
    size = len(pruned) // len(settings.keeps)
    for number in range(len(settings.keeps)):
        host, *others = pruned[number * size : (number + 1) * size]
        for other in others:
            yield compare(host, other, seed=settings.seed)


def _examples(
    model: Any,
    processor: Any,
    asked: Sequence[Sample],
    outcomes: Sequence[Outcome],
    settings: DemoSettings,
    out: Path,
) -> tuple[Example, ...]:
    """Pictures of what is kept at one of the budgets."""
    pruned = outcomes[1:]
    size = len(pruned) // len(settings.keeps)
    number = settings.keeps.index(settings.example_keep)
    shown = pruned[number * size : (number + 1) * size]
    return tuple(examples(model, processor, asked, shown, out / "examples"))
