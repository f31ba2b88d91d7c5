"""The page of a calibration: figures and diagnosis of every stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pore import plotting
from pore._files import write_atomic
from pore._page import Dot, File, First, address, dots, filled, html, joined, part, picture, table
from pore._page.tables import Row
from pore._text import Html, capitalised
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

_WHERE = {
    "first": "first third, at the top",
    "middle": "middle third",
    "last": "last third, at the bottom",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of a calibration.

    Attributes:
        name: What its file is called, without an ending.
        caption: What it shows.
        png: The figure.
        narrow: The same drawn for a phone.
    """

    name: str
    caption: str
    png: bytes
    narrow: bytes

    @classmethod
    def of(cls, name: str, caption: str, draw: Callable[..., Any]) -> Drawing:
        """What a function draws, that takes `narrow`."""
        return cls(name, caption, *(plotting.to_png(draw(narrow=one)) for one in (False, True)))


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
    files: Sequence[File] = (),
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
        files: The files that were written with it.

    Returns:
        The path written.

    Raises:
        OSError: It cannot be written.
    """
    drawn: Sequence[Drawn | None] = biases or [None] * len(measured.stages)
    known: Sequence[Stability | str] = (
        [stable] * len(measured.stages) if isinstance(stable, str) else stable
    )
    stages = list(zip(measured.stages, drawn, diagnoses, known, strict=True))
    first = _first(measured, stages, model, files)
    text = filled(
        "calibration.html",
        f"The position bias of {model}",
        command=command,
        setup=setup,
        first=first.shown(),
        stages=joined(_stage(number, *stage) for number, stage in enumerate(stages, 1)),
    )
    return write_atomic(path, text)


Stage = tuple[Calibration, Drawn | None, Diagnosis | str, Stability | str]


def _first(
    measured: HostCalibration, stages: Sequence[Stage], model: str, files: Sequence[File]
) -> First:
    """The first screen: how much of what is kept P changes, and where that lies."""
    sums, bias, told, _ = stages[0]
    origin = sums.provenance
    found = [_told(stage, len(stages) > 1) for stage in stages]
    number, unit, interval, about = "–", "", "no diagnosis", "Whether P will help cannot be told."
    chart = Html("<p>There is nothing to draw.</p>")
    if not isinstance(told, str):
        chart = _thirds_chart(told)
        about = f"of the tokens kept at {budget_label(told.keep)} are others with P than without."
        if told.changed is None:
            about = "There is no P that can be divided by, so it changes nothing."
        else:
            number, unit = percent(told.changed).split()
            interval = "how sure that is, is not known"
            if told.unsure is not None:
                interval = f"± {percent(told.unsure / 2)}, as other images would have it"
    pair = Html("")
    if isinstance(bias, PositionBias):
        pair = _maps(sums, bias)
    return First(
        heading=f"The position bias of {model}",
        lead=f"The mean attention that {origin.host or 'the host'} ranks visual tokens by, over "
        f"{measured.count} images of {origin.source or 'the data set'}; the curve P that is fitted "
        "to it; and whether dividing by P can be expected to help (PoRe, arXiv 2508.17807).",
        number=number,
        unit=unit,
        interval=interval,
        about=about
        if len(stages) == 1
        else f"{about} This is {_name(sums)}, the first of {len(stages)} stages.",
        chart=chart,
        pair=pair,
        found=[line for lines in found for line in lines],
        note="Every number follows from the sums of the calibration. P describes attention: "
        "whether answers get better was not asked here; the command pore evaluate asks.",
        files=files,
    )


def _told(stage: Stage, several: bool) -> list[str]:
    """What was found of a stage, in sentences."""
    sums, _, told, stable = stage
    before = f"{capitalised(_name(sums))}: " if several else ""
    if isinstance(told, str):
        return [f"{before}No diagnosis: {told}"]
    return [f"{before}{told.advice}", *([] if several else [sureness(told), f"{stable}"])]


def _name(sums: Calibration) -> str:
    return part_read(sums.provenance.layer)


def _maps(sums: Calibration, bias: PositionBias) -> Html:
    """The attention on the image before and after, as a pair."""
    both = plotting.maps(sums.mean_of(bias)[0], bias)
    if both is None:
        return Html("")
    shown = joined(
        html(
            "<figure><figcaption><b>{}</b></figcaption><img src='{}' alt='{}'></figure>",
            *(title, address(png), f"{title}, on the image from its top to its bottom"),
        )
        for title, png in zip(("Mean attention", "Divided by P"), both, strict=True)
    )
    return html(
        "<div class='pair'><p>Where attention goes on the image: bright is more. Without a bias "
        "both would be even.</p><div>{}</div><p class='note'>The top of a map is the top of the "
        "image.</p></div>",
        shown,
    )


def _thirds_chart(found: Diagnosis) -> Html:
    """What is kept in every third of the image, without P and with it."""
    groups = []
    for number, name in enumerate(THIRDS):
        rows = [Dot("without P", 100 * found.before[number], percent(found.before[number]))]
        if found.after is not None:
            after = found.after[number]
            rows.append(Dot("with P", 100 * after, percent(after), own=True))
        groups.append((_WHERE[name], rows))
    caption = (
        f"Where the tokens kept at {budget_label(found.keep)} lie, in reading order: the share in "
        "each third. The dashed line is an even share."
    )
    return dots(groups, caption, line=100 / 3, within=(0.0, 100.0))


def figures(measured: Calibration, bias: Drawn) -> Iterator[Drawing]:
    """The figures of a stage.

    Args:
        measured: The calibration.
        bias: P.

    Yields:
        The figures.
    """
    if isinstance(bias, AnySizeBias):
        assert measured.table is not None
        caption = (
            f"Mean attention over the {bias.over}, for images of every size relative to its own "
            "level, and P, which all sizes share."
        )
        draw = partial(plotting.any_size, measured.table.levels(bias.over), bias)
        yield Drawing.of("any_size", caption, draw)
        return
    mean, error = measured.mean_of(bias)
    if bias.grid is not None:
        caption = "Mean attention on the grid of the image, before and after division by P."
        yield Drawing.of("figure1", caption, partial(plotting.figure1, mean, bias))
    caption = "The same over the raster position, with the fit."
    yield Drawing.of("figure2", caption, partial(plotting.figure2, mean, bias, error))


def _stage(
    number: int,
    measured: Calibration,
    bias: Drawn | None,
    found: Diagnosis | str,
    stable: Stability | str,
) -> Html:
    title = capitalised(_name(measured))
    drawn = joined(
        picture(one.png, one.caption, one.caption, one.narrow)
        for one in (figures(measured, bias) if bias is not None else ())
    )
    if isinstance(found, str):
        return html(
            "<h2 id='stage-{}'>{}</h2><p><b>No diagnosis: {}</b></p>{}", number, title, found, drawn
        )
    return part(
        "stage.html",
        number=number,
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
    draw = partial(plotting.stability, found.agreement, found.images, STABLE)
    caption = "What P of so many images keeps of what P of endlessly many would keep."
    one = Drawing.of("stability", caption, draw)
    return html("<p>{}</p>{}", str(found), picture(one.png, caption, caption, one.narrow))


def _forms(axis: AxisDiagnosis) -> Html:
    over = "" if axis.name == "position" else f" over the {axis.name}"
    rows = []
    for kind in dict.fromkeys((*axis.errors, *axis.refused)):
        error = axis.errors.get(kind)
        cells = (
            name_of(kind),
            "–" if error is None else off(error),
            axis.refused.get(kind, "this P" if kind == axis.kind else ""),
        )
        rows.append(Row(cells, kind == axis.kind))
    rows.append(Row(("a curve without fault, by chance", off(axis.noise), "")))
    fitted = "" if axis.fitted is None else f", P {fold(axis.fitted)}"
    spans = html("<p>The attention{} spans {}{}.</p>", over, fold(axis.span), fitted)
    headings = (f"form{over}", "off by", "remark")
    return html("{}{}", table("Forms of P", headings, [("", rows)], kind="forms"), spans)


def _thirds(found: Diagnosis) -> Html:
    rows = [Row(("without P", *map(percent, found.before)))]
    if found.after is not None:
        rows.append(Row(("with P", *map(percent, found.after)), own=True))
    headings = (budget_label(found.keep), *map(_WHERE.get, THIRDS))
    return table("What is kept, by third of the image", headings, [("", rows)])
