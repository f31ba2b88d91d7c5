"""The page of a calibration: figures and diagnosis of every stage."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pore import plotting
from pore._files import write_atomic
from pore._page import filled, html, joined, part, picture, row
from pore._text import Html
from pore.bias.any_size import AnySizeBias
from pore.bias.position_bias import PositionBias
from pore.calibration.diagnosis import (
    THIRDS,
    AxisDiagnosis,
    Diagnosis,
    fold,
    name_of,
    off,
    percent,
    sureness,
)
from pore.calibration.fits import part_read
from pore.calibration.host import HostCalibration
from pore.calibration.stability import STABLE, Stability
from pore.calibration.sums import Calibration
from pore.plotting.labels import budget_label

Drawn = PositionBias | AnySizeBias


def write_page(
    path: str | os.PathLike[str],
    measured: HostCalibration,
    biases: Sequence[Drawn] | None,
    diagnoses: Sequence[Diagnosis | str],
    stable: Sequence[Stability] | str,
    *,
    model: str,
    command: str,
    setup: Mapping[str, str],
) -> Path:
    """Write the page of a calibration, whole or not at all.

    Args:
        path: The file.
        measured: The calibration.
        biases: P of every stage; None where there is none that can be divided by.
        diagnoses: Of every stage, the diagnosis or why there is none.
        stable: Of every stage, how many images are enough, or why that is unknown.
        model: The name of the model.
        command: The command line.
        setup: Hardware, versions and settings, in words by name.

    Returns:
        The path written.

    Raises:
        OSError: It cannot be written.
    """
    origin = measured.stages[0].provenance
    drawn: Sequence[Drawn | None] = biases or [None] * len(measured.stages)
    known: Sequence[Stability | str] = (
        [stable] * len(measured.stages) if isinstance(stable, str) else stable
    )
    stages = zip(measured.stages, drawn, diagnoses, known, strict=True)
    text = filled(
        "calibration.html",
        f"The position bias of {model}",
        command=command,
        setup=setup,
        model=model,
        host=origin.host or "the host",
        images=measured.count,
        samples=origin.source or "the data set",
        stages=joined(_stage(*stage) for stage in stages),
    )
    return write_atomic(path, text)


def figures(measured: Calibration, bias: Drawn) -> Iterator[tuple[str, str, bytes]]:
    """The figures of a stage.

    Args:
        measured: The calibration.
        bias: P.

    Yields:
        For each the name of its file, a caption and the PNG.
    """
    if isinstance(bias, AnySizeBias):
        assert measured.table is not None
        figure = plotting.any_size(measured.table.levels(bias.over), bias)
        caption = (
            f"Mean attention over the {bias.over}, for images of every size relative to its own "
            "level, and P, which all sizes share."
        )
        yield "any_size", caption, plotting.to_png(figure)
        return
    mean, error = measured.mean_of(bias)
    if bias.grid is not None:
        caption = "Mean attention on the grid of the image, before and after division by P."
        yield "figure1", caption, plotting.to_png(plotting.figure1(mean, bias))
    caption = "The same over the raster position, with the fit."
    figure = plotting.figure2(mean, bias, error)
    yield "figure2", caption, plotting.to_png(figure)


def _stage(
    measured: Calibration, bias: Drawn | None, found: Diagnosis | str, stable: Stability | str
) -> Html:
    title = part_read(measured.provenance.layer).capitalize()
    drawn = joined(
        html(
            "<figure><img src='{}' alt='{}'><figcaption>{}</figcaption></figure>",
            *(picture(png), caption, caption),
        )
        for _, caption, png in (figures(measured, bias) if bias is not None else ())
    )
    if isinstance(found, str):
        return html("<h2>{}</h2><p><b>No diagnosis: {}</b></p>{}", title, found, drawn)
    return part(
        "stage.html",
        title=title,
        advice=found.advice.replace(" %", "\N{NO-BREAK SPACE}%"),
        figures=drawn,
        forms=joined(map(_forms, found.axes)),
        thirds=_thirds(found),
        sureness=sureness(found),
        enough=_enough(stable),
    )


def _enough(found: Stability | str) -> Html:
    if isinstance(found, str):
        return html("<p>{}</p>", found)
    png = plotting.to_png(plotting.stability(found.agreement, found.images, STABLE))
    caption = "What P of so many images keeps of what P of endlessly many would keep."
    return html(
        "<p>{}</p><figure><img src='{}' alt='{}'><figcaption>{}</figcaption></figure>",
        *(str(found), picture(png), caption, caption),
    )


def _forms(axis: AxisDiagnosis) -> Html:
    over = "" if axis.name == "position" else f" over the {axis.name}"
    lines = [html("<thead>{}</thead><tbody>", row((f"form{over}", "off by", "remark"), "th"))]
    for kind in dict.fromkeys((*axis.errors, *axis.refused)):
        error = axis.errors.get(kind)
        cells = (
            name_of(kind),
            "-" if error is None else off(error),
            axis.refused.get(kind, "this P" if kind == axis.kind else ""),
        )
        lines.append(row(cells, own=kind == axis.kind))
    lines.append(row(("a curve without fault, by chance", off(axis.noise), "")))
    fitted = "" if axis.fitted is None else f", P {fold(axis.fitted)}"
    spans = html("<p>The attention{} spans {}{}.</p>", over, fold(axis.span), fitted)
    return html("<table class='forms'>{}</tbody></table>{}", joined(lines), spans)


def _thirds(found: Diagnosis) -> Html:
    headings = (budget_label(found.keep), *THIRDS)
    lines = [html("<thead>{}</thead><tbody>", row(headings, "th"))]
    lines.append(row(("without P", *map(percent, found.before))))
    if found.after is not None:
        lines.append(row(("with P", *map(percent, found.after)), own=True))
    return html("<table>{}</tbody></table>", joined(lines))
