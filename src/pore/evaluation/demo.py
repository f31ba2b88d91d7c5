"""The main job from end to end: calibrate, fit, prune, ask, compare and report.

Calibration sees the calibration samples only. Nothing is chosen by looking at the test samples:
the layer, the budgets and the form of P are fixed beforehand, and the results are reported as they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pore import plotting
from pore.bias.position_bias import PositionBias
from pore.calibration.calibrating import calibrate
from pore.calibration.sums import Calibration
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.batches import Batches
from pore.evaluation.circumstances import circumstances
from pore.evaluation.differences import Difference, compare
from pore.evaluation.files import Results, write_differences, write_results
from pore.evaluation.outcome import Answer, Outcome, common, questions_of, records_of
from pore.evaluation.page import write_demo
from pore.evaluation.results import About, DemoResult, DemoSettings, Example
from pore.evaluation.reweighting import rope_bias
from pore.evaluation.running import evaluate, time_some, timed_samples
from pore.evaluation.work import Told, Work, cost
from pore.families.registry import family_of
from pore.methods.downsample import Downsample, coarse_grid, fair_cells
from pore.methods.fastv import FastV
from pore.methods.random import Random
from pore.plotting.labels import budget_label

_ROPE_SAMPLES = 64


_LONGEST_ANSWER = 8


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
) -> DemoResult:
    """Calibrate, fit, prune and ask, and write everything into a folder.

    Files are written whole or not at all, each as soon as its content is known.

    Args:
        model: A supported model whose visual tokens lie on one grid.
        processor: Its processor.
        calibration: Samples that P is measured on.
        test: Samples with answers, none of them among `calibration`.
        out: The folder; made if missing.
        settings: Settings of the demo.
        about: The circumstances of the run, for the report.
        progress: Called with what is being done, and the share of the work done so far.

    Returns:
        The result.

    Raises:
        PoreError: The model, samples or settings do not fit.
        OSError: A file cannot be written.
    """
    grid = family_of(model).grid(model)
    if grid is None:
        raise InputError("The demo needs a model whose images all have one grid.")
    visual, layers = grid[0] * grid[1], len(family_of(model).layers(model))
    even = PositionBias.exponential(0.0, visual)
    each = partial(cost, visual=visual, layers=layers)
    costs = [each(pruner) for _, pruner in lineup(settings, even, even, grid)]
    work = Work(_all_work(costs, len(calibration), len(test)), progress)

    batches = Batches(
        model, processor, test, batch_size=settings.batch_size, max_bad=settings.max_bad
    )
    batches.sift()
    work.start("measuring the position bias")
    samples = work.through(calibration, _CALIBRATION_COST)
    measured, bias = _measure(model, processor, samples, out, settings, about.calibration)
    rope = rope_bias(model, processor, calibration[:_ROPE_SAMPLES])
    assert isinstance(rope, PositionBias)  # as all images have one grid
    planned = lineup(settings, bias, rope, grid)
    outcomes = _ask(model, processor, batches, planned, work, each)
    work.start("timing the prefill, methods in turns")
    pruners = [outcome.pruner for outcome in outcomes]
    times = time_some(model, processor, batches.good, pruners, work.done(_TIMED_COST))
    outcomes = [replace(o, prefill_ms=ms) for o, ms in zip(outcomes, times, strict=True)]
    differences = tuple(_differences(outcomes, settings))
    records, made = records_of(outcomes), circumstances(model.device, settings.seed, about.command)
    write_results(out, Results(made, questions_of(outcomes), records))
    write_differences(out, [difference.record() for difference in differences], made)
    plotting.save(plotting.accuracy_over_flops(records), out / "figure3.png")

    work.start("drawing examples and the report")
    result = DemoResult(
        settings=settings,
        calibration=measured,
        bias=bias,
        rope=rope,
        outcomes=tuple(outcomes),
        differences=differences,
        examples=tuple(_examples(processor, batches.good, outcomes, settings, grid, out)),
        report=out / "report.html",
    )
    write_demo(result, about, out)
    work.finish()
    return result


def _measure(
    model: Any,
    processor: Any,
    samples: Iterable[Sample],
    out: Path,
    settings: DemoSettings,
    source: str,
) -> tuple[Calibration, PositionBias]:
    """Ā and P, saved and drawn."""
    measured = calibrate(
        model,
        processor,
        samples,
        settings.layer,
        batch_size=settings.batch_size,
        max_bad=settings.max_bad,
        progress=False,
        source=source,
    )
    bias = measured.fit(settings.kind)
    measured.save(out / "calibration.json")
    bias.save(out / "profile.json")
    plotting.save(plotting.figure1(measured.mean, bias), out / "figure1.png")
    plotting.save(plotting.figure2(measured.mean, bias, measured.sem), out / "figure2.png")
    return measured, bias


def _ask(
    model: Any,
    processor: Any,
    batches: Batches,
    planned: Sequence[tuple[int | float | None, Pruner | None]],
    work: Work,
    each: Callable[[Pruner | None], float],
) -> list[Outcome]:
    """The outcomes of every setting, over the questions that all of them answered."""
    outcomes = []
    for keep, pruner in planned:
        work.start(_doing(keep, pruner))
        answered = evaluate(
            model,
            processor,
            batches,
            pruner,
            max_new_tokens=_LONGEST_ANSWER,
            progress=work.done(each(pruner)),
        )
        outcomes.append(replace(answered, budget=keep))
    return common(outcomes)


def lineup(
    settings: DemoSettings, bias: PositionBias, rope: PositionBias, grid: tuple[int, int]
) -> list[tuple[int | float | None, Pruner | None]]:
    """All that is compared: the unpruned model, then five methods at every budget.

    Args:
        settings: Layer, budgets and seed.
        bias: P as measured.
        rope: The data-free prior.
        grid: Rows and columns of an image's visual tokens.

    Returns:
        Budgets and methods; both None for the unpruned model.
    """
    methods: list[tuple[int | float | None, Pruner | None]] = [(None, None)]
    for keep in settings.keeps:
        host = FastV(keep=keep, layer=settings.layer)
        methods += [
            (keep, host),
            (keep, replace(host, reweight=bias)),
            (keep, replace(host, reweight=rope)),
            (keep, Random(keep=keep, layer=settings.layer, seed=settings.seed)),
            (keep, Downsample(keep=fair_cells(grid, keep))),
        ]
    return methods


def _doing(keep: int | float | None, pruner: Pruner | None) -> str:
    name = Outcome(pruner, ()).label
    return f"asking: {name}" + ("" if keep is None else f", {budget_label(keep)}")


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


def seen_image(processor: Any, image: Image.Image) -> Image.Image:
    """The image as the vision tower gets it: resized or cropped, in its original colours.

    Args:
        processor: The model's processor.
        image: The image.

    Returns:
        What its pixel values show.
    """
    settings = processor.image_processor
    values = settings(images=image, return_tensors="np")["pixel_values"][0]
    mean, std = (np.reshape(x, (3, 1, 1)) for x in (settings.image_mean, settings.image_std))
    pixels = np.clip((values * std + mean) * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(np.moveaxis(pixels, 0, -1))


def _examples(
    processor: Any,
    asked: Sequence[Sample],
    outcomes: Sequence[Outcome],
    settings: DemoSettings,
    grid: tuple[int, int],
    out: Path,
) -> Iterator[Example]:
    """The first question of every kind, and the first ones on which FastV and PoRe disagree."""
    number = settings.keeps.index(settings.example_keep)
    shown = outcomes[1 + 5 * number : 6 + 5 * number]
    host, reweighted = shown[0], shown[1]
    chosen: dict[int, str] = {}
    for i, sample in enumerate(asked):
        if sample.kind is not None and sample.kind not in {asked[j].kind for j in chosen}:
            chosen[i] = f"the first question of kind “{sample.kind}”"
    for wanted, title in (
        ((False, True), "the first questions that only PoRe gets right"),
        ((True, False), "the first questions that only plain FastV gets right"),
    ):
        pairs = zip(host.right, reweighted.right, strict=True)
        matching = [i for i, pair in enumerate(pairs) if pair == wanted and i not in chosen]
        chosen |= dict.fromkeys(matching[:2], title)
    for count, (i, title) in enumerate(chosen.items(), 1):
        panels = [_panel(outcome, outcome.answers[i], grid) for outcome in shown]
        sample = asked[i]
        figure = plotting.kept_tokens(
            seen_image(processor, sample.load_image()),
            panels,
            grid,
            title=f"{sample.question}  →  {sample.answer}",
        )
        yield Example(title, plotting.save(figure, out / "examples" / f"{count:02}.png", dpi=120))


def _panel(outcome: Outcome, answer: Answer, grid: tuple[int, int]) -> plotting.Panel:
    kept = answer.kept[0]
    averages = isinstance(outcome.pruner, Downsample)
    return plotting.Panel(
        f"{outcome.label}: “{answer.given}”",
        answer.right,
        kept,
        cells=coarse_grid(grid, len(kept)) if averages else None,
    )
