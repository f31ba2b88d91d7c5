"""How P is fitted to sums of attention: the options, the diagnosis, and what is printed of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from pore._text import capitalised
from pore.cli.printing import say
from pore.errors import InputError, PoreError

if TYPE_CHECKING:
    from pore.calibration.diagnosis import Diagnosis
    from pore.calibration.fits import FitKind, Mean
    from pore.calibration.host import HostCalibration
    from pore.calibration.page import Drawn
    from pore.calibration.stability import Stability
    from pore.corrections.files import Calibrated

AskedKind = Annotated[
    str,
    typer.Option(
        help="Form of P: exponential, exponential+offset, spline or empirical. 'auto' fits the "
        "first three to half of the images, and takes the one that is nearest to the other half."
    ),
]
AskedMean = Annotated[
    str,
    typer.Option(
        help="Mean of the attention that P is fitted to: geometric, or arithmetic as in the paper."
    ),
]
AskedOver = Annotated[
    str | None,
    typer.Option(
        help="For images of different sizes, what P is a function of: distance (to the text), "
        "place (row and column) or raster. [default: a power of the distance, if sizes differ]"
    ),
]
AskedHeads = Annotated[
    bool, typer.Option("--heads", help="A P for every head, divided out before their mean.")
]


def say_diagnoses(measured: HostCalibration, told: Sequence[Diagnosis | str], heads: bool) -> None:
    """Print whether P of every stage will help."""
    from pore.calibration.fits import part_read

    for stage, one in zip(measured.stages, told, strict=True):
        about = capitalised(part_read(stage.provenance.layer))
        say(f"{about}: {f'No diagnosis. {one}' if isinstance(one, str) else one}\n")
    if heads:
        say("This is about the mean over heads; P of every head is not judged by itself.\n")


def stability_of(
    measured: HostCalibration,
    *,
    form: FitKind,
    mean: Mean,
    over: str | None,
    keep: int | float,
    times: Sequence[float] | None = None,
) -> Sequence[Stability] | str:
    """Of every stage how many images are enough for P, or why that cannot be told."""
    from pore.calibration.stability import TIMES

    try:
        if over is not None or measured.mixed:
            over = over or "distance"
            form = "power" if form == "auto" and over == "distance" else form
        return measured.stability(form, keep, mean, over, times or TIMES)  # type: ignore[arg-type] # checked
    except PoreError as error:
        return f"How many images are enough cannot be told. {error}"


def say_stability(measured: HostCalibration, stable: Sequence[Stability] | str) -> None:
    """Print how many images are enough."""
    from pore.calibration.fits import part_read

    if isinstance(stable, str):
        say(f"{stable}\n")
        return
    for stage, one in zip(measured.stages, stable, strict=True):
        say(f"{capitalised(part_read(stage.provenance.layer))}: {one}\n")


def noted(
    measured: HostCalibration, stable: Sequence[Stability] | str, until: bool
) -> HostCalibration:
    """The calibration with how many images are enough in the provenance of every stage."""
    if isinstance(stable, str):
        return measured
    stopped = until and all(one.stable for one in stable)
    stages = zip(measured.stages, stable, strict=True)
    return replace(
        measured,
        stages=tuple(
            replace(stage, provenance=replace(stage.provenance, stability=one.document(stopped)))
            for stage, one in stages
        ),
    )


def diagnosed(
    measured: HostCalibration, form: FitKind, mean: Mean, over: str | None, keep: int | float
) -> list[Diagnosis | str]:
    """Of every stage whether P will help, or why that cannot be told."""
    found: list[Diagnosis | str] = []
    for stage in measured.stages:
        try:
            if over is not None or measured.mixed:
                one = stage.diagnose_any_size(form, over or "distance", keep)  # type: ignore[arg-type] # checked
            else:
                one = stage.diagnose(form, keep, mean)
            found.append(one)
        except PoreError as error:
            found.append(str(error))
    return found


def fitted(
    measured: HostCalibration, form: FitKind, mean: Mean, over: str | None, heads: bool
) -> tuple[Sequence[Calibrated], Sequence[Drawn]]:
    """The corrections that the options ask for, one for every stage, and what is drawn of them."""
    if heads:
        return measured.fit_heads(form, mean), measured.fit(form, mean)  # type: ignore[arg-type] # "auto" was refused
    if over is not None or measured.mixed:
        if form == "auto" and over in (None, "distance"):
            form = "power"
        any_size = measured.fit_any_size(form, over or "distance")  # type: ignore[arg-type] # checked
        return any_size, any_size
    biases = measured.fit(form, mean)
    return biases, biases


def check_form(form: FitKind, mean: str, over: str | None, heads: bool) -> Mean:
    """Refuse what cannot be fitted, before anything is measured."""
    from pore.bias.coordinates import OVER
    from pore.calibration.fits import Mean

    if mean not in get_args(Mean):
        raise InputError(f"--mean is {' or '.join(get_args(Mean))}, not {mean!r}.")

    if over is not None and over not in OVER:
        raise InputError(f"--over is one of {', '.join(OVER)}, not {over!r}.")
    if heads and (over is not None or form == "auto"):
        raise InputError(
            "A P for every head is over the positions of images of one size, and of a kind that "
            "you name: with --heads omit --over, and give --kind, such as spline."
        )
    return mean  # type: ignore[return-value]
