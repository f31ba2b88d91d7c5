"""The demo's report: one HTML file that holds everything it shows and opens without a network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from pore._files import write_atomic
from pore.evaluation import records as tables
from pore.evaluation.outcome import budget_label, label, points

if TYPE_CHECKING:
    from pore.evaluation.demo import Result
    from pore.evaluation.outcome import Difference


@dataclass(frozen=True)
class About:
    """The circumstances of a demo.

    Attributes:
        model: Name of the model.
        command: What was typed.
        calibration: Where the calibration samples come from.
        test: Where the test samples come from.
        setup: Hardware, versions and settings, in words by name.
        choice: Why the layer is what it is.
    """

    model: str
    command: str
    calibration: str
    test: str
    setup: Mapping[str, str]
    choice: str


def write(result: Result, about: About, folder: Path) -> Path:
    """Write `report.html`, whole or not at all.

    Args:
        result: What the demo found.
        about: The circumstances.
        folder: Where the demo's files are, and the report goes.

    Returns:
        The path written.

    Raises:
        OSError: A picture cannot be read, or the report not be written.
    """
    template = Template(
        resources.files("pore").joinpath("templates/report.html").read_text(encoding="utf-8")
    )
    n = result.records[0]["n"]
    text = template.substitute(
        model=escape(about.model),
        summary="\n".join(f"<li>{escape(line)}</li>" for line in facts(result) + verdicts(result)),
        table=_table(result.records),
        differences=_differences(result.differences),
        figure1=_picture(folder / "figure1.png"),
        figure2=_picture(folder / "figure2.png"),
        figure3=_picture(folder / "figure3.png"),
        examples="\n".join(
            f"<figure><img src='{_picture(example.path)}' alt='{escape(example.title)}'>"
            f"<figcaption>{escape(example.title.capitalize())}.</figcaption></figure>"
            for example in result.examples
        ),
        example_keep=escape(budget_label(result.settings.example_keep)),
        bias=escape(_bias(result)),
        choice=escape(about.choice),
        layer=result.settings.layer,
        before=result.settings.layer - 1,
        images=result.calibration.count,
        n=n,
        calibration=escape(about.calibration),
        test=escape(about.test),
        command=escape(about.command),
        seed=result.settings.seed,
        rope_tokens=round(result.rope.parameters["text_tokens"]),
        setup="\n".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in about.setup.items()
        ),
    )
    return write_atomic(folder / "report.html", text)


def facts(result: Result) -> list[str]:
    """What was found before any comparison, in sentences.

    Args:
        result: What the demo found.

    Returns:
        The sentences.
    """
    unpruned = result.records[0]
    return [
        f"Unpruned, the model answers {tables.percent(unpruned['accuracy'])} % of "
        f"{unpruned['n']} questions right.",
        _bias(result),
    ]


def verdicts(result: Result) -> list[str]:
    """What PoRe does for FastV, in sentences that the tests alone decide.

    Args:
        result: What the demo found.

    Returns:
        The sentences.
    """
    own = [d for d in result.differences if _is_pore(d)]
    lines = []
    for verdict, chosen in (
        ("better than plain FastV", [d for d in own if d.paired.clear and d.paired.difference > 0]),
        ("worse than plain FastV", [d for d in own if d.paired.clear and d.paired.difference < 0]),
        ("not clearly different from plain FastV", [d for d in own if not d.paired.clear]),
    ):
        if chosen:
            found = "; ".join(
                f"{budget_label(d.second.keep)}: {points(d.paired.difference)} points {d.interval}"
                for d in chosen
            )
            lines.append(f"FastV + PoRe is {verdict} on the same questions at {found}.")
    return lines


def _is_pore(difference: Difference) -> bool:
    return difference.second.reweight not in (None, "rope")


def _bias(result: Result) -> str:
    bias, growth = result.bias, result.bias.growth
    fitted = f"R² = {bias.r2:.2f}" if bias.r2 is not None else "not fitted"
    if growth >= 1:
        favoured = f"the last visual token over the first by a factor of {growth:.2f}"
    else:
        favoured = f"the first visual token over the last by a factor of {1 / growth:.2f}"
    rate = bias.parameters.get("rate")
    of = "" if rate is None else f", rate b = {rate:+.5f} per token"
    return f"P, fitted to the mean attention, favours {favoured}{of} ({fitted})."


def _picture(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _row(cells: Iterable[str], tag: str = "td", kind: str = "") -> str:
    return f"<tr{kind}>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _table(found: Sequence[Mapping[str, Any]]) -> str:
    kinds = tables.columns(found, "accuracy_by_kind")
    thirds = tables.columns(found, "accuracy_by_third")
    spans = "<tr class='spans'><th colspan='5'></th>"
    if kinds:
        spans += f"<th colspan='{len(kinds)}' class='span'>by kind of question</th>"
    if thirds:
        spans += f"<th colspan='{len(thirds)}' class='span'>by third of the image</th>"
    headings = ("method", "tokens", "GFLOPs", "prefill ms", "accuracy %", *kinds, *thirds)
    lines = [f"<thead>{spans}</tr>{_row(map(escape, headings), 'th')}</thead>"]
    for budget, block in tables.groups(found):
        width = len(headings)
        lines.append(f"<tbody><tr class='budget'><td colspan='{width}'>{escape(budget)}</td></tr>")
        for record in block:
            own = record["reweight"] not in (None, "rope")
            by_kind, by_third = record["accuracy_by_kind"], record["accuracy_by_third"]
            lines.append(
                _row(
                    (
                        escape(label(record["method"], record["reweight"])),
                        tables.tokens(record["tokens_after"]),
                        tables.number(record["flops"], 1e9),
                        tables.number(record["prefill_ms"]),
                        f"<b>{tables.percent(record['accuracy'])}</b> "
                        f"<small>±{tables.interval(record)}</small>",
                        *(tables.share(by_kind, kind) for kind in kinds),
                        *(tables.share(by_third, third) for third in thirds),
                    ),
                    kind=" class='own'" if own else "",
                )
            )
        lines.append("</tbody>")
    return "<table class='results'>" + "\n".join(lines) + "</table>"


def _differences(differences: Sequence[Difference]) -> str:
    headings = ("budget", "method", "difference", "95 % interval", "won", "lost", "McNemar p")
    lines = [f"<thead>{_row(headings, 'th')}</thead><tbody>"]
    for d in differences:
        paired = d.paired
        cells = (
            budget_label(d.second.keep),
            escape(d.second.label),
            f"<b>{points(paired.difference)}</b>" if paired.clear else points(paired.difference),
            d.interval,
            str(paired.gained),
            str(paired.lost),
            f"{paired.p:.2g}",
        )
        lines.append(_row(cells, kind=" class='own'" if _is_pore(d) else ""))
    return "<table class='differences'>" + "\n".join(lines) + "</tbody></table>"
