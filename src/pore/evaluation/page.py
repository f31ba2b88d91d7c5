"""The page of the demo, and that of one method at several budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pore._files import write_atomic
from pore._page import First, address, filled, html, joined, picture
from pore._text import Html, capitalised
from pore.bias.any_size import AnySizeBias
from pore.evaluation import headlines, parts
from pore.evaluation.differences import Difference
from pore.evaluation.findings import bias_found, footnotes, is_pore, skips
from pore.evaluation.records import Record
from pore.evaluation.results import About, DemoResult, Example, Figure, KeptBy
from pore.evaluation.wording import scoring
from pore.methods.downsample import Downsample
from pore.plotting.labels import budget_label

_NOTE = (
    "A difference counts as clear when its test gives p < 0.05; in brackets are 95 % "
    "intervals. Several budgets are compared, so one clear difference may be due to chance."
)

_BESIDE = {
    "differences.json": "every comparison",
    "profile.json": "P, to use with --reweight",
    "calibration.json": "the sums that P is fitted to",
}


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
    text = filled(
        "demo.html",
        f"PoRe on {about.model}",
        command=about.command,
        setup=about.setup,
        first=_first(result, about, folder).shown(),
        calibration=about.calibration,
        test=about.test,
        table=parts.results_table(result.records),
        times=parts.about_times(result.records),
        differences=parts.differences_table(result.differences),
        figures=joined(map(_figure, result.figures)),
        over_flops=over_flops(
            result.over_flops,
            result.records,
            "Accuracy over the cost of the prefill; methods of equal cost are drawn side by side.",
        ),
        examples=joined(map(_example, result.examples)),
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


def _first(result: DemoResult, about: About, folder: Path) -> First:
    """The first screen of the demo."""
    records, keep = result.records, result.settings.example_keep
    compared = [d for d in result.differences if is_pore(d)]
    here = next((d for d in compared if d.second.keep == keep), compared[0])
    number, interval = headlines.difference_of(here)
    block = [r for r in records[1:] if r["keep"] == here.second.keep]
    ours = next(r for r in block if parts.is_own(r))
    found = [
        headlines.effects(compared, "FastV"),
        " ".join((headlines.standing(records, block, ours), headlines.by_chance(records))).strip(),
        bias_found(result),
        *skips(records),
        *(f"{name} was left out: {reason}" for name, reason in result.left_out.items()),
    ]
    return First(
        heading=f"Position-reweighted visual token pruning on {about.model}",
        lead="How much accuracy FastV loses by dropping visual tokens, and how much comes back "
        "when the position bias of attention is divided out (PoRe, arXiv 2508.17807). Every "
        "number was measured by the run that wrote this page.",
        number=number,
        unit="points",
        interval=interval,
        about=f"FastV + PoRe minus FastV on the same {records[0]['n']} questions at "
        f"{budget_label(here.second.keep)} of the visual tokens, a budget that was fixed before "
        "anything was asked.",
        chart=parts.accuracy_dots(records, records[1:]),
        pair=_pair(result),
        found=[line for line in found if line],
        note=_NOTE,
        files=parts.beside(folder, _BESIDE),
    )


def _pair(result: DemoResult) -> Html:
    """What FastV and FastV + PoRe keep of a picture about which only the second is right."""
    example = next((one for one in result.examples if one.only_ours), None)
    if example is None:
        return Html("")
    return html(
        "<div class='pair'><p>{}</p><div>{}</div><p class='note'>The first question that FastV "
        "loses and FastV + PoRe answers, at {}. The other way round happens too: see "
        "<a href='#examples'>what each method keeps</a>.</p></div>",
        example.said,
        joined(map(_kept, example.kept[:2])),
        budget_label(result.settings.example_keep),
    )


def over_flops(figure: Figure | None, records: Sequence[Record], caption: str | Html) -> Html:
    """The figure of accuracy over FLOPs, or why there is none."""
    if figure is None:
        return Html("<p>The FLOPs of this model are not known: there is no figure over them.</p>")
    return picture(figure.path.read_bytes(), "Accuracy over FLOPs", caption, figure.narrow)


def _figure(figure: Figure) -> Html:
    return picture(figure.path.read_bytes(), figure.caption, figure.caption, figure.narrow)


def _example(example: Example) -> Html:
    few, kept = "" if example.grid else " few", example.kept
    return html(
        "<h3>{}</h3><p>{}</p><div class='kept{}'>{}</div>",
        capitalised(example.title),
        example.said,
        few,
        joined(map(_kept, [*kept[-1:], *kept[:-1]] if example.grid else kept)),
    )


def _kept(one: KeptBy) -> Html:
    """A picture of what one method keeps, with its answer."""
    sign = Html("")
    if one.right is not None:
        sign = Html(
            "<span class='right'>✓ right</span>"
            if one.right
            else "<span class='wrong'>✗ wrong</span>"
        )
    return html(
        "<figure><figcaption><b>{}</b><small>{}</small>{} {}</figcaption>"
        "<img src='{}' alt='{}'></figure>",
        one.name,
        one.said,
        one.answer,
        sign,
        address(one.picture),
        f"What {one.name} keeps: {one.said}" if one.said else one.name,
    )


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


def write_single(
    records: Sequence[Record],
    differences: Sequence[Difference],
    about: About,
    folder: Path,
) -> Path:
    """Write `report.html` of one method at several budgets, whole or not at all.

    Args:
        records: The records, that of the unpruned model first.
        differences: The method with P compared with itself without, budget by budget; where there
            is no P, the method compared with the unpruned model.
        about: The circumstances of the run.
        folder: Where the results are, and the page goes.

    Returns:
        The path written.

    Raises:
        OSError: It cannot be written.
    """
    middle = differences[(len(differences) - 1) // 2]
    number, interval = headlines.difference_of(middle)
    block = [r for r in records[1:] if r["keep"] == middle.second.keep]
    ours = next(r for r in block if headlines.name(r) == middle.second.label)
    with_p = [d for d in differences if is_pore(d)]
    found = [
        headlines.effects(with_p, middle.first.label) if with_p else "",
        headlines.standing(records, block, ours),
        *skips(records),
    ]
    title = f"{middle.second.method} on {about.model}"
    first = First(
        heading=title,
        lead=f"{records[0]['n']} questions from {about.test}, asked of the whole model and of the "
        "pruned one. Every number was measured by the run that wrote this page.",
        number=number,
        unit="points",
        interval=interval,
        about=f"{middle.second.label} minus {middle.first.label} on the same questions at "
        f"{budget_label(middle.second.keep)}.",
        chart=parts.accuracy_dots(records, records[1:]),
        found=[line for line in found if line],
        note=_NOTE,
        files=parts.beside(folder, {"predictions.jsonl": "every answer"}),
    )
    scored = scoring(records[0]["metric"])
    text = filled(
        "single.html",
        title,
        command=about.command,
        setup=about.setup,
        first=first.shown(),
        n=records[0]["n"],
        test=about.test,
        metric=records[0]["metric"],
        rule=scored.rule,
        interval=scored.interval,
        by_test=scored.test,
        table=parts.results_table(records),
        times=parts.about_times(records),
        footnotes=parts.listed(footnotes(records)),
        against="the same without P" if with_p else "the unpruned model",
        differences=parts.differences_table(differences),
    )
    return write_atomic(folder / "report.html", text)
