"""What is kept of an interrupted survey, and when it is taken again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.survey import SETTINGS, run_survey
from pore.data.sources import load_samples
from pore.evaluation import own, survey
from pore.evaluation.files import read_records
from pore.evaluation.outcome import Outcome
from pore.evaluation.store import Store, described

pytestmark = pytest.mark.usefixtures("registry")


@pytest.mark.slow
def test_goes_on_where_it_stopped(
    checkpoint: Path, surveyed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []
    evaluate, time_some = own.evaluate, survey.time_some

    def counted(*args: Any, **given: Any) -> Outcome:
        outcome = evaluate(*args, **given)
        if given["part"].start == 0:  # a call for every batch
            asked.append((outcome.label, outcome.keep))
        return outcome

    def stop(what: str, _: float) -> None:
        if what == stop_at[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(own, "evaluate", counted)
    stop_at = ["asking: FastV + PoRe, keep 8"]
    with pytest.raises(KeyboardInterrupt, match=r"3 of 21 settings are done.*same command"):
        run_survey(checkpoint, tmp_path, progress=stop)
    assert [label for label, _ in asked] == ["unpruned", "Downsample", "FastV"]
    assert len(read_records(tmp_path / "results.json")) == 3
    stop_at[0] = "timing the prefill, methods in turns"
    with pytest.raises(KeyboardInterrupt):
        run_survey(checkpoint, tmp_path, progress=stop)
    assert len(asked) == len(set(asked)) == 20
    again = run_survey(checkpoint, tmp_path)
    assert asked.count(("FastV", 8)) == 1
    result, _ = surveyed
    for one, other in zip(again.outcomes, result.outcomes, strict=True):
        assert one.answers == other.answers
        assert replace(one, prefill=None).record() == replace(other, prefill=None).record()
    assert [d.record() for d in again.differences] == [d.record() for d in result.differences]
    # Whole, it asks nothing and times nothing any more.
    monkeypatch.setattr(survey, "time_some", None)
    whole = run_survey(checkpoint, tmp_path)
    assert whole.records == again.records
    assert [o.answers for o in whole.outcomes] == [o.answers for o in again.outcomes]
    assert len(asked) == 20
    monkeypatch.setattr(survey, "time_some", time_some)
    # Under other conditions all is asked anew.
    run_survey(checkpoint, tmp_path, settings=replace(SETTINGS, max_new_tokens=2, timing=False))
    assert len(asked) == 40


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"setting": 1}', None])
def test_damaged_answers_are_asked_again(
    checkpoint: Path, surveyed: Any, tmp_path: Path, content: bytes | None
) -> None:
    result, _ = surveyed
    samples = list(load_samples("embedded:test", limit=9))
    outcome = result.outcomes[2]
    conditions = {"pore": "1"}
    store = Store(tmp_path, conditions)
    assert store.load(outcome.pruner, samples) is None
    store.save(outcome.pruner, outcome.answers)
    kept = store.load(outcome.pruner, samples)
    assert kept is not None
    assert kept[0] == outcome.answers
    assert store.load(outcome.pruner, samples[::-1]) is None
    assert Store(tmp_path, {"pore": "2"}).load(outcome.pruner, samples) is None
    (path,) = tmp_path.iterdir()
    if content is None:
        document = json.loads(path.read_text())
        document["answers"][0]["secret"] = 1
        content = json.dumps(document).encode()
    path.write_bytes(content)
    assert store.load(outcome.pruner, samples) is None


def test_settings_are_told_apart() -> None:
    one, other = (pore.PositionBias.exponential(rate, 16) for rate in (0.1, 0.2))
    methods = [
        None,
        pore.FastV(keep=4),
        pore.FastV(keep=5),
        pore.FastV(keep=4, reweight=one),
        pore.FastV(keep=4, reweight=other),
        pore.PyramidDrop(4, (1, 2), reweight=(one, other)),
        pore.PyramidDrop(4, (1, 2), reweight=(other, one)),
        pore.FastV(keep=4, suppress_padding=0.5),
    ]
    assert len({json.dumps(described(method)) for method in methods}) == len(methods)
