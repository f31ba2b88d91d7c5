"""Every method on the same questions, at the same budgets, and PoRe on every host that takes it.

Calibration sees the calibration samples only, and nothing is chosen by looking at the test samples:
methods are set up as by their authors, scaled to the model. The answers of a setting are written to
the folder as soon as they are there, and the same call resumes where an interrupted one stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from pore import plotting
from pore._files import write_atomic
from pore._saved.seals import sealed_list
from pore.bench.results import Spread
from pore.calibration.page import Drawn
from pore.corrections.files import save_corrections
from pore.data.samples import Sample
from pore.embedded import EMBEDDED, EMBEDDED_VIDEO
from pore.engine.limits import check_limits
from pore.engine.pruner import Pruner
from pore.errors import InputError, PoreError
from pore.evaluation.circumstances import circumstances
from pore.evaluation.differences import Difference, compare
from pore.evaluation.drawing import over_flops
from pore.evaluation.files import Results, write_differences, write_results
from pore.evaluation.guided import Guiding
from pore.evaluation.hosts import HostMeasure, host_measure
from pore.evaluation.outcome import Outcome, common, questions_of, records_of
from pore.evaluation.own import OwnQuestions
from pore.evaluation.predictions import Predictions
from pore.evaluation.results import About, LeftOut, SurveyResult, SurveySettings
from pore.evaluation.reweighting import reweighted
from pore.evaluation.running import time_some, timed_samples
from pore.evaluation.sizes import ImageSizes, images_asked
from pore.evaluation.store import kept_times
from pore.evaluation.survey_page import write_survey
from pore.evaluation.work import Told, Work, cost
from pore.families.registry import family_of, sizes_of
from pore.identity import forget, names_of
from pore.methods.budgets import scheduled
from pore.methods.downsample import Downsample
from pore.methods.registry import methods
from pore.plotting.labels import budget_label


def run(
    model: Any,
    processor: Any,
    *,
    calibration: Sequence[Sample],
    test: Sequence[Sample],
    out: Path,
    settings: SurveySettings,
    about: About,
    guide: tuple[Any, Any] | None = None,
    progress: Told | None = None,
) -> SurveyResult:
    """Ask all methods, with P and without, and write everything into a folder.

    Files are written whole or not at all. Results of an earlier call in the same folder are used if
    the conditions are the same; weights and pictures are compared by content, not by name.

    Args:
        model: A supported model. Where it takes images of any size, P is a power of the distance to
            the text, and a budget that is a share is that share of every image.
        processor: Its processor.
        calibration: Samples that P is measured on.
        test: Samples with answers, none of them among `calibration`.
        out: The folder; made if missing.
        settings: What to ask.
        about: The circumstances of the run, for the report.
        guide: The model that guides SGL and its processor; None for the model itself.
        progress: Called with what is being done, and the share of the work done so far.

    Returns:
        The result.

    Raises:
        PoreError: The model or the samples do not fit.
        OSError: A file cannot be written.
        KeyboardInterrupt: Passed on, with a message that says how to resume.
    """
    guiding, layers = _guiding(model, processor, guide, settings)
    told = Predictions(out)
    questions = OwnQuestions(model, processor, test, out, settings, predictions=told)
    sizes = ImageSizes.of(model, images_asked(questions.batches))
    planned, left_out = lineup(model, settings, guiding, sizes)
    hosts = [pruner for _, pruner in planned if pruner.reweightable]
    measures = {one.name: one for one in (host_measure(h, model, processor, layers) for h in hosts)}
    asked = [None, *(pruner for _, pruner in planned), *hosts]
    each = [cost(pruner, sizes.usual, layers) for pruner in asked]
    work = Work(_all_work(each, measures, len(calibration), len(test), settings), progress)
    made = circumstances(model.device, settings.seed, about.command)
    asking = _Asking(questions, sizes.usual, settings, out, work, made)
    biases: dict[str, tuple[Drawn, ...]] = {}
    try:
        asking.ask(None, None)
        for name, measure in measures.items():
            work.start(f"measuring the position bias for {measure.host}")
            samples = partial(work.through, calibration, measure.cost)
            sums = out / "calibrations" / f"{name}.json"
            biases[name] = measure.fit(
                samples, sums, settings, source=about.calibration, any_size=sizes.any_size
            )
            save_corrections(out / "profiles" / f"{name}.json", biases[name])
        for keep, pruner in planned:
            own = host_measure(pruner, model, processor, layers) if pruner.reweightable else None
            try:
                asking.ask(keep, pruner)
                if own is not None:
                    asking.ask(keep, reweighted(pruner, biases[own.name]))
            except PoreError as error:  # fails only when it runs
                left_out.append(LeftOut(pruner.name, keep, str(error)))
        outcomes = asking.together()
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"{len(asking.outcomes)} of {len(asked)} settings are done and kept in {out}: the same "
            f"command resumes from there. {error}".strip()
        ) from None
    work.start("drawing and writing the report")
    result = _result(model, settings, sizes, outcomes, left_out, biases, out)
    _write(result, about, made, out)
    work.finish()
    return result


def _guiding(
    model: Any, processor: Any, guide: tuple[Any, Any] | None, settings: SurveySettings
) -> tuple[Guiding, int]:
    """The model that guides, and the decoder layers of the one that is asked."""
    for one, _ in ((model, processor), guide or (model, processor)):
        forget(one)  # so that a change of the weights since the last call is noticed
    shape = sizes_of(model)
    longest = settings.max_new_tokens
    guiding = Guiding(*(guide or (model, processor)), max_new_tokens=longest, itself=guide is None)
    return guiding, shape.decoder.layers


class _Asking:
    """Asks one setting after the other; answers that are in the folder already are taken from it.

    Attributes:
        outcomes: The outcomes of the settings so far.
    """

    def __init__(
        self,
        questions: OwnQuestions,
        visual: int,
        settings: SurveySettings,
        out: Path,
        work: Work,
        made: Mapping[str, Any],
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._questions = questions
        self._settings = settings
        self._out = out
        self._work = work
        self._made = made
        self._usual = visual, sizes_of(questions.model).decoder.layers

    def ask(self, keep: int | float | None, pruner: Pruner | None) -> None:
        """Ask under one setting, and write the records of all settings so far."""
        average = self._settings.average and keep is not None
        budget = f"mean {keep}" if average else keep
        where = "" if keep is None else f", {budget_label(budget)}"
        self._work.start(f"asking: {Outcome(pruner, ()).label}{where}")
        advance = self._work.done(cost(pruner, *self._usual))
        named = Outcome(pruner, (), budget=budget).named
        asked = self._questions.ask(pruner, advance, named=named)
        self.outcomes.append(replace(asked, budget=budget))
        records, asked_of = records_of(self.outcomes), questions_of(self.outcomes)
        write_results(self._out, Results(self._made, asked_of, records))

    def together(self) -> list[Outcome]:
        """All outcomes over the same questions, with times if they were requested."""
        outcomes = common(self.outcomes)
        if not self._settings.timing:
            return outcomes
        self._work.start("timing the prefill, methods in turns")
        times = self._times([outcome.pruner for outcome in outcomes])
        return [replace(o, prefill=spent) for o, spent in zip(outcomes, times, strict=True)]

    def _times(self, pruners: Sequence[Pruner | None]) -> list[Spread]:
        """The prefill of every setting, measured in turns, or taken from the file."""
        asked = self._questions
        here = {**asked.store.conditions, "device": str(asked.model.device)}
        good, advance = asked.batches.good, self._work.done(1.0)
        return kept_times(
            self._out / "timing.json",
            here,
            pruners,
            lambda: time_some(asked.model, asked.processor, good, pruners, advance),
        )


def _all_work(
    costs: Sequence[float],
    measures: Mapping[str, HostMeasure],
    calibration: int,
    test: int,
    settings: SurveySettings,
) -> float:
    """The whole amount of work, in units of asking the unpruned model one question."""
    measured = calibration * sum(measure.cost for measure in measures.values())
    asked = test * sum(costs)
    return measured + asked + timed_samples(test, len(costs)) * settings.timing


def _result(
    model: Any,
    settings: SurveySettings,
    sizes: ImageSizes,
    outcomes: Sequence[Outcome],
    left_out: Sequence[LeftOut],
    biases: Mapping[str, tuple[Drawn, ...]],
    out: Path,
) -> SurveyResult:
    return SurveyResult(
        settings=settings,
        sizes=sizes,
        layers=sizes_of(model).decoder.layers,
        outcomes=tuple(outcomes),
        differences=tuple(_differences(outcomes, settings.seed)),
        left_out=tuple(left_out),
        biases=biases,
        taught=taught_layer(model),
        report=out / "report.html",
    )


def _write(result: SurveyResult, about: About, made: Mapping[str, Any], out: Path) -> None:
    """Records, figures and the report of a survey."""
    write_results(out, Results(made, questions_of(result.outcomes), result.records))
    write_differences(out, [difference.record() for difference in result.differences], made)
    write_atomic(out / "left_out.json", sealed_list(map(asdict, result.left_out)))
    taught = result.taught
    drawn = over_flops(result.records, out / "accuracy.png", taught)
    if result.differences:
        compared = [difference.record() for difference in result.differences]
        plotting.save(plotting.differences(compared, taught), out / "pore.png")
    write_survey(result, about, out, drawn)


def lineup(
    model: Any, settings: SurveySettings, guiding: Guiding, sizes: ImageSizes
) -> tuple[list[tuple[int | float, Pruner]], list[LeftOut]]:
    """Every method at every budget, without P, and the methods that cannot run.

    Args:
        model: The model.
        settings: Budgets and seed.
        guiding: The model that guides SGL.
        sizes: The sizes of the images.

    Returns:
        Pairs of a budget and a method, budget by budget; and the methods left out.
    """
    shape, family = sizes_of(model), family_of(model)
    planned: list[tuple[int | float, Pruner]] = []
    left_out: list[LeftOut] = []
    for keep in map(sizes.budget, settings.keeps):
        for name, kind in methods().items():
            try:
                visual = sizes.usual if sizes.any_size else None
                pruner = set_up(
                    kind, keep, model, settings, guiding, videos=sizes.videos, visual=visual
                )
                check_limits(pruner, family)
                pruner.check(model, family)
                pruner.counts(sizes.usual, shape.decoder.layers)
            except PoreError as error:
                left_out.append(LeftOut(name, keep, str(error)))
            else:
                planned.append((keep, pruner))
    return planned, left_out


def set_up(
    kind: type[Pruner],
    keep: int | float,
    model: Any,
    settings: SurveySettings,
    guiding: Guiding,
    *,
    videos: bool,
    visual: int | None = None,
) -> Pruner:
    """A method at a budget, as its authors set it up for a model.

    Args:
        kind: The method.
        keep: The budget, in tokens or as a share.
        model: The model.
        settings: The seed, and whether budgets are the mean over the layers.
        guiding: The model that guides SGL.
        videos: Whether methods that are for videos alone are set up too.
        visual: Visual tokens that images usually have, where they differ in that; a budget that is
            the mean over the layers and a share is then that share of every image.

    Returns:
        The method.

    Raises:
        PoreError: It cannot be set up.
    """
    shape = sizes_of(model)
    guide: dict[str, Any] = {"guide": guiding} if kind.guided else {}

    def usual(keep: int | float) -> Pruner | None:
        if videos and kind.videos_only:
            return kind(keep=keep)  # type: ignore[call-arg]
        return kind.usual(keep, shape, **guide)

    if settings.average:
        shares = visual is not None and isinstance(keep, float)
        pruner: Pruner | None = scheduled(usual, kind.name, shape, keep, visual, shares=shares)
    else:
        pruner = usual(keep)
    if pruner is None:
        raise InputError("it needs more than a model to be set up")
    if isinstance(pruner, Downsample):
        pruner = replace(pruner, fair=True)
    if hasattr(pruner, "seed"):
        pruner = replace(pruner, seed=settings.seed)  # type: ignore[type-var]
    return pruner


def taught_layer(model: Any) -> int | None:
    """The first decoder layer whose attention training has taught where to look, or None.

    Args:
        model: The model.

    Returns:
        The layer, for the embedded models.
    """
    from pore.embedded import TAUGHT_LAYER

    shipped = (EMBEDDED, EMBEDDED_VIDEO)
    return TAUGHT_LAYER if names_of(model)["model"] in shipped else None


def _differences(outcomes: Sequence[Outcome], seed: int) -> Iterator[Difference]:
    """Every host with P compared with itself without, over all questions and by third."""
    hosts = {(o.keep, o.method): o for o in outcomes if o.reweight is None}
    for outcome in outcomes:
        if outcome.reweight is not None:
            host = hosts[outcome.keep, outcome.method]
            thirds = dict.fromkeys(answer.third for answer in outcome.answers)
            for third in (None, *(third for third in thirds if third is not None)):
                yield compare(host, outcome, seed=seed, third=third)
