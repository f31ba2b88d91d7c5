"""The report of a survey, and the sentences in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.pages import checked_page
from helpers.survey import ABOUT
from pore.data.loading import load_model
from pore.embedded import TAUGHT_LAYER, embedded_model
from pore.evaluation import survey
from pore.evaluation.differences import compare
from pore.evaluation.findings import findings, footnotes
from pore.evaluation.metrics import METRICS
from pore.evaluation.outcome import Outcome
from pore.evaluation.page import write_single
from pore.evaluation.survey_page import write_survey
from pore.plotting.labels import marks

pytestmark = pytest.mark.usefixtures("registry")


@pytest.mark.slow
def test_page_opens_offline(surveyed: Any) -> None:
    text = surveyed[0].report.read_text()
    found = checked_page(text)
    assert "$" not in text
    assert len(found.all("img")) == len(found.all("source")) == 1  # wide, and for a phone
    assert "tiny &lt;model&gt;" in text
    assert "a &amp; b" in text
    assert "Fussy at 4: not four" in text
    assert "Fussy ‡" in text
    assert "†" not in text  # of the embedded model only
    assert "SGL + PoRe §" in text
    assert "all of the guide" in text


@pytest.mark.slow
def test_methods_that_look_at_the_taught_layer_are_marked(surveyed: Any) -> None:
    result, _ = surveyed
    taught = replace(result, taught=3)
    lines = footnotes(taught.records, taught.taught)
    assert [line[0] for line in lines] == ["†", "‡", "§"]
    assert "decoder layer 3 or above" in lines[0]
    records = {record["method"]: record for record in result.records}
    assert [marks(records[name], 3) for name in ("PyramidDrop", "FastV", "Fussy", "unpruned")] == [
        " †",
        "",
        " ‡",
        "",
    ]
    assert marks(records["PyramidDrop"]) == ""
    text = write_survey(taught, ABOUT, result.report.parent).read_text()
    assert "PyramidDrop + PoRe †" in text
    write_survey(result, ABOUT, result.report.parent)


def test_only_the_embedded_model_has_a_taught_layer(checkpoint: Path) -> None:
    model, _ = load_model(str(checkpoint))
    assert survey.taught_layer(model) is None
    model.config.name_or_path = embedded_model()
    assert survey.taught_layer(model) == TAUGHT_LAYER == 4


@pytest.mark.slow
def test_page_says_what_the_numbers_say(surveyed: Any) -> None:
    result, _ = surveyed
    (difference, *_) = result.differences
    answers = result.outcomes[0].answers * 20
    wrong, right = (
        replace(
            difference.first,
            answers=tuple(replace(a, id=str(i), right=r) for i, a in enumerate(answers)),
        )
        for r in (False, True)
    )

    def line(first: Outcome, second: Outcome) -> str:
        compared = (compare(first, second),)
        return findings(replace(result, differences=compared))[-1]

    assert "is clearly better than without" in line(wrong, right)
    assert "FastV: keep 8 +100.0 points" in line(wrong, right)
    assert "is clearly worse than without" in line(right, wrong)
    assert "is not clearly different" in line(right, right)
    best = findings(result)[1]
    assert best.startswith("Keep 8: the best (%) are ")


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_a_page_says_how_answers_were_scored_and_tested(surveyed: Any, metric: str) -> None:
    """Intervals and tests of scores between 0 and 1 are others than those of right and wrong."""
    result, _ = surveyed
    folder = result.report.parent
    outcomes = tuple(replace(one, metric=metric) for one in result.outcomes)
    differences = tuple(
        replace(d, first=replace(d.first, metric=metric), second=replace(d.second, metric=metric))
        for d in result.differences
    )
    of_one = [d for d in differences if d.third is None][:1]
    records = [one.record() for one in outcomes]
    unchanged = folder.joinpath("report.html").read_text()
    scored = replace(result, outcomes=outcomes, differences=differences)
    for write in (
        lambda: write_survey(scored, ABOUT, folder),
        lambda: write_single(records, of_one, ABOUT, folder),
    ):
        text = " ".join(checked_page(write().read_text()).text.split())
        assert METRICS[metric].rule in text
        assert ("swaps the two scores" in text) == METRICS[metric].graded
        assert ("In brackets is the 95 % Wilson interval" in text) != METRICS[metric].graded
    folder.joinpath("report.html").write_text(unchanged)
