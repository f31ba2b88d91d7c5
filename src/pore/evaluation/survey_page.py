"""The page of a survey of all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pore._files import write_atomic
from pore._numbers import fixed, number
from pore._page import First, filled, html, items, table
from pore._page.tables import Row
from pore._text import Html
from pore.bias.any_size import AnySizeBias
from pore.calibration.page import Drawn
from pore.evaluation import headlines, parts
from pore.evaluation.findings import findings, footnotes, skips
from pore.evaluation.page import over_flops
from pore.evaluation.records import Record
from pore.evaluation.results import About, Figure, SurveyResult
from pore.evaluation.wording import mean, scoring
from pore.plotting.labels import UNPRUNED, budget_label

_BEST = 6
"""How many methods the first chart shows, beside the baselines."""

_BESIDE = {
    "predictions.jsonl": "every answer",
    "differences.json": "PoRe against every host",
    "left_out.json": "what could not be run",
    "accuracy.png": "accuracy over cost",
    "pore.png": "what PoRe does, by third of the image",
}


def write_survey(
    result: SurveyResult, about: About, folder: Path, drawn: Figure | None = None
) -> Path:
    """Write `report.html` of a survey of all methods, whole or not at all.

    Args:
        result: The result of the survey.
        about: The circumstances of the run.
        folder: Where the survey's files are, and the report goes.
        drawn: The figure of accuracy over FLOPs, where these are known.

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
    scored = scoring(records[0]["metric"])
    text = filled(
        "survey.html",
        f"Visual token pruning on {about.model}",
        command=about.command,
        setup=about.setup,
        first=_first(result, about, folder).shown(),
        calibration=about.calibration,
        test=about.test,
        rule=scored.rule,
        interval=scored.interval,
        by_test=scored.test,
        n=records[0]["n"],
        layers=result.layers,
        summary=items(findings(result)),
        chance=f"If PoRe had no effect at all, about {fixed(len(tests) / 20)} of its {len(tests)} "
        "comparisons would still be clear, by chance: p is not corrected for that, p (Holm) is.",
        accuracy=over_flops(
            drawn,
            records,
            "In three panels by where a method first drops tokens; the methods of the other panels "
            "are pale. An open marker is the same method ranking by A / P. Marks are explained "
            "under the table.",
        ),
        budgets=f"{budgets} of {result.sizes}, {counted}.",
        table=parts.results_table(records, mean=True, taught=result.taught),
        times=parts.about_times(records),
        footnotes=parts.listed(footnotes(records, result.taught)),
        seed=result.settings.seed,
        pore=_pore(result),
        images=max(
            (b.provenance.samples or 0 for each in result.biases.values() for b in each), default=0
        ),
        form=_form_of(result),
        biases=_biases(result.biases),
        left_out=parts.left_out(
            result.reasons if result.left_out else (),
            "Nothing: every method that is installed was asked at every budget.",
        ),
    )
    return write_atomic(folder / "report.html", text)


def _beside(guided: Sequence[str]) -> str:
    """That these methods are shown beside the others and not compared with them."""
    if not guided:
        return ""
    verb = "does" if len(guided) == 1 else "do"
    return f" {headlines.listed(guided)}, guided at a cost that is not counted, {verb} not compete."


def _first(result: SurveyResult, about: About, folder: Path) -> First:
    """The first screen of a survey."""
    records = result.records
    block = headlines.middle(records) or [records[0]]
    ranked = headlines.best_of(block)
    best = ranked[0]
    choosing = len({r["method"] for r in ranked})
    guided = list(dict.fromkeys(headlines.name(r) for r in block if r["guide"]))
    value, interval = headlines.accuracy_of(best)
    shown = ranked[:_BEST]
    usual = [r for r in block if r["method"] in (*headlines.BASELINES, "FastV")]
    chart = [*shown, *(r for r in usual if r not in shown)]
    chart.sort(key=lambda record: -float(record["accuracy"]))
    first = ranked[:3]
    found = [
        f"At {budget_label(best['keep'])}, {headlines.listed(map(headlines.told, first))} "
        f"{'do' if len(first) > 1 else 'does'} best. "
        + ("" if best["method"] == UNPRUNED else _lost(records[0], best)),
        headlines.verdict_counts(result.differences) if result.differences else "",
        _beaten(block),
        *skips(records),
    ]
    methods = len({record["method"] for record in records[1:]})
    test = scoring(best["metric"]).test
    return First(
        heading=f"Visual token pruning on {about.model}: every method, and PoRe on every host",
        lead=f"{methods} methods on the same {records[0]['n']} questions, each set up as by its "
        f"authors, scaled to a decoder of {result.layers} layers. Every number was measured by the "
        "run that wrote this page.",
        number=value,
        unit="%",
        interval=interval,
        about=f"{mean(best['metric'])} {headlines.name(best)}, the best of {choosing} methods at "
        f"{budget_label(best['keep'])}, the middle budget. The best of so many is partly lucky: on "
        "other questions expect less.",
        chart=parts.accuracy_dots(records, chart, result.taught),
        found=[line.strip() for line in found if line.strip()],
        note=f"Clear means p < 0.05 in {test} on the same questions. The chart shows "
        f" the best {_BEST}, FastV and the baselines that choose nothing; the table has all, "
        "and what the marks mean." + _beside(guided),
        files=parts.beside(folder, _BESIDE),
    )


def _lost(unpruned: Record, best: Record) -> str:
    lost = unpruned["accuracy"] - best["accuracy"]
    said = f"The unpruned model gets {fixed(100 * unpruned['accuracy'])} %"
    if lost <= 0:
        return f"{said}: the best of them loses nothing."
    return f"{said}: even the best of them loses {fixed(100 * lost)} points."


def _beaten(block: Sequence[Record]) -> str:
    """How many methods are no better than one that chooses nothing."""
    said = []
    choosing = [r for r in block if r["method"] not in headlines.BASELINES]
    for name in headlines.BASELINES:
        plain = next((r for r in block if r["method"] == name), None)
        if plain is not None:
            worse = sum(r["accuracy"] <= plain["accuracy"] for r in choosing)
            said.append(f"{name} ({fixed(100 * plain['accuracy'])} %) is no worse than {worse}")
    if not said:
        return ""
    return (
        f"Of {len(choosing)} methods, with P and without, some are not worth their choice of "
        f"tokens: {' and '.join(said)} of them."
    )


def _pore(result: SurveyResult) -> Html:
    """The chart and the table of what PoRe does to every host."""
    if not result.differences:
        return Html("<p>No host was asked with PoRe.</p>")
    return html(
        "{}{}",
        parts.differences_dots(result.differences, result.taught),
        parts.differences_table(result.differences, thirds=True, taught=result.taught),
    )


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
    rows = []
    for stages in biases.values():
        for bias in stages:
            origin = bias.provenance
            cells = (
                origin.host or "–",
                "all of the guide" if origin.layer is None else str(origin.layer - 1),
                origin.normalize or "–",
                bias.kind,
                *_fitted(bias),
            )
            rows.append(Row(cells))
    return table("The position biases", headings, [("", rows)])


def _fitted(bias: Drawn) -> tuple[str, str]:
    """The growth of P, and R²."""
    if isinstance(bias, AnySizeBias):
        return number(2 ** bias.parameters["power"]), "–"
    return number(bias.growth), "–" if bias.r2 is None else fixed(bias.r2, 2)
