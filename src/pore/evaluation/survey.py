"""Every method on the same questions, at the same budgets, and PoRe on every host that takes it.

Calibration sees the calibration samples only, and nothing is chosen by looking at the test samples:
methods are as their authors set them up, scaled to the model. Every setting is written to the
folder as soon as it is asked; the same call goes on where an interrupted one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pore import plotting
from pore._files import write_atomic
from pore._saved.seals import sealed_list, sealed_text
from pore.bias.curve import Kind
from pore.bias.position_bias import PositionBias
from pore.bias.stages import save_biases
from pore.calibration.calibrating import calibrate
from pore.calibration.host import HostCalibration
from pore.calibration.reading import attention_stages
from pore.calibration.sums import Calibration
from pore.data.samples import Sample
from pore.embedded import EMBEDDED
from pore.engine.limits import check_limits
from pore.engine.pruner import Pruner
from pore.errors import PoreError, ProfileError, StaleCheckpointError
from pore.evaluation import page
from pore.evaluation.batches import Batches
from pore.evaluation.guided import Guiding, guiding_of
from pore.evaluation.outcome import Difference, Outcome, common, compare
from pore.evaluation.records import write_differences, write_records
from pore.evaluation.reweighting import reweighted
from pore.evaluation.running import Told, Work, cost, described, evaluate, time_prefill
from pore.evaluation.store import _conditions, _described, _digest, _json, _slug, _Store
from pore.families.registry import family_of, shape_of
from pore.identity import forget, names_of
from pore.methods.budgets import scheduled
from pore.methods.downsample import Downsample, fair_cells
from pore.methods.registry import methods
from pore.methods.sgl import SGL
from pore.plotting.labels import budget_label
from pore.tensors.selection import budget

_TIMED_BATCH = 8


_TIMED_ROUNDS = 5


_LONGEST_NAME = 240  # file systems take 255 bytes, with what comes after it


_OTHERWISE: tuple[Kind, ...] = ("spline", "empirical")


@dataclass(frozen=True)
class Settings:
    """What is to be asked.

    Attributes:
        keeps: The budgets: visual tokens left at the end, or the fraction of those there are.
        average: Whether budgets are the mean over the decoder layers instead.
        kind: Form of P; where none of it fits, a spline is taken, or else the mean attention.
        batch_size: Questions of a batch.
        max_new_tokens: Longest answer.
        timing: Whether to measure the prefill.
        seed: Seed of methods that draw, and of the bootstrap.
        max_bad: Share of bad samples to put up with, as in `calibrate` and `Batches`.
    """

    keeps: tuple[int | float, ...] = (1 / 3, 2 / 9, 1 / 9)
    average: bool = False
    kind: Kind = "exponential"
    batch_size: int = 32
    max_new_tokens: int = 8
    timing: bool = True
    seed: int = 0
    max_bad: float = 0.01


@dataclass(frozen=True)
class LeftOut:
    """A method that was not asked.

    Attributes:
        method: Its name.
        keep: The budget, in tokens.
        reason: Why not.
    """

    method: str
    keep: int
    reason: str


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        settings: What was asked.
        visual: Visual tokens of an image.
        layers: Decoder layers.
        outcomes: The unpruned model first, then budget by budget.
        differences: Every host with P against itself without, over all questions and by third.
        left_out: Methods that could not be asked.
        biases: By host and the layers that it looks at, the P of every stage.
        taught: The decoder layer from which on attention is better than a real model's, if any.
        report: The report.
    """

    settings: Settings
    visual: int
    layers: int
    outcomes: tuple[Outcome, ...]
    differences: tuple[Difference, ...]
    left_out: tuple[LeftOut, ...]
    biases: Mapping[str, tuple[PositionBias, ...]]
    taught: int | None
    report: Path

    @property
    def reasons(self) -> list[str]:
        """What was left out and why, a line for every method and reason."""
        keeps: dict[tuple[str, str], list[str]] = {}
        for one in self.left_out:
            keeps.setdefault((one.method, one.reason), []).append(str(one.keep))
        return [
            f"{method} at {', '.join(budgets)}: {reason}"
            for (method, reason), budgets in keeps.items()
        ]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of `results.json`."""
        return [outcome.record() for outcome in self.outcomes]


def run(
    model: Any,
    processor: Any,
    *,
    calibration: Sequence[Sample],
    test: Sequence[Sample],
    out: Path,
    settings: Settings,
    about: page.About,
    guide: tuple[Any, Any] | None = None,
    progress: Told | None = None,
) -> Result:
    """Ask all methods, with P and without, and write everything into a folder.

    Files are written whole or not at all. What a former call with the same conditions has left in
    the folder is taken from there: with the same weights and pictures, whatever they are called.

    Args:
        model: A supported model, every image of which has the same visual tokens.
        processor: Its processor.
        calibration: Samples that P is measured on.
        test: Samples with answers, none of them among `calibration`.
        out: The folder; made if missing.
        settings: What to ask.
        about: What the report tells of the circumstances.
        guide: The model that guides SGL and its processor; None for the model itself.
        progress: Told what is being done.

    Returns:
        What came of it.

    Raises:
        PoreError: The model or the samples do not fit.
        OSError: A file cannot be written.
        KeyboardInterrupt: Passed on, with a message that says how to go on.
    """
    for one, _ in ((model, processor), guide or (model, processor)):
        forget(one)  # what was changed unseen since it was last asked is to be noticed
    shape = shape_of(model.config)
    visual, layers = shape.image_tokens, shape.decoder.layers
    guiding = Guiding(
        *(guide or (model, processor)), max_new_tokens=settings.max_new_tokens, itself=guide is None
    )
    planned, left_out = lineup(model, settings, guiding)
    hosts = [pruner for _, pruner in planned if pruner.reweightable]
    costs = [1.0, *(cost(p, visual, layers) for _, p in planned)]
    costs += [cost(host, visual, layers) for host in hosts]
    measures = [_measure(host, model, processor, layers) for host in hosts]
    looks = {measure.name: measure for measure in measures}
    timed = min(len(test), _TIMED_BATCH) * (_TIMED_ROUNDS + 1) * len(costs) * settings.timing
    looking = len(calibration) * sum(measure.cost for measure in looks.values())
    work = Work(looking + len(test) * sum(costs) + timed, progress)
    work.start("looking at the samples")
    batches = Batches(
        model, processor, test, batch_size=settings.batch_size, max_bad=settings.max_bad
    )
    batches.sift()
    store = _Store(out / "answers", _conditions(model, processor, batches, settings))

    whose = described(model)
    outcomes: list[Outcome] = []
    biases: dict[str, tuple[PositionBias, ...]] = {}

    def ask(keep: int | None, pruner: Pruner | None) -> None:
        named = f"mean {keep}" if settings.average and keep is not None else keep
        outcome = Outcome(pruner, (), budget=named, asked=whose)
        where = "" if keep is None else f", {budget_label(named)}"
        work.start(f"asking: {outcome.label}{where}")
        advance = work.done(cost(pruner, visual, layers))
        answers = store.load(pruner, batches.good)
        if answers is not None:
            advance(len(test))
            skipped = tuple(batches.skipped[number] for number in sorted(batches.skipped))
        else:
            asked = evaluate(
                model,
                processor,
                batches,
                pruner,
                max_new_tokens=settings.max_new_tokens,
                progress=advance,
            )
            answers, skipped = asked.answers, asked.skipped
            store.save(pruner, answers)
        outcomes.append(replace(outcome, answers=answers, skipped=skipped))
        write_records(out, [each.record() for each in outcomes])

    def fit(measure: _Measure) -> tuple[PositionBias, ...]:
        work.start(f"measuring the position bias for {measure.host}")
        checkpoint = out / "calibrations" / f"{measure.name}.json"
        take = partial(
            measure.take,
            batch_size=settings.batch_size,
            checkpoint=checkpoint,
            max_bad=settings.max_bad,
            progress=False,
            source=about.calibration,
        )
        try:
            measured = take(work.through(calibration, measure.cost))
        except StaleCheckpointError:  # of another model or other samples in this folder
            checkpoint.unlink()
            measured = take(work.through(calibration, measure.cost))
        stages = measured.stages if isinstance(measured, HostCalibration) else (measured,)
        return tuple(_fitted(stage, settings.kind) for stage in stages)

    try:
        ask(None, None)
        for name, measure in looks.items():
            biases[name] = fit(measure)
            save_biases(out / "profiles" / f"{name}.json", biases[name])
        for keep, pruner in planned:
            try:
                ask(keep, pruner)
                if pruner.reweightable:
                    name = _measure(pruner, model, processor, layers).name
                    ask(keep, reweighted(pruner, biases[name]))
            except PoreError as error:  # only now seen not to run, as at a budget without a grid
                left_out.append(LeftOut(pruner.name, keep, str(error)))
        outcomes = common(outcomes)
        if settings.timing:
            work.start("timing the prefill, methods in turns")
            outcomes = _timed(
                model,
                processor,
                batches.good,
                outcomes,
                out / "timing.json",
                work,
                store.conditions,
            )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"{len(outcomes)} of {len(costs)} settings are done and kept in {out}: the same "
            f"command goes on from there. {error}".strip()
        ) from None

    work.start("drawing and writing the report")
    taught = taught_layer(model)
    records = [outcome.record() for outcome in outcomes]
    differences = tuple(_differences(outcomes, settings.seed))
    write_records(out, records)
    write_differences(out, differences)
    write_atomic(out / "left_out.json", sealed_list(map(asdict, left_out)))
    plotting.save(plotting.accuracy_over_flops(records, taught), out / "accuracy.png")
    if differences:
        compared = [difference.record() for difference in differences]
        plotting.save(plotting.differences(compared, taught), out / "pore.png")
    result = Result(
        settings,
        visual,
        layers,
        tuple(outcomes),
        differences,
        tuple(left_out),
        biases,
        taught,
        out / "report.html",
    )
    page.write_survey(result, about, out)
    work.finish()
    return result


def lineup(
    model: Any, settings: Settings, guiding: Guiding
) -> tuple[list[tuple[int, Pruner]], list[LeftOut]]:
    """Every method at every budget, without P, and those that cannot be.

    Args:
        model: The model.
        settings: Budgets and seed.
        guiding: The model that guides SGL.

    Returns:
        Budgets in tokens with methods, budget by budget; and what is left out.
    """
    shape, family = shape_of(model.config), family_of(model)
    grid = family.grid(model)
    planned: list[tuple[int, Pruner]] = []
    left_out: list[LeftOut] = []
    for keep in (budget(keep, shape.image_tokens) for keep in settings.keeps):
        for name, kind in methods().items():
            usual = partial(guiding.usual if kind is SGL else kind.usual, shape=shape)
            try:
                if settings.average:
                    pruner: Pruner | None = scheduled(usual, name, shape, keep)
                else:
                    pruner = usual(fair_cells(grid, keep) if kind is Downsample and grid else keep)
                if pruner is None:
                    left_out.append(LeftOut(name, keep, "it needs more than a model to be set up"))
                    continue
                if hasattr(pruner, "seed"):
                    pruner = replace(pruner, seed=settings.seed)  # type: ignore[type-var]
                check_limits(pruner, family)
                pruner.check(model, family)
                pruner.counts(shape.image_tokens, shape.decoder.layers)
            except PoreError as error:
                left_out.append(LeftOut(name, keep, str(error)))
            else:
                planned.append((keep, pruner))
    return planned, left_out


def taught_layer(model: Any) -> int | None:
    """The decoder layer from which on attention was taught where to look, or None.

    Args:
        model: The model.

    Returns:
        The layer, for the embedded model.
    """
    from pore.embedded import TAUGHT_LAYER

    return TAUGHT_LAYER if names_of(model)["model"] == EMBEDDED else None


class _Measure(NamedTuple):
    """How what a host divides by P is measured.

    Attributes:
        host: The host's name.
        name: The host with what it looks at, as the name of a file: once for all its budgets.
        cost: Of a sample, in units of asking the unpruned model.
        take: Takes samples and what `calibrate` and `calibrate_guide` have in common.
    """

    host: str
    name: str
    cost: float
    take: Callable[..., Calibration | HostCalibration]


def _measure(host: Pruner, model: Any, processor: Any, layers: int) -> _Measure:
    """How to measure a host: at its guide, or where its stages look."""
    slug = _slug(host.name)
    if (guiding := guiding_of(host)) is not None:
        name = f"{slug}-{_digest(guiding.conditions)[:8]}"
        return _Measure(host.name, name, 1.0, guiding.calibrate)
    probed = [stage.reads_layer or 0 for stage in attention_stages(host)]
    name = f"{slug}-{'-'.join(map(str, probed))}"
    if len(name) > _LONGEST_NAME:  # of a model with a hundred layers, all of them looked at
        name = f"{name[:100]}-{_digest(probed)[:8]}"
    depth = 0.25 + 0.75 * max(probed) / layers  # the decoder runs up to the last layer looked at
    return _Measure(host.name, name, depth, partial(calibrate, model, processor, host=host))


def _fitted(measured: Calibration, kind: Kind) -> PositionBias:
    """P in the form that was asked for, or the next where none of it fits."""
    for form in (kind, *_OTHERWISE):
        try:
            return measured.fit(form)
        except ProfileError as error:
            refused = error
    raise refused


def _timed(
    model: Any,
    processor: Any,
    test: Sequence[Sample],
    outcomes: Sequence[Outcome],
    path: Path,
    work: Work,
    conditions: Mapping[str, Any],
) -> list[Outcome]:
    """Outcomes with the time of their prefill, measured in turns, or taken from the file."""
    here = {**conditions, "device": str(model.device)}
    settings = [_digest([here, _described(outcome.pruner)]) for outcome in outcomes]
    found = _json(path)
    times = found.get("prefill_ms")
    if not isinstance(times, list) or found.get("settings") != settings:
        batches = Batches(model, processor, test[:_TIMED_BATCH], batch_size=_TIMED_BATCH)
        pruners = [outcome.pruner for outcome in outcomes]
        advance = work.done(1.0)
        times = time_prefill(
            model, batches, pruners, count=1, rounds=_TIMED_ROUNDS, progress=advance
        )
        write_atomic(path, sealed_text({"settings": settings, "prefill_ms": times}))
    return [replace(o, prefill_ms=ms) for o, ms in zip(outcomes, times, strict=True)]


def _differences(outcomes: Sequence[Outcome], seed: int) -> Iterator[Difference]:
    """Every host with P against itself, over all questions and by third of the image."""
    hosts = {(o.keep, o.method): o for o in outcomes if o.reweight is None}
    for outcome in outcomes:
        if outcome.reweight is not None:
            host = hosts[outcome.keep, outcome.method]
            thirds = dict.fromkeys(answer.third for answer in outcome.answers)
            for third in (None, *(third for third in thirds if third is not None)):
                yield compare(host, outcome, seed=seed, third=third)
