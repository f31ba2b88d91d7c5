"""`pore calibrate`: measure, fit and save P."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from os.path import relpath
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore.cli.checks import (
    check_drawing,
    check_file,
    check_folder,
    check_method,
    check_samples,
)
from pore.cli.fitting import (
    AskedHeads,
    AskedKind,
    AskedMean,
    AskedOver,
    check_form,
    diagnosed,
    fitted,
    noted,
    say_diagnoses,
    say_stability,
    stability_of,
)
from pore.cli.options import (
    Batch,
    Columns,
    Layer,
    Limit,
    Loading,
    Model,
    Normalize,
    Questions,
    Samples,
    Set,
    Split,
    budgets,
    columns,
    form_of_bias,
    method_of,
    takes,
)
from pore.cli.plot import draw_biases
from pore.cli.printing import note, say
from pore.errors import InputError, PoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pore._processes import Processes
    from pore.calibration.host import HostCalibration
    from pore.calibration.page import Drawn
    from pore.calibration.stability import Stability


@dataclass(frozen=True)
class Options(Loading):
    """The options of `pore calibrate`."""

    out: Annotated[Path, typer.Option("--out", "-o", help="File for P.")] = Path("profile.json")
    model: Model = "embedded"
    samples: Samples = None
    questions: Questions = None
    split: Split = "train"
    columns: Columns = None
    limit: Limit = None
    method: Annotated[
        str,
        typer.Option(help="Method that P is for; `pore methods` shows which methods take a P."),
    ] = "FastV"
    keep: Annotated[
        str | None,
        typer.Option(
            help="The budget that P will be used with; the verdict is about it. What is measured "
            "depends on it only if it decides which layers the method reads. [default: 25%]"
        ),
    ] = None
    layer: Layer = None
    normalize: Normalize = None
    settings: Set = None
    kind: AskedKind = "auto"
    mean: AskedMean = "geometric"
    over: AskedOver = None
    heads: AskedHeads = False
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="File for the sums, to resume from. [default: OUT.calibration.json]"),
    ] = None
    until_stable: Annotated[
        bool,
        typer.Option(
            "--until-stable",
            help="Stop once more samples would hardly change what is kept: 98 % of it is the same "
            "in 19 of 20 bootstrap draws.",
        ),
    ] = False
    max_bad: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Skip samples that cannot be read, up to this share of all; more of them stop "
            "the run.",
        ),
    ] = 0.01
    figures: Annotated[
        Path | None,
        typer.Option(
            help="Folder for figure1.png and figure2.png, or any_size.png of a P for any size."
        ),
    ] = None
    page: Annotated[
        Path | None,
        typer.Option(help="HTML file that shows what was measured, and whether P will help."),
    ] = None
    batch_size: Batch = 8
    engine: Annotated[
        str,
        typer.Option(
            help="torch: this process, or those of torchrun; ray: actors on this machine or on the "
            "cluster that RAY_ADDRESS names."
        ),
    ] = "torch"
    actors: Annotated[
        int | None,
        typer.Option(min=1, help="Actors of --engine ray. [default: as many as GPUs, or one]"),
    ] = None


def _sums(options: Options) -> Path:
    """The file for the sums."""
    return options.checkpoint or options.out.with_name(f"{options.out.stem}.calibration.json")


def _check(options: Options) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    from pore.methods.registry import method_named

    if options.engine not in ("torch", "ray"):
        raise InputError(f"--engine is torch or ray, not {options.engine!r}.")
    if options.actors is not None and options.engine != "ray":
        raise InputError("--actors is for --engine ray.")
    check_form(form_of_bias(options.kind), options.mean, options.over, options.heads)
    budgets([options.keep] if options.keep else None, options.settings)
    check_file(options.out, "--out")
    check_file(options.page, "--page")
    check_file(_sums(options), "--checkpoint")
    check_folder(options.figures, "--figures")
    for option, drawn in (("--page", options.page), ("--figures", options.figures)):
        if drawn is not None:
            check_drawing(option)
    how = {"questions": options.questions, "split": options.split, "answer": None}
    check_samples(options.samples, "--samples", **{**how, **columns(options.columns)})
    check_method(options.method, options.settings)
    if not method_named(options.method).reweightable:
        raise InputError(
            f"--method {options.method}: it does not rank by the attention between text and image, "
            "so there is no P to measure for it; `pore methods` lists the methods that take one."
        )


@takes(Options, check=_check, config=True)
def calibrate(options: Options) -> None:
    """Measure a model's position bias, fit P and save it.

    A method that ranks by attention at several layers gets one P for each, all in one file. Only
    the vision tower runs, and the decoder up to the last layer whose attention is read. If it is
    interrupted, the same command resumes where it stopped. Under torchrun the processes share the
    samples, and P is that of a single process.

    Says whether to divide by P, and why; --page shows the figures and all the numbers.

    Examples:

        pore calibrate --out profile.json --page profile.html

        pore calibrate --method PyramidDrop --out pyramid.json

        pore calibrate -m llava-hf/llava-1.5-7b-hf -s photos --questions ask.txt -o llava.json

        pore calibrate -s owner/name --split train --columns image=picture,question=query

        torchrun --nproc_per_node 8 -m pore calibrate -m llava-hf/llava-1.5-7b-hf -s asked.jsonl
    """
    from pore._page import File
    from pore._processes import launched
    from pore.calibration.page import write_page
    from pore.cli.about import command_line, name_of, setup_of
    from pore.corrections.files import save_corrections

    out = options.out
    sums = _sums(options)
    with launched() as processes:
        form = form_of_bias(options.kind)
        mean = check_form(form, options.mean, options.over, options.heads)
        (keep,) = budgets([options.keep] if options.keep else None, options.settings)
        enough = partial(stability_of, form=form, mean=mean, over=options.over, keep=keep)
        measured, model = measure(options, processes, keep, sums, enough)
    if not processes.first:
        return
    told = diagnosed(measured, form, mean, options.over, keep)
    say_diagnoses(measured, told, options.heads)
    stable = enough(measured)
    say_stability(measured, stable)
    measured = noted(measured, stable, options.until_stable)

    def show(drawn: Sequence[Drawn] | None) -> None:
        if options.page is not None:
            about = {"model": name_of(options.model), "command": command_line()}
            shared = {"processes": f"{processes.size} processes"} if processes.size > 1 else {}
            setup = setup_of(model) | shared
            beside = {sums: "the sums, from which the same command goes on"}
            if drawn is not None:
                beside = {out: "P, to use with --reweight"} | beside
            folder = options.page.parent
            files = [File(relpath(path, folder), said) for path, said in beside.items()]
            write_page(
                options.page, measured, drawn, told, stable, **about, setup=setup, files=files
            )
            note(f"Wrote {options.page}.")

    try:
        biases, drawn = fitted(measured, form, mean, options.over, options.heads)
    except PoreError:
        show(None)  # which says why there is no P
        raise
    save_corrections(out, biases)
    say(*map(repr, biases))
    note(f"Wrote {out}, and the sums to {sums}.")
    show(drawn)
    if options.figures is not None:
        draw_biases(measured, drawn, options.figures)


def measure(
    options: Options,
    processes: Processes,
    keep: int | float,
    checkpoint: Path,
    enough: Callable[..., Sequence[Stability] | str],
) -> tuple[HostCalibration, Any]:
    """The sums over the samples that the options name, for the host that they name, and the model.

    Args:
        options: The options.
        processes: Those that share the samples.
        keep: The host's budget.
        checkpoint: The file of the sums.
        enough: Returns how many images are enough for what was measured so far.
    """
    from pore._processes import device_of
    from pore.calibration.actors import Actors, connected
    from pore.calibration.calibrating import calibrate
    from pore.data.loading import load_model
    from pore.data.sources import load_samples, scenes_for

    actors = None
    if options.engine == "ray":
        connected()
        actors = Actors(partial(load_model, options.model, **options.how), options.actors)
    # Beside actors, this process only needs to know the model.
    device = "cpu" if actors is not None else device_of(options.device)
    how = {**options.how, "device": device}
    if actors is not None:  # each of which spreads its own model
        how["device_map"] = None
    model, processor = load_model(options.model, **how)
    source = options.samples or scenes_for(model, "calibration")
    samples = load_samples(
        source,
        questions=options.questions,
        limit=options.limit,
        split=options.split,
        stream=True,
        by_ray=actors is not None,
        **{"answer": None, **columns(options.columns)},
    )
    host = method_of(options, model, keep)

    def until(measured: HostCalibration) -> bool:
        stages = enough(measured, times=[1.0])
        return not isinstance(stages, str) and all(stage.stable for stage in stages)

    measured = calibrate(
        model,
        processor,
        samples,
        host=host,
        batch_size=options.batch_size,
        checkpoint=checkpoint,
        max_bad=options.max_bad,
        source=source,
        heads=options.heads,
        distributed=processes.size > 1,
        until=until if options.until_stable else None,
        actors=actors,
    )
    return measured, model
