"""The demo's report: one HTML file that holds everything it shows and opens without a network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from pore._files import write_atomic
from pore._text import Html, for_html
from pore.evaluation import records as tables
from pore.plotting.labels import budget_label, label, points

if TYPE_CHECKING:
    from pore.bias.position_bias import PositionBias
    from pore.evaluation.demo import Result
    from pore.evaluation.outcome import Difference
    from pore.evaluation.survey import Result as Survey


BETTER, WORSE = "clearly better than", "clearly worse than"


UNCLEAR = "not clearly different from the one"


@dataclass(frozen=True)
class About:
    """The circumstances of a demo or a survey.

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
    choice: str = ""


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
    n = result.records[0]["n"]
    text = _filled(
        "report.html",
        model=about.model,
        summary=_items(facts(result) + verdicts(result)),
        table=_table(result.records),
        differences=_differences(result.differences),
        figure1=_picture(folder / "figure1.png"),
        figure2=_picture(folder / "figure2.png"),
        figure3=_picture(folder / "figure3.png"),
        examples=_lines(
            _html(
                "<figure><img src='{}' alt='{}'><figcaption>{}.</figcaption></figure>",
                _picture(example.path),
                example.title,
                example.title.capitalize(),
            )
            for example in result.examples
        ),
        example_keep=budget_label(result.settings.example_keep),
        bias=_bias(result),
        choice=about.choice,
        layer=result.settings.layer,
        before=result.settings.layer - 1,
        images=result.calibration.count,
        n=n,
        calibration=about.calibration,
        test=about.test,
        command=about.command,
        seed=result.settings.seed,
        rope_tokens=round(result.rope.parameters["text_tokens"]),
        setup=_setup(about),
    )
    return write_atomic(folder / "report.html", text)


def write_survey(result: Survey, about: About, folder: Path) -> Path:
    """Write `report.html` of a survey of all methods, whole or not at all.

    Args:
        result: What was found.
        about: The circumstances.
        folder: Where the survey's files are, and the report goes.

    Returns:
        The path written.

    Raises:
        OSError: A picture cannot be read, or the report not be written.
    """
    records, tests = result.records, [d for d in result.differences if d.third is None]
    counted = "their mean over the decoder layers" if result.settings.average else "left at the end"
    text = _filled(
        "survey.html",
        model=about.model,
        methods=len({record["method"] for record in records[1:]}),
        n=records[0]["n"],
        layers=result.layers,
        summary=_items(findings(result)),
        chance=f"Were PoRe without any effect, about {len(tests) / 20:.1f} of its {len(tests)} "
        "comparisons would be clear all the same; p is not corrected for that.",
        accuracy=_picture(folder / "accuracy.png"),
        test=about.test,
        budgets=f"Budgets are visual tokens of {result.visual}, {counted}.",
        table=_table(records, mean=True, taught=result.taught),
        notes=_lines(_html("<p><small>{}</small></p>", line) for line in notes(result)),
        seed=result.settings.seed,
        pore=_picture(folder / "pore.png"),
        differences=_differences(result.differences, thirds=True, taught=result.taught),
        images=max(b.provenance.samples or 0 for found in result.biases.values() for b in found),
        calibration=about.calibration,
        kind=result.settings.kind,
        biases=_biases(result.biases),
        left_out=_left_out(result),
        command=about.command,
        setup=_setup(about),
    )
    return write_atomic(folder / "report.html", text)


def findings(result: Survey) -> list[str]:
    """What a survey found, in sentences that the numbers alone decide.

    Args:
        result: What was found.

    Returns:
        The sentences.
    """
    unpruned, *pruned = result.records
    lines = [
        f"Unpruned, the model answers {tables.percent(unpruned['accuracy'])} % of "
        f"{unpruned['n']} questions right.",
        *tables.skips(result.records),
    ]
    for budget, block in tables.groups(pruned):
        best = sorted(block, key=lambda record: -float(record["accuracy"]))[:3]
        named = ", ".join(
            f"{label(r['method'], r['reweight'])}{tables.marks(r, result.taught)} "
            f"{tables.percent(r['accuracy'])} {tables.interval(r)}"
            for r in best
        )
        lines.append(f"{budget[0].upper()}{budget[1:]}: most right answers (%) have {named}.")
    whole = [d for d in result.differences if d.third is None]
    for verdict, chosen in _judged(whole):
        hosts: dict[str, list[str]] = {}
        for d in chosen:
            name = d.second.method + tables.marks(d.record(), result.taught)
            by = "" if verdict == UNCLEAR else f" {points(d.paired.difference)} points {d.interval}"
            hosts.setdefault(name, []).append(f"{budget_label(d.second.keep)}{by}")
        found = "; ".join(f"{name}: {', '.join(budgets)}" for name, budgets in hosts.items())
        lines.append(f"With PoRe a host is {verdict} without, on the same questions: {found}.")
    return lines


def notes(result: Survey) -> list[str]:
    """Footnotes to the marks in the table.

    Args:
        result: What was found.

    Returns:
        A sentence for every mark that occurs.
    """
    return footnotes(result.records, result.taught)


def footnotes(records: Sequence[Mapping[str, Any]], taught: int | None = None) -> list[str]:
    """Footnotes to the marks in a table.

    Args:
        records: The records of the table, that of the unpruned model first.
        taught: As in `records.marks`.

    Returns:
        A sentence for every mark that occurs.
    """
    marked = "".join(tables.marks(record, taught) for record in records)
    lines = []
    if tables.TAUGHT in marked:
        lines.append(
            f"{tables.TAUGHT} Looks at decoder layer {taught} or above. Attention of layer "
            f"{taught} was supervised while this model was trained, so the method sees "
            "attention that is better than a real model's (docs/embedded-model.md)."
        )
    if tables.EXPERIMENTAL in marked:
        lines.append(
            f"{tables.EXPERIMENTAL} Built from the paper's description, with no code to compare "
            "with."
        )
    for name in dict.fromkeys(record["guide"] for record in records if record["guide"]):
        lines.append(f"{tables.GUIDED} {_guided(name, records[0]['flops'])}")
    return lines


def _guided(name: str, unpruned: float | None) -> str:
    """What guidance costs, which no number tells."""
    uncounted = "first, unpruned. That is in none of the FLOPs, times and tokens here"
    if name != "itself":
        return f"Guided by {name}, which answers every question {uncounted}."
    alone = "" if unpruned is None else f" of {tables.number(unpruned, 1e9)} GFLOPs"
    return (
        f"Guided by the model itself, which answers every question {uncounted}: so guided, the "
        f"method costs a whole prefill{alone} more and saves nothing. It shows what its ranking "
        "is worth."
    )


def _judged(differences: Sequence[Difference]) -> list[tuple[str, list[Difference]]]:
    """Differences by what the test says of them, without the kinds that do not occur."""
    kinds = (
        (BETTER, [d for d in differences if d.paired.clear and d.paired.difference > 0]),
        (WORSE, [d for d in differences if d.paired.clear and d.paired.difference < 0]),
        (UNCLEAR, [d for d in differences if not d.paired.clear]),
    )
    return [(verdict, chosen) for verdict, chosen in kinds if chosen]


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
        *tables.skips(result.records),
        _bias(result),
    ]


def verdicts(result: Result) -> list[str]:
    """What PoRe does for FastV, in sentences that the tests alone decide.

    Args:
        result: What the demo found.

    Returns:
        The sentences.
    """
    words = {
        BETTER: "better than plain FastV",
        WORSE: "worse than plain FastV",
        UNCLEAR: "not clearly different from plain FastV",
    }
    lines = []
    for verdict, chosen in _judged([d for d in result.differences if _is_pore(d)]):
        found = "; ".join(
            f"{budget_label(d.second.keep)}: {points(d.paired.difference)} points {d.interval}"
            for d in chosen
        )
        lines.append(f"FastV + PoRe is {words[verdict]} on the same questions at {found}.")
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


def _resource(name: str) -> str:
    return resources.files("pore").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _filled(template: str, **values: object) -> str:
    """A page; values that are no `Html` yet are escaped, whatever they are."""
    shown = {name: for_html(value) for name, value in values.items()}
    style = _resource("style.css")
    return Template(_resource(template)).substitute(shown, style=style)


def _html(pattern: str, *values: object) -> Html:
    """HTML with text in its braces, escaped unless it is `Html`."""
    return Html(pattern.format(*map(for_html, values)))


def _lines(parts: Iterable[Html]) -> Html:
    return Html("\n".join(parts))


def _items(lines: Iterable[str]) -> Html:
    return _lines(_html("<li>{}</li>", line) for line in lines)


def _setup(about: About) -> Html:
    return _lines(
        _html("<tr><th>{}</th><td>{}</td></tr>", name, value) for name, value in about.setup.items()
    )


def _picture(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _row(cells: Iterable[object], tag: str = "td", own: bool = False) -> Html:
    inner = Html("".join(_html(f"<{tag}>{{}}</{tag}>", cell) for cell in cells))
    return _html("<tr class='own'>{}</tr>" if own else "<tr>{}</tr>", inner)


def _table(
    found: Sequence[Mapping[str, Any]], *, mean: bool = False, taught: int | None = None
) -> Html:
    kinds = tables.columns(found, "accuracy_by_kind")
    thirds = tables.columns(found, "accuracy_by_third")
    spans = f"<tr class='spans'><th colspan='{5 + mean}'></th>"
    if kinds:
        spans += f"<th colspan='{len(kinds)}' class='span'>by kind of question</th>"
    if thirds:
        spans += f"<th colspan='{len(thirds)}' class='span'>by third of the image</th>"
    costs = ("tokens", *(["mean"] if mean else []), "GFLOPs", "prefill ms")
    headings = ("method", *costs, "accuracy %", *kinds, *thirds)
    lines = [f"<thead>{spans}</tr>{_row(headings, 'th')}</thead>"]
    for budget, block in tables.groups(found):
        opening = f"<tbody><tr class='budget'><td colspan='{len(headings)}'>"
        lines.append(_html(opening + "{}</td></tr>", budget))
        for record in block:
            own = record["reweight"] not in (None, "rope")
            by_kind, by_third = record["accuracy_by_kind"], record["accuracy_by_third"]
            lines.append(
                _row(
                    (
                        label(record["method"], record["reweight"]) + tables.marks(record, taught),
                        tables.tokens(record["tokens_after"]),
                        *([tables.number(record["mean_tokens"])] if mean else []),
                        tables.number(record["flops"], 1e9),
                        tables.number(record["prefill_ms"]),
                        _html(
                            "<b>{}</b> <small>{}</small>",
                            tables.percent(record["accuracy"]),
                            tables.interval(record),
                        ),
                        *(tables.share(by_kind, kind) for kind in kinds),
                        *(tables.share(by_third, third) for third in thirds),
                    ),
                    own=own,
                )
            )
        lines.append("</tbody>")
    return Html("<table class='results'>" + "\n".join(lines) + "</table>")


def _differences(
    differences: Sequence[Difference], *, thirds: bool = False, taught: int | None = None
) -> Html:
    which = ("questions",) if thirds else ()
    headings = ("budget", "method", *which, "difference", "95 % interval", "won", "lost", "p")
    lines = [f"<thead>{_row(headings, 'th')}</thead><tbody>"]
    for d in differences:
        paired = d.paired
        cells = (
            budget_label(d.second.keep),
            d.second.label + tables.marks(d.record(), taught),
            *([d.third or "all"] if thirds else ()),
            _html("<b>{}</b>" if paired.clear else "{}", points(paired.difference)),
            d.interval,
            str(paired.gained),
            str(paired.lost),
            f"{paired.p:.2g}",
        )
        lines.append(_row(cells, own=d.third is None if thirds else _is_pore(d)))
    return Html("<table class='differences'>" + "\n".join(lines) + "</tbody></table>")


def _biases(biases: Mapping[str, Sequence[PositionBias]]) -> Html:
    headings = ("host", "layer looked at", "what is averaged", "form", "growth", "R²")
    lines = [f"<thead>{_row(headings, 'th')}</thead><tbody>"]
    for found in biases.values():
        for bias in found:
            origin = bias.provenance
            cells = (
                origin.host or "?",
                "all of the guide" if origin.layer is None else str(origin.layer - 1),
                origin.normalize or "?",
                bias.kind,
                f"{bias.growth:.3g}",
                "-" if bias.r2 is None else f"{bias.r2:.2f}",
            )
            lines.append(_row(cells))
    return Html("<table>" + "\n".join(lines) + "</tbody></table>")


def _left_out(result: Survey) -> Html:
    if not result.left_out:
        return Html("<p>Nothing: every method that is installed was asked at every budget.</p>")
    return _html("<ul>{}</ul>", _items(result.reasons))
