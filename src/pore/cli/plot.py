"""`pore plot`: draw figures of saved results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pore._files import open_regular, write_atomic
from pore.cli.options import form_of_bias, takes
from pore.cli.printing import note
from pore.errors import InputError

if TYPE_CHECKING:
    from pore.calibration.host import HostCalibration
    from pore.calibration.page import Drawn


@dataclass(frozen=True)
class Options:
    """The options of `pore plot`."""

    sources: Annotated[
        list[Path],
        typer.Argument(help="results.json, or calibration.json of `pore calibrate` or the demo."),
    ]
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the figures.")] = Path(
        "figures"
    )
    kind: Annotated[
        str, typer.Option(help="Form of P for a calibration: exponential, spline, ...")
    ] = "exponential"


@takes(Options)
def plot(options: Options) -> None:
    """Draw the figures of saved results.

    A calibration gives figure1.png (mean attention on the image grid, before and after division by
    P) and figure2.png (mean attention over position, with the fit and a confidence band); one of
    images of several sizes gives any_size.png (mean attention over the distance to the text, with
    the fit). Results give accuracy.png (accuracy over FLOPs).

    Examples:

        pore plot runs/demo/calibration.json runs/demo/results.json --out figures

        pore plot profile.calibration.json --kind spline
    """
    from pore import plotting
    from pore.calibration.host import HostCalibration
    from pore.evaluation.files import read_records

    form = form_of_bias(options.kind)
    results = {path: _holds_results(path) for path in dict.fromkeys(options.sources)}
    kinds = Counter("results" if has else "a calibration" for has in results.values())
    for what, count in kinds.items():
        if count > 1:
            raise InputError(
                f"{count} of these files hold {what}, and their figures have the same names: draw "
                "them one by one, each into a folder of its own (--out)."
            )
    for path, has_results in results.items():
        if has_results:
            figure = plotting.accuracy_over_flops(read_records(path))
            drawn = plotting.save(figure, options.out / "accuracy.png")
            note(f"Wrote {drawn}.")
        else:
            measured = HostCalibration.load(path)
            biases = measured.fit_any_size(form) if measured.mixed else measured.fit(form)
            draw_biases(measured, biases, options.out)


def _holds_results(path: Path) -> bool:
    """Whether a file says that it holds results, or is a list, as older versions wrote them.

    Whoever reads it then checks what it gets.
    """
    from pore._saved.parsing import says
    from pore.evaluation.files import RESULTS

    with open_regular(path) as file:
        is_list = file.read(256).lstrip().startswith(b"[")
    return is_list or says(path, RESULTS)


def draw_biases(measured: HostCalibration, biases: Sequence[Drawn], folder: Path) -> None:
    """Draw the figures of every stage of a calibration."""
    from pore.calibration.page import figures

    for stage, bias in zip(measured.stages, biases, strict=True):
        which = f"-layer{bias.provenance.layer}" if len(biases) > 1 else ""
        for one in figures(stage, bias):
            path = write_atomic(folder / f"{one.name}{which}.png", one.png)
            note(f"Wrote {path}.")
