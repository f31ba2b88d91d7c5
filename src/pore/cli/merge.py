"""`pore merge`: one P from the sums that several calibrations measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from pore.cli.options import budgets, form_of_bias, takes
from pore.cli.printing import note, say
from pore.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pore.calibration.host import HostCalibration


@dataclass(frozen=True)
class Options:
    """The options of `pore merge`."""

    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SUMS",
            help="Two or more files of sums, which `pore calibrate` writes beside P: "
            "OUT.calibration.json.",
        ),
    ]
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="File for P; the merged sums go beside it, to OUT.calibration.json."
        ),
    ] = Path("profile.json")
    keep: Annotated[
        str | None,
        typer.Option(
            help="The budget that P will be used with; the verdict is about it. [default: 25%]"
        ),
    ] = None
    kind: AskedKind = "auto"
    mean: AskedMean = "geometric"
    over: AskedOver = None
    heads: AskedHeads = False


@takes(Options)
def merge(options: Options) -> None:
    """Fit one P to what several calibrations measured.

    Each of them measures other samples, with the same model and under the same conditions: on
    machines that share nothing, or on one after the other. The sums are whole numbers, so that they
    are the same in any order, and as if one calibration had measured all of the samples. Files that
    were measured under different conditions, or hold the same sample, are refused.

    Examples:

        pore merge first.calibration.json second.calibration.json --out llava.json

        pore merge parts/*.calibration.json --kind spline --out llava.json
    """
    from pore.corrections.files import save_corrections

    form = form_of_bias(options.kind)
    mean = check_form(form, options.mean, options.over, options.heads)
    (keep,) = budgets([options.keep] if options.keep else None, None)
    sums = options.out.with_name(f"{options.out.stem}.calibration.json")
    if sums.resolve() in [path.resolve() for path in options.sources]:
        raise InputError(
            f"With --out {options.out} the merged sums would overwrite {sums}, which is one of the "
            "files to merge; choose another name."
        )
    merged = _merged(options.sources)
    merged.save(sums)
    say(f"{len(options.sources)} files hold {merged.count} images.\n")
    say_diagnoses(merged, diagnosed(merged, form, mean, options.over, keep), options.heads)
    stable = stability_of(merged, form=form, mean=mean, over=options.over, keep=keep)
    say_stability(merged, stable)
    merged = noted(merged, stable, False)
    biases, _ = fitted(merged, form, mean, options.over, options.heads)
    save_corrections(options.out, biases)
    say(*map(repr, biases))
    note(f"Wrote {options.out}, and the sums to {sums}.")


def _merged(sources: Sequence[Path]) -> HostCalibration:
    """The sums of all files."""
    from pore.calibration.host import HostCalibration

    if len(sources) < 2:
        raise InputError(
            f"There is nothing to merge {sources[0]} with: name two files of sums or more. "
            "`pore plot` draws the sums of one."
        )
    first, *others = sources
    merged = HostCalibration.load(first)
    for path in others:
        more = HostCalibration.load(path)
        try:
            merged = merged.merge(more)
        except CalibrationError as error:
            raise CalibrationError(f"{path} cannot be merged with {first}: {error}") from error
    return merged
