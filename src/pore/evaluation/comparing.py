"""Every correction on every host that takes one, on the same questions.

Questions are asked block by block, under all settings, and every answer is kept in the folder. The
same call resumes where an interrupted one stopped, and with more questions it asks only the further
ones. P is measured on calibration samples alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pore import plotting
from pore._files import write_atomic
from pore._saved.seals import sealed_list
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.errors import PoreError
from pore.evaluation.batches import Skipped
from pore.evaluation.candidates import CANDIDATES, NONE, Measurement, set_up, with_correction
from pore.evaluation.circumstances import circumstances
from pore.evaluation.differences import Difference, compare
from pore.evaluation.files import Results, write_differences, write_results
from pore.evaluation.guided import Guiding
from pore.evaluation.hosts import host_measure
from pore.evaluation.outcome import Answer, Named, Outcome, common, questions_of
from pore.evaluation.own import OwnQuestions
from pore.evaluation.predictions import Predictions
from pore.evaluation.results import LeftOut, SurveySettings
from pore.evaluation.reweighting import rope_bias
from pore.evaluation.running import time_some, timed_samples
from pore.evaluation.sizes import ImageSizes, images_asked
from pore.evaluation.store import kept_times
from pore.evaluation.survey import taught_layer
from pore.evaluation.work import Told, Work, cost
from pore.families.registry import sizes_of
from pore.identity import forget
from pore.methods.fastv import FastV
from pore.methods.registry import methods

BLOCK = 105
"""Questions asked under all settings before the next are. Of the embedded scenes these are 15 of
each kind, 5 for every third of the image."""


@dataclass(frozen=True)
class Setting:
    """A host at a budget with a correction.

    Attributes:
        keep: The budget, in tokens.
        correction: A name of `candidates.CANDIDATES`, or `candidates.NONE`.
        pruner: The host with it; None for the unpruned model.
    """

    keep: int | float | None
    correction: str
    pruner: Pruner | None


@dataclass(frozen=True)
class Compared:
    """A setting, and how it did.

    Attributes:
        setting: The setting.
        outcome: Its answers.
        differences: Over all questions, and over those about each third of the image: how much
            better it is than the host without a correction. None for that itself.
    """

    setting: Setting
    outcome: Outcome
    differences: tuple[Difference, ...] = ()

    def record(self) -> dict[str, Any]:
        """The record of `results.json`, with the correction's name as `reweight`."""
        return self.outcome.record() | {"reweight": _named(self.setting)[1]}

    def difference_records(self) -> Iterator[dict[str, Any]]:
        """The records of `differences.json`, with the same name."""
        for difference in self.differences:
            yield difference.record() | {"reweight": self.setting.correction}


@dataclass(frozen=True)
class Comparison:
    """What a comparison of corrections found.

    Attributes:
        compared: The unpruned model first, then budget by budget and host by host.
        left_out: Hosts with corrections that they do not take, and why.
        taught: As in `SurveyResult`.
        questions: How many were asked.
    """

    compared: tuple[Compared, ...]
    left_out: tuple[LeftOut, ...]
    taught: int | None
    questions: int


def run(
    model: Any,
    processor: Any,
    *,
    calibration: Sequence[Sample],
    test: Sequence[Sample],
    out: Path,
    settings: SurveySettings,
    source: str,
    command: str = "",
    guide: tuple[Any, Any] | None = None,
    names: Sequence[str] = tuple(CANDIDATES),
    progress: Told | None = None,
) -> Comparison:
    """Ask every host with every correction, and write everything into a folder.

    Args:
        model: A supported model. Where it takes images of any size, corrections over the positions
            of one size are left out, with the reason.
        processor: Its processor.
        calibration: Samples that corrections are calibrated on.
        test: Samples with answers, none of them among `calibration`.
        out: The folder; made if missing. Answers and sums that are there are used.
        settings: Budgets, batches, seed; `kind` and `average` do not count.
        source: Where the calibration samples come from.
        command: The command line, for the files of results.
        guide: The model that guides SGL and its processor; None for the model itself.
        names: The corrections, of `candidates.CANDIDATES`.
        progress: Called with what is being done, and the share of the work done so far.

    Returns:
        The comparison over all questions.

    Raises:
        PoreError: The model or the samples do not fit.
        OSError: A file cannot be written.
    """
    for one, _ in ((model, processor), guide or (model, processor)):
        forget(one)  # so that a change of the weights since the last call is noticed
    guiding = Guiding(
        *(guide or (model, processor)), max_new_tokens=settings.max_new_tokens, itself=guide is None
    )
    told = progress or (lambda what, share: None)
    measured = partial(_measured, model, processor, calibration, out, settings, source, told)
    written = Predictions(out)
    blocks = [
        OwnQuestions(
            model, processor, test[first : first + BLOCK], out, settings, predictions=written
        )
        for first in range(0, len(test), BLOCK)
    ]
    images = [image for block in blocks for image in images_asked(block.batches)]
    sizes = ImageSizes.of(model, images)
    planned, left_out = lineup(model, settings, guiding, names, measured, sizes)
    layers = sizes_of(model).decoder.layers
    each = [cost(setting.pruner, sizes.usual, layers) for setting in planned]
    timed = timed_samples(len(test), len(planned)) * settings.timing
    work = Work(len(test) * sum(each) + timed, progress)
    made = circumstances(model.device, settings.seed, command)
    outcomes: dict[Setting, Outcome] = {}
    for number, block in enumerate(blocks):
        asked: dict[Setting, Outcome] = {}
        for setting, unit in zip(planned, each, strict=True):
            if number and setting not in outcomes:
                continue  # it failed in the first block
            work.start(f"block {number + 1} of {len(blocks)}: {_name(setting)}")
            try:
                asked[setting] = block.ask(setting.pruner, work.done(unit), named=_named(setting))
            except PoreError as error:
                left_out.append(_left_out(setting, error))
        outcomes = _longer(outcomes, asked)
        compared = _compared(outcomes, settings.seed)
        result = Comparison(
            compared, tuple(left_out), taught_layer(model), len(compared[0].outcome.answers)
        )
        _write(result, made, out)
    if settings.timing:
        work.start("timing the prefill, settings in turns")
        result = _timed(result, blocks[0], out, work)
        _write(result, made, out)
    work.finish()
    return result


def lineup(
    model: Any,
    settings: SurveySettings,
    guiding: Guiding,
    names: Sequence[str],
    measured: Any,
    sizes: ImageSizes,
) -> tuple[list[Setting], list[LeftOut]]:
    """Every host at every budget with every correction, the unpruned model first.

    Args:
        model: The model.
        settings: The budgets.
        guiding: The model that guides SGL.
        names: The corrections.
        measured: Gives the `Measurement` of a host.
        sizes: The sizes of the images.

    Returns:
        The settings; and those that cannot be made.
    """
    shape = sizes_of(model)
    planned, left_out = [Setting(None, NONE, None)], []
    made: dict[str, Measurement] = {}
    for keep in map(sizes.budget, settings.keeps):
        for kind in methods().values():
            if not kind.reweightable:
                continue
            guide: dict[str, Any] = {"guide": guiding} if kind.guided else {}
            try:
                host = set_up(kind, keep, shape, **guide)
                if host is None:
                    continue
                host.counts(sizes.usual, shape.decoder.layers)
                if kind.name not in made:
                    made[kind.name] = measured(host)
            except PoreError as error:
                left_out.append(LeftOut(kind.name, keep, str(error)))
                continue
            for name in (NONE, *names):
                try:
                    pruner = with_correction(host, name, made[kind.name])
                    planned.append(Setting(keep, name, pruner))
                except PoreError as error:
                    left_out.append(_left_out(Setting(keep, name, host), error))
    return planned, left_out


def _measured(
    model: Any,
    processor: Any,
    calibration: Sequence[Sample],
    out: Path,
    settings: SurveySettings,
    source: str,
    told: Told,
    host: Pruner,
) -> Measurement:
    told(f"measuring the position bias for {host.name}", 0.0)
    layers = sizes_of(model).decoder.layers
    if host.always_reweighted:
        # It refuses to run as it is, and ranks by what FastV reads at its layer.
        host = FastV(host.keep, layer=host.layer)  # type: ignore[attr-defined]
    measure = host_measure(host, model, processor, layers)
    sums = out / "calibrations" / f"{measure.name}.json"
    stages = measure.measured(lambda: calibration, sums, settings, source=source, heads=True)
    return Measurement(stages, partial(rope_bias, model, processor, calibration[:64]))


def _longer(
    so_far: Mapping[Setting, Outcome], block: Mapping[Setting, Outcome]
) -> dict[Setting, Outcome]:
    """The outcomes with those of one more block, over the questions that no setting skipped."""
    found = {}
    for setting, more in zip(block, common(list(block.values())), strict=True):
        answers: tuple[Answer, ...] = more.answers
        skipped: tuple[Skipped, ...] = more.skipped
        if setting in so_far:
            before = so_far[setting]
            seen = len(before.answers) + len(before.skipped)
            skipped = tuple(one._replace(number=one.number + seen) for one in skipped)
            answers, skipped = before.answers + answers, before.skipped + skipped
        budgeted = replace(more, budget=setting.keep, answers=answers, skipped=skipped)
        found[setting] = budgeted
    return found


def _compared(outcomes: Mapping[Setting, Outcome], seed: int) -> tuple[Compared, ...]:
    plain = {(s.keep, o.method): o for s, o in outcomes.items() if s.correction == NONE}
    found = []
    for setting, outcome in outcomes.items():
        differences: list[Difference] = []
        if setting.correction != NONE and (setting.keep, outcome.method) in plain:
            host = plain[setting.keep, outcome.method]
            thirds = dict.fromkeys(answer.third for answer in outcome.answers)
            for third in (None, *(third for third in thirds if third is not None)):
                differences.append(compare(host, outcome, seed=seed, third=third))
        found.append(Compared(setting, outcome, tuple(differences)))
    return tuple(found)


def _timed(result: Comparison, block: OwnQuestions, out: Path, work: Work) -> Comparison:
    pruners = [one.setting.pruner for one in result.compared]
    here = {**block.store.conditions, "device": str(block.model.device)}
    good, advance = block.batches.good, work.done(1.0)
    times = kept_times(
        out / "timing.json",
        here,
        pruners,
        lambda: time_some(block.model, block.processor, good, pruners, advance),
    )
    timed = (
        replace(one, outcome=replace(one.outcome, prefill=spent))
        for one, spent in zip(result.compared, times, strict=True)
    )
    return replace(result, compared=tuple(timed))


def _write(result: Comparison, made: Mapping[str, Any], out: Path) -> None:
    """The records, and the figure."""
    questions = questions_of([one.outcome for one in result.compared])
    write_results(out, Results(made, questions, [one.record() for one in result.compared]))
    differences = [record for one in result.compared for record in one.difference_records()]
    write_differences(out, differences, made)
    write_atomic(out / "left_out.json", sealed_list(map(asdict, result.left_out)))
    if differences:
        figure = plotting.corrections(differences, result.taught)
        plotting.save(figure, out / "corrections.png")


def _left_out(setting: Setting, error: PoreError) -> LeftOut:
    return LeftOut(_name(setting), setting.keep or 0, str(error))


def _named(setting: Setting) -> Named:
    """What a setting is called in results."""
    correction = None if setting.correction == NONE else setting.correction
    return Outcome(setting.pruner, ()).method, correction, setting.keep


def _name(setting: Setting) -> str:
    name = "unpruned" if setting.pruner is None else setting.pruner.name
    return name if setting.correction == NONE else f"{name}, {setting.correction}"
