"""`pore evaluate`: ask questions with known answers, under one method or under all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore._progress import progress
from pore.cli.about import about
from pore.cli.comparing import ask_corrections
from pore.cli.options import (
    LARGEST_SEED,
    Allow,
    Average,
    Batch,
    Layer,
    Limit,
    Loading,
    MaxBad,
    Method,
    Model,
    Normalize,
    Questions,
    Reweight,
    Samples,
    Set,
    Split,
    budget,
    budgets,
    takes,
)
from pore.cli.printing import print_results, say, stdout
from pore.errors import InputError

if TYPE_CHECKING:
    from pore.data.samples import Sample
    from pore.engine.corrections import Correction
    from pore.engine.pruner import Pruner
    from pore.evaluation.guided import Guiding
    from pore.evaluation.outcome import Outcome
    from pore.evaluation.results import SurveySettings

# How many questions --all asks without --limit.
_ASKED_OF_ALL = 700

# How many samples the RoPE prior counts the text tokens of.
_COUNTED = 64


@dataclass(frozen=True)
class Options(Loading):
    """The options of `pore evaluate`."""

    model: Model = "embedded"
    samples: Samples = "embedded:test"
    questions: Questions = None
    split: Split = "test"
    limit: Limit = None
    every: Annotated[
        bool,
        typer.Option("--all", help="Evaluate every method, and PoRe on every host that takes it."),
    ] = False
    corrections: Annotated[
        bool,
        typer.Option(
            "--corrections",
            help="Evaluate every correction of position bias on every host that takes one.",
        ),
    ] = False
    calibration: Annotated[
        str, typer.Option(help="With --all or --corrections: samples that P is measured on.")
    ] = "embedded:calibration"
    images: Annotated[
        int, typer.Option(min=1, help="With --all or --corrections: calibration samples, at most.")
    ] = 700
    guide: Annotated[
        str | None,
        typer.Option(
            help="With --all, --corrections or --method SGL: a smaller model that guides SGL; it "
            "must cut images into the same tokens. [default: the model itself]"
        ),
    ] = None
    method: Method = "FastV"
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Visual tokens kept: 128, 0.25 or 25%. Repeatable. "
            "[default: 25%; with --all or --corrections 1/3, 2/9 and 1/9, which is 192, 128 and 64 "
            "of 576]"
        ),
    ] = None
    average: Average = False
    layer: Layer = None
    reweight: Reweight = None
    allow: Allow = None
    normalize: Normalize = None
    settings: Set = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16
    timing: Annotated[
        bool, typer.Option(help="Measure the prefill time, methods taking turns.")
    ] = True
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for results. [default: none; runs/all with --all, runs/corrections with "
            "--corrections]",
        ),
    ] = None
    max_bad: MaxBad = 0.01
    batch_size: Batch = 16
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            help="Seed of methods that draw at random, and of the bootstrap.",
        ),
    ] = 0


@takes(Options)
def evaluate(options: Options) -> None:
    """Ask a model questions with known answers: unpruned, pruned, and pruned with P.

    With --reweight, every budget is run without P and with it, and the two are compared question
    by question. With --all, every method is set up as by its authors and answers the same 700
    questions (--limit); methods that rank by attention also run with P; and a report is written.
    If it is interrupted, the same command resumes where it stopped. With --corrections, every
    correction runs on every such method; with a larger --limit the same command asks only the
    further questions.

    Examples:

        pore evaluate --keep 25% --keep 10% --reweight profile.json

        pore evaluate --all --limit 2100 --out runs/all

        pore evaluate --corrections -s embedded:fresh --limit 210 --keep 32 --keep 16

        pore evaluate --method SGL -m llava-hf/llava-1.5-13b-hf --guide llava-hf/llava-1.5-7b-hf

        pore evaluate -m llava-hf/llava-1.5-7b-hf -s vqa.jsonl --keep 128 --reweight llava.json
    """
    from pore.data.loading import load_model
    from pore.data.sources import load_samples

    keeps = budgets(options.keep, options.settings)
    every = options.every or options.corrections
    if options.every and options.corrections:
        raise InputError("--all and --corrections are two jobs; give one of them at a time.")
    if options.guide is not None and not every and not _is_guided(options.method):
        raise InputError(
            f"--guide is for --all and for --method SGL, not for {options.method}; leave it out."
        )
    model, processor = load_model(options.model, **options.how)
    limit = _ASKED_OF_ALL if every and options.limit is None else options.limit
    samples = list(
        load_samples(options.samples, questions=options.questions, limit=limit, split=options.split)
    )
    if options.every:
        _ask_all(options, model, processor, samples)
    elif options.corrections:
        _ask_corrections(options, model, processor, samples)
    else:
        _ask_one(options, model, processor, samples, keeps)


def _is_guided(method: str) -> bool:
    from pore.methods.registry import methods

    return any(kind.guided for name, kind in methods().items() if name.lower() == method.lower())


def _guide(options: Options) -> tuple[Any, Any] | None:
    """The model that is to guide, with its processor; None where that is the model itself."""
    from pore.data.loading import load_model

    if options.guide in (None, options.model):
        return None
    # --revision is the revision of the model that answers, not of its guide.
    return load_model(str(options.guide), **{**options.how, "revision": None})


# -- every method ---------------------------------------------------------------------------------


def _ask_all(options: Options, model: Any, processor: Any, samples: Sequence[Sample]) -> None:
    """Evaluate every method, and print the results."""
    from pore.data.sources import load_samples
    from pore.evaluation import survey
    from pore.evaluation.findings import findings, footnotes
    from pore.evaluation.tables import table

    settings = _settings(options, "--all")
    calibration = list(load_samples(options.calibration, limit=options.images))
    guide = _guide(options)
    began = time.monotonic()
    with progress() as told:
        result = survey.run(
            model,
            processor,
            calibration=calibration,
            test=samples,
            out=options.out or Path("runs/all"),
            settings=settings,
            about=about(
                options.model,
                model,
                calibration=options.calibration,
                test=options.samples,
                seed=options.seed,
            ),
            guide=guide,
            progress=told,
        )
    title = "Right answers in % with 95 % interval, by third of the image"
    parts = ("cost", "mean", "accuracy", "thirds")
    stdout().print(table(result.records, title=title, parts=parts, taught=result.taught))
    say(*footnotes(result.records, result.taught), "", *findings(result))
    say(*(f"Left out: {line}" for line in result.reasons))
    say(f"\nWrote {result.report} in {time.monotonic() - began:.0f} s.")


def _settings(options: Options, flag: str) -> SurveySettings:
    """The settings of a job over all methods."""
    from pore.evaluation.results import SurveySettings

    if options.layer is not None or options.reweight or options.normalize or options.settings:
        raise InputError(
            f"{flag} takes every method as its authors set it up; leave out --layer, --reweight, "
            "--normalize and --set."
        )
    return SurveySettings(
        keeps=tuple(map(budget, options.keep)) if options.keep else SurveySettings.keeps,
        average=options.average,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        timing=options.timing,
        seed=options.seed,
        max_bad=options.max_bad,
    )


def _ask_corrections(
    options: Options, model: Any, processor: Any, samples: Sequence[Sample]
) -> None:
    """Evaluate every correction on every host, and print the results."""
    if options.average:
        raise InputError("--corrections takes --keep as the tokens left at the end, not --average.")
    ask_corrections(
        model,
        processor,
        samples,
        _settings(options, "--corrections"),
        calibration=options.calibration,
        images=options.images,
        guide=_guide(options),
        out=options.out or Path("runs/corrections"),
    )


# -- one method -----------------------------------------------------------------------------------


def _ask_one(
    options: Options,
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    keeps: Sequence[int | float],
) -> None:
    """Ask the unpruned model and a method at every budget, without P and with it; print both."""
    from pore.evaluation.differences import compare
    from pore.evaluation.findings import footnotes, skips
    from pore.evaluation.guided import Guiding
    from pore.evaluation.outcome import records_of
    from pore.evaluation.reweighting import biases_named

    guiding = None
    if _is_guided(options.method):
        other = _guide(options)
        guiding = Guiding(
            *(other or (model, processor)),
            max_new_tokens=options.max_new_tokens,
            itself=other is None,
        )
    some = samples[:_COUNTED]
    biases = biases_named(options.reweight, options.allow or (), model, processor, some)
    pruners = _pruners(options, model, keeps, biases, guiding)
    outcomes = _outcomes(options, model, processor, samples, pruners)
    records = records_of(outcomes)
    written = () if options.out is None else _write(options, model, outcomes)
    print_results(records)
    say(*skips(records), *footnotes(records))
    if biases is not None:
        hosts = {outcome.keep: outcome for outcome in outcomes[1:] if outcome.reweight is None}
        for with_p in outcomes[1:]:
            if with_p.reweight is not None and with_p.keep in hosts:
                say(str(compare(hosts[with_p.keep], with_p, seed=options.seed)))
    if written:
        say(f"Wrote {' and '.join(map(str, written))}.")


def _write(options: Options, model: Any, outcomes: Sequence[Outcome]) -> tuple[Path, ...]:
    """Write the results of all settings so far."""
    from pore.cli.about import command_line
    from pore.evaluation.circumstances import circumstances
    from pore.evaluation.files import Results, write_results
    from pore.evaluation.outcome import questions_of, records_of

    assert options.out is not None
    made = circumstances(model.device, options.seed, command_line())
    return write_results(options.out, Results(made, questions_of(outcomes), records_of(outcomes)))


def _pruners(
    options: Options,
    model: Any,
    keeps: Sequence[int | float],
    biases: Sequence[Correction] | None,
    guiding: Guiding | None,
) -> list[Pruner | None]:
    """None for the unpruned model, then the method at every budget, without P and then with P.

    Without P it is left out if it cannot do without.
    """
    from pore.evaluation.reweighting import reweighted
    from pore.methods.making import make

    pruners: list[Pruner | None] = [None]
    for keep in keeps:
        pruner = make(
            options.method,
            model,
            keep,
            average=options.average,
            texts=options.settings or (),
            guide=guiding,
            layer=options.layer,
            normalize=options.normalize,
        )
        if biases is None or not pruner.always_reweighted:
            pruners.append(pruner)
        if biases is not None:
            pruners.append(reweighted(pruner, biases))
    return pruners


def _outcomes(
    options: Options,
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    pruners: Sequence[Pruner | None],
) -> list[Outcome]:
    """The results of every setting, over the questions that all of them answered."""
    from pore.evaluation.batches import Batches
    from pore.evaluation.outcome import common
    from pore.evaluation.running import evaluate as ask
    from pore.evaluation.running import time_prefill
    from pore.evaluation.work import Work

    batches = Batches(
        model, processor, samples, batch_size=options.batch_size, max_bad=options.max_bad
    )
    outcomes: list[Outcome] = []
    with progress() as told:
        work = Work(len(samples) * len(pruners), told)
        work.start("looking at the samples")
        batches.sift()
        work.start("asking")
        for pruner in pruners:
            outcomes.append(
                ask(
                    model,
                    processor,
                    batches,
                    pruner,
                    max_new_tokens=options.max_new_tokens,
                    progress=work.done(1.0),
                )
            )
            if options.out is not None:  # so that they are kept if a later one fails
                _write(options, model, outcomes)
        outcomes = common(outcomes)
        if options.timing:
            work.start("timing the prefill")
            times = time_prefill(model, batches, pruners, count=1)
            outcomes = [replace(o, prefill_ms=ms) for o, ms in zip(outcomes, times, strict=True)]
    return outcomes
