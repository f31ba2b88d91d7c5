"""Reports of the demo and of the survey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pore._files import write_atomic
from pore._numbers import interval, number, p_value, percent, points, tokens
from pore._page import filled, html, items, joined, picture, row
from pore._text import Html
from pore.bias.any_size import AnySizeBias
from pore.calibration.page import Drawn
from pore.evaluation import tables
from pore.evaluation.differences import Difference
from pore.evaluation.findings import bias_found, facts, findings, footnotes, is_pore, verdicts
from pore.evaluation.records import Record
from pore.evaluation.results import About, DemoResult, Figure, SurveyResult
from pore.evaluation.statistics import holm
from pore.methods.downsample import Downsample
from pore.plotting.labels import budget_label, label, marks


def write_demo(result: DemoResult, about: About, folder: Path) -> Path:
    """Write `report.html` of the demo, whole or not at all.

    Args:
        result: The result of the demo.
        about: The circumstances of the run.
        folder: Where the demo's files are, and the report goes.

    Returns:
        The path written.

    Raises:
        OSError: A picture cannot be read, or the report not be written.
    """
    n = result.records[0]["n"]
    text = _filled(
        "demo.html",
        f"PoRe on {about.model}",
        about,
        summary=items(facts(result) + verdicts(result)),
        table=_table(result.records),
        differences=_differences(result.differences),
        figures=joined(_figure(each) for each in result.figures),
        over_flops=_over_flops(
            folder / "figure3.png",
            result.records,
            "Accuracy over the cost of the prefill; methods of equal cost are drawn side by side.",
            narrow=True,
        ),
        examples=joined(
            html(
                "<figure class='many'>{}<figcaption>{}: {}</figcaption></figure>",
                joined(
                    html("<img src='{}' alt='{}'>", _picture(path), example.title)
                    for path in example.paths
                ),
                example.title.capitalize(),
                example.said,
            )
            for example in result.examples
        ),
        example_keep=budget_label(result.settings.example_keep),
        fit=_fit(result),
        bias=bias_found(result),
        baselines=_baselines(result),
        choice=about.choice,
        layer=result.settings.layer,
        before=result.settings.layer - 1,
        images=result.calibration.count,
        n=n,
        seed=result.settings.seed,
    )
    return write_atomic(folder / "report.html", text)


def _over_flops(path: Path, records: Sequence[Record], caption: str, narrow: bool = False) -> Html:
    """The figure of accuracy over FLOPs, or why there is none."""
    if all(record["flops"] is None for record in records):
        return Html("<p>The FLOPs of this model are not known: there is no figure over them.</p>")
    return html(
        "<figure{}><img src='{}' alt='Accuracy over FLOPs'><figcaption>{}</figcaption></figure>",
        Html(" class='narrow'" if narrow else ""),
        _picture(path),
        caption,
    )


def _figure(figure: Figure) -> Html:
    shown = (_picture(figure.path), figure.caption, figure.caption)
    return html("<figure><img src='{}' alt='{}'><figcaption>{}</figcaption></figure>", *shown)


def _fit(result: DemoResult) -> str:
    """How P was fitted."""
    if isinstance(result.bias, AnySizeBias):
        return (
            "Images of this model have as many visual tokens as their size asks for, so that P is "
            "a function of the distance between a visual token and the last token of its prompt: "
            "a power of it, fitted to the geometric mean of the attention at every distance, with "
            "a factor of its own for images of every size."
        )
    return "P is fitted to the mean by least squares."


def _baselines(result: DemoResult) -> Html:
    """What the baselines do, those that were not left out."""
    lines = []
    if result.rope is not None:
        tokens = getattr(result.rope, "parameters", {}).get("text_tokens")
        where = (
            "read at the distance of every token"
            if tokens is None
            else f"for {round(tokens)} text tokens after the image (the median of the calibration "
            "set)"
        )
        lines.append(
            html(
                "<em>FastV + RoPE prior</em> divides by the data-free prior of SparseVLM+ instead, "
                "{}.",
                where,
            )
        )
    lines.append(Html("<em>Random</em> draws tokens uniformly."))
    if Downsample.name not in result.left_out:
        lines.append(
            Html(
                "<em>Downsample</em> averages the grid of embeddings before the decoder; where the "
                "budget does not fit a grid well, an image gets a few tokens more."
            )
        )
    return joined(lines)


def write_survey(result: SurveyResult, about: About, folder: Path) -> Path:
    """Write `report.html` of a survey of all methods, whole or not at all.

    Args:
        result: The result of the survey.
        about: The circumstances of the run.
        folder: Where the survey's files are, and the report goes.

    Returns:
        The path written.

    Raises:
        OSError: A picture cannot be read, or the report not be written.
    """
    records, tests = result.records, [d for d in result.differences if d.third is None]
    counted = "their mean over the decoder layers" if result.settings.average else "left at the end"
    budgets = "Budgets are visual tokens"
    if result.sizes.any_size:
        budgets += ", or the share of each image's visual tokens,"
    text = _filled(
        "survey.html",
        f"Visual token pruning on {about.model}",
        about,
        methods=len({record["method"] for record in records[1:]}),
        n=records[0]["n"],
        layers=result.layers,
        summary=items(findings(result)),
        chance=f"If PoRe had no effect at all, about {len(tests) / 20:.1f} of its {len(tests)} "
        "comparisons would still be clear, by chance: p is not corrected for that, p (Holm) is.",
        accuracy=_over_flops(
            folder / "accuracy.png",
            records,
            "Accuracy over the cost of the prefill, in three panels by where a method first drops "
            "tokens; the methods of the other panels are pale. An open marker is the same method "
            "ranking by A / P. Marks are explained under the table.",
        ),
        budgets=f"{budgets} of {result.sizes}, {counted}.",
        table=_table(records, mean=True, taught=result.taught),
        footnotes=joined(
            html("<p><small>{}</small></p>", line) for line in footnotes(records, result.taught)
        ),
        seed=result.settings.seed,
        pore=_picture(folder / "pore.png"),
        differences=_differences(result.differences, thirds=True, taught=result.taught),
        images=max(b.provenance.samples or 0 for each in result.biases.values() for b in each),
        form=_form_of(result),
        biases=_biases(result.biases),
        left_out=_left_out(result),
    )
    return write_atomic(folder / "report.html", text)


def _filled(template: str, title: str, about: About, **values: object) -> Html:
    named = {"model": about.model, "calibration": about.calibration, "test": about.test}
    return filled(template, title, command=about.command, setup=about.setup, **named, **values)


def _picture(path: Path) -> str:
    return picture(path.read_bytes())


def _table(records: Sequence[Record], *, mean: bool = False, taught: int | None = None) -> Html:
    boxes = any(record["iou"] is not None for record in records)
    spans = f"<tr class='spans'><th colspan='{5 + mean + boxes}'></th>"
    shown: list[tuple[str, str]] = []
    for by, above in tables.HEADINGS.items():
        if named := tables.columns(records, by):
            spans += f"<th colspan='{len(named)}' class='span'>{above}</th>"
            shown += ((by, name) for name in named)
    costs = ("tokens", *(["mean"] if mean else []), "GFLOPs", "prefill ms")
    right = ("accuracy %", *(["IoU"] if boxes else []))
    headings = ("method", *costs, *right, *(name for _, name in shown))
    lines = [f"<thead>{spans}</tr>{row(headings, 'th')}</thead>"]
    for budget, block in tables.groups(records):
        opening = f"<tbody><tr class='budget'><td colspan='{len(headings)}'>"
        lines.append(html(opening + "{}</td></tr>", budget))
        for record in block:
            own = record["reweight"] not in (None, "rope")
            lines.append(
                row(
                    (
                        label(record["method"], record["reweight"]) + marks(record, taught),
                        tokens(record["tokens_after"]),
                        *([number(record["mean_tokens"])] if mean else []),
                        number(record["flops"], 1e9),
                        number(record["prefill_ms"]),
                        html(
                            "<b>{}</b> <small>{}</small>",
                            percent(record["accuracy"]),
                            interval(record["ci"]),
                        ),
                        *([number(record["iou"])] if boxes else []),
                        *(
                            html("{}<br><small>{}</small>", *tables.share(record, *one))
                            for one in shown
                        ),
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
    headings = ("budget", "method", *which, "difference", "95 % interval", "won", "lost")
    lines = [f"<thead>{row((*headings, 'p', 'p (Holm)'), 'th')}</thead><tbody>"]
    corrected = iter(holm([d.paired.p for d in differences if d.third is None]))
    for d in differences:
        paired = d.paired
        cells = (
            budget_label(d.second.keep),
            d.second.label + marks(d.record(), taught),
            *([d.third or "all"] if thirds else ()),
            html("<b>{}</b>" if paired.clear else "{}", points(paired.difference)),
            d.interval,
            str(paired.gained),
            str(paired.lost),
            p_value(paired.p),
            p_value(next(corrected)) if d.third is None else "",
        )
        lines.append(row(cells, own=d.third is None if thirds else is_pore(d)))
    return Html("<table class='differences'>" + "\n".join(lines) + "</tbody></table>")


def _form_of(result: SurveyResult) -> str:
    """Which form P has, and what its growth is."""
    if result.sizes.any_size:
        return (
            "Images of this model have as many visual tokens as their size asks for, so that P is "
            "a power of the distance between a visual token and the last token of its prompt; "
            "growth is what twice the distance does to it."
        )
    return (
        "Growth is P of the last visual token over P of the first. The form was fixed beforehand: "
        f"{result.settings.kind}. Where no curve of that form fits, P is a spline or the mean "
        "attention itself."
    )


def _biases(biases: Mapping[str, Sequence[Drawn]]) -> Html:
    headings = ("host", "layer looked at", "what is averaged", "form", "growth", "R²")
    lines = [f"<thead>{row(headings, 'th')}</thead><tbody>"]
    for stages in biases.values():
        for bias in stages:
            origin = bias.provenance
            cells = (
                origin.host or "?",
                "all of the guide" if origin.layer is None else str(origin.layer - 1),
                origin.normalize or "?",
                bias.kind,
                *_fitted(bias),
            )
            lines.append(row(cells))
    return Html("<table>" + "\n".join(lines) + "</tbody></table>")


def _fitted(bias: Drawn) -> tuple[str, str]:
    """The growth of P, and R²."""
    if isinstance(bias, AnySizeBias):
        return f"{2 ** bias.parameters['power']:.3g}", "-"
    return f"{bias.growth:.3g}", "-" if bias.r2 is None else f"{bias.r2:.2f}"


def _left_out(result: SurveyResult) -> Html:
    if not result.left_out:
        return Html("<p>Nothing: every method that is installed was asked at every budget.</p>")
    return html("<ul>{}</ul>", items(result.reasons))
