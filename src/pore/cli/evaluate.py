"""`pore evaluate`: ask questions with known answers, under one method or under all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore._progress import progress
from pore.cli.about import about
from pore.cli.asking import ask_one, is_guided
from pore.cli.checks import (
    check_drawing,
    check_folder,
    check_method,
    check_reweight,
    check_samples,
)
from pore.cli.comparing import ask_corrections
from pore.cli.effects import check_effects, check_lists
from pore.cli.evaluate_options import Options
from pore.cli.options import budget, budgets, columns, metric_of, takes
from pore.cli.printing import headline, note, say, stdout
from pore.cli.sweeping import (
    asked_of,
    asks_samples,
    check_sweep,
    is_sweep,
    sweep_methods,
    warnings_of,
)
from pore.cli.verbosity import CHOSEN
from pore.errors import InputError

if TYPE_CHECKING:
    from pore._processes import Processes
    from pore.data.samples import Sample
    from pore.evaluation.results import SurveySettings

# How many questions --all asks without --limit.
_ASKED_OF_ALL = 700


def _check(options: Options) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    jobs = {"--all": options.every, "--corrections": options.corrections}
    jobs["--tasks or --methods"] = is_sweep(options)
    asked = [name for name, wanted in jobs.items() if wanted]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are two jobs; give one of them at a time.")
    if options.guide is not None and not asked and not is_guided(options.method):
        raise InputError(
            f"--guide is for --all and for --method SGL, not for {options.method}; leave it out."
        )
    several = options.every or options.corrections or is_sweep(options)
    if several:
        check_lists(options)
        _settings(options, asked[0].split()[-1], reweight=is_sweep(options))
    else:
        budgets(options.keep, options.settings)
        check_method(options.method, options.settings)
    if options.corrections and options.average:
        raise InputError("--corrections takes --keep as the tokens left at the end, not --average.")
    metric_of(options)
    names, wanted = asked_of(options) if is_sweep(options) else (None, [])
    check_effects(options, CHOSEN.given, names, wanted, asks_samples(options))
    check_folder(options.out, "--out")
    if options.every or options.corrections:
        check_drawing(asked[0])
    check_reweight(options.reweight)
    how = {"questions": options.questions, "split": options.split}
    check_samples(options.samples, "--samples", **how, **columns(options.columns))
    check_samples(options.calibration if several else None, "--calibration")
    if is_sweep(options):
        check_sweep(options)  # last, as it may look up tasks of lmms-eval, which takes seconds


@takes(Options, check=_check, config=True)
def evaluate(options: Options) -> None:
    """Ask questions with known answers, with and without pruning.

    With --reweight, every budget is run without P and with it, and the two are compared question
    by question. With --all, every method is set up as by its authors and answers the same 700
    questions (--limit); methods that rank by attention also run with P; and a report is written.
    If it is interrupted, the same command resumes where it stopped. With --corrections, every
    correction runs on every such method; with a larger --limit the same command asks only the
    further questions.

    With --tasks and --methods, every method at every budget is run on benchmarks of lmms-eval and
    on one's own questions (`--tasks samples`), with one load of the model, and the table is written
    as a page, JSON, CSV and LaTeX. P is measured on --calibration, or taken from --reweight. Killed
    at any point, the same command resumes at the cell where it stopped. Under torchrun the
    processes share every cell.

    Examples:

        pore evaluate --keep 25% --keep 10% --reweight profile.json

        pore evaluate --all --limit 2100 --out runs/all

        pore evaluate --corrections -s embedded:fresh --limit 210 --keep 32 --keep 16

        pore evaluate --tasks samples,pore_embedded --methods fastv,pore --keep 36,16 --limit 70

        torchrun --nproc_per_node 8 -m pore evaluate --tasks gqa,pope --methods fastv,random

        pore evaluate --method SGL -m llava-hf/llava-1.5-13b-hf --guide llava-hf/llava-1.5-7b-hf

        pore evaluate -m llava-hf/llava-1.5-7b-hf -s vqa.jsonl --keep 128 --reweight llava.json
    """
    from pore._processes import device_of, launched

    with launched() as processes:
        if processes.size > 1 and not is_sweep(options):
            raise InputError(
                "The processes of torchrun share a sweep (--tasks, --methods); any other "
                "evaluation runs in one process."
            )
        _evaluate(replace(options, device=device_of(options.device)), processes)


def _evaluate(options: Options, processes: Processes) -> None:
    from pore.data.loading import load_model
    from pore.data.sources import load_samples, scenes_for

    every = options.every or options.corrections
    keeps = [] if is_sweep(options) else budgets(options.keep, options.settings)
    if is_sweep(options) and processes.first:
        note(*warnings_of(options))
    # What is wrong with the samples is said before gigabytes are loaded.
    limit = _ASKED_OF_ALL if every and options.limit is None else options.limit
    samples = _samples(options, limit) if options.samples else None
    if options.calibration:
        load_samples(options.calibration, limit=options.images)
    model, processor = load_model(options.model, **options.how)
    options = replace(
        options,
        samples=options.samples or scenes_for(model, "test"),
        calibration=options.calibration or scenes_for(model, "calibration"),
    )
    if samples is None and asks_samples(options):
        samples = _samples(options, limit)
    samples = samples or []
    if is_sweep(options):
        settings = _settings(options, "--methods", reweight=True)
        sweep_methods(options, model, processor, samples, settings, _guide(options), processes)
        return
    if options.every:
        _ask_all(options, model, processor, samples)
    elif options.corrections:
        _ask_corrections(options, model, processor, samples)
    else:
        guide = _guide(options) if is_guided(options.method) else None
        ask_one(options, model, processor, samples, keeps, guide)


def _samples(options: Options, limit: int | None) -> list[Sample]:
    """The questions, which --metric must be able to score."""
    from pore.data.sources import load_samples

    found = list(
        load_samples(
            str(options.samples),
            questions=options.questions,
            limit=limit,
            split=options.split,
            **columns(options.columns),
        )
    )
    faults = [metric_of(options).fault(sample) for sample in found]
    if found and all(faults):
        raise InputError(
            f"None of the {len(found)} samples of {options.samples} can be scored. {faults[0]} "
            "Name what holds the answers with --columns answer=NAME, or give another --metric."
        )
    return found


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
    from pore.evaluation.tables import columns, table

    settings = _settings(options, "--all")
    calibration = list(load_samples(str(options.calibration), limit=options.images))
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
                calibration=str(options.calibration),
                test=str(options.samples),
                seed=options.seed,
            ),
            guide=guide,
            progress=told,
        )
    parts = {"": ("cost", "mean", "accuracy"), ", by third of the image": ("third",)}
    if columns(result.records, "downsample"):
        parts[", by what Downsample gets at the same budget"] = ("downsample",)
    for by, shown in parts.items():
        say(f"{headline(result.records)} in % with 95 % interval{by}", style="italic")
        stdout().print(table(result.records, parts=shown, taught=result.taught))
    say(*footnotes(result.records, result.taught), "", *findings(result))
    say(*(f"Left out: {line}" for line in result.reasons))
    note(f"\nWrote {result.report} in {time.monotonic() - began:.0f} s.")
    if not result.outcomes[1:]:
        raise InputError("No method could be asked; see why they were left out.")


def _settings(options: Options, flag: str, *, reweight: bool = False) -> SurveySettings:
    """The settings of a job over several methods; some take P from a file."""
    from pore.evaluation.results import SurveySettings
    from pore.evaluation.wanted import texts

    refused = {
        "--layer": options.layer is not None,
        "--reweight": bool(options.reweight) and not reweight,
        "--normalize": options.normalize,
        "--set": options.settings,
    }
    if any(refused.values()):
        names = [name for name in refused if not (reweight and name == "--reweight")]
        raise InputError(
            f"{flag} takes every method as its authors set it up; leave out "
            f"{', '.join(names[:-1])} and {names[-1]}."
        )
    keeps = tuple(map(budget, texts(options.keep or ())))
    return SurveySettings(
        keeps=keeps or SurveySettings.keeps,
        average=options.average,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        timing=options.timing,
        seed=options.seed,
        max_bad=options.max_bad,
        metric=metric_of(options),
    )


def _ask_corrections(
    options: Options, model: Any, processor: Any, samples: Sequence[Sample]
) -> None:
    """Evaluate every correction on every host, and print the results."""
    ask_corrections(
        model,
        processor,
        samples,
        _settings(options, "--corrections"),
        name=options.model,
        source=str(options.samples),
        calibration=str(options.calibration),
        images=options.images,
        guide=_guide(options),
        out=options.out or Path("runs/corrections"),
    )
