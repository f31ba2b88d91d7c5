"""Evaluation against plain `generate`, its statistics against SciPy, and the demo as a whole."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import pore
from helpers.calibrations import Stepwise, make_processor, make_samples
from helpers.checkpoint import save_checkpoint
from helpers.models import tiny_llava
from pore.bias.position_bias import PositionBias
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.data.sources import load_samples
from pore.errors import InputError
from pore.evaluation import demo, page
from pore.evaluation.answers import is_right, normalise
from pore.evaluation.batches import Batches
from pore.evaluation.outcome import Answer, Outcome, compare
from pore.evaluation.records import FIELDS, read_records, table, to_csv, write_records
from pore.evaluation.reweighting import load_bias, reweighted, rope_bias
from pore.evaluation.running import evaluate, time_prefill
from pore.evaluation.statistics import paired, wilson
from pore.plotting.labels import budget_label

PRUNERS = [None, pore.FastV(keep=4), pore.Random(keep=0.5, seed=3), pore.FasterVLM(keep=4)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(dtype=torch.float32)


@pytest.fixture(scope="module")
def processor() -> Any:
    return make_processor(do_center_crop=False)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    kinds, thirds = ("color", "shape"), ("top", "middle", "bottom")
    return [
        replace(sample, kind=kinds[i % 2], third=thirds[i % 3] if i % 2 else None)
        for i, sample in enumerate(make_samples(7))
    ]


# -- answers and statistics -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("Red", "red", True),
        ("  red.\n", "red", True),
        ("“yes”", "yes", False),  # only the quotes of a keyboard are taken off
        ('"yes"', "yes", True),
        ("top  left", "top left", True),
        ("\uff12", "2", True),
        ("two", "2", False),
        ("a cat", "cat", False),
        ("", "red", False),
        ("3.5", "35", False),
    ],
)
def test_exact_match(given: str, expected: str, right: bool) -> None:
    assert is_right(given, expected) is right
    assert normalise(normalise(given)) == normalise(given)


@pytest.mark.parametrize(("right", "n"), [(0, 9), (9, 9), (1, 1), (37, 50), (940, 1000)])
def test_wilson(right: int, n: int) -> None:
    interval = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_of_nothing(right: int, n: int) -> None:
    with pytest.raises(InputError, match="no confidence interval"):
        wilson(right, n)


def test_paired_against_its_definition() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(300) < 0.8, rng.random(300) < 0.86
    found = paired(first.tolist(), second.tolist(), seed=2)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    assert (found.gained, found.lost, found.n) == (gained, lost, 300)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert found.p == pytest.approx(binomtest(gained, gained + lost).pvalue)
    draws = rng.integers(0, 300, (4000, 300))
    drawn = (second[draws].astype(int) - first[draws]).mean(1)
    assert found.ci == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.01)
    assert found == paired(first.tolist(), second.tolist(), seed=2)


def test_paired_without_any_difference() -> None:
    found = paired([True, False], [True, False])
    assert (found.difference, found.ci, found.p, found.clear) == (0.0, (0.0, 0.0), 1.0, False)


def test_paired_of_many() -> None:
    n = 5000
    found = paired([False] * n, [True] * n)
    assert found.clear
    assert found.p == pytest.approx(0.0)


def test_paired_needs_pairs() -> None:
    with pytest.raises(InputError, match="Cannot pair"):
        paired([True], [True, False])


# -- asking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", PRUNERS)
def test_equals_plain_generate(
    model: Any, processor: Any, samples: list[Sample], pruner: pore.Pruner | None
) -> None:
    found = evaluate(model, processor, samples, pruner, batch_size=3, max_new_tokens=4)
    inputs = build_inputs(processor, samples)
    with torch.inference_mode():
        if pruner is None:
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        else:
            with pruner(model) as run:
                tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    written = [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]
    assert [answer.given for answer in found.answers] == written
    if pruner is not None:
        kept = [tuple(image.kept for image in sample.images) for sample in run.report]
        assert [answer.kept for answer in found.answers] == kept
        assert [answer.flops for answer in found.answers] == [s.flops for s in run.report]
    else:
        with pore.FastV(keep=1.0)(model) as run, torch.inference_mode():
            model(**inputs)
        assert [a.flops for a in found.answers] == [s.unpruned_flops for s in run.report]
        assert found.tokens_after == 16


def test_right_answers_count(model: Any, processor: Any, samples: list[Sample]) -> None:
    first = evaluate(model, processor, samples, max_new_tokens=3)
    told = [
        replace(sample, answer=answer.given if i else "no such answer")
        for i, (sample, answer) in enumerate(zip(samples, first.answers, strict=True))
    ]
    steps: list[int] = []
    found = evaluate(model, processor, told, max_new_tokens=3, batch_size=4, progress=steps.append)
    assert found.right == (False, True, True, True, True, True, True)
    assert steps == [4, 3]
    assert found.accuracy == pytest.approx(6 / 7)
    record = found.record()
    assert tuple(record) == FIELDS
    assert record["accuracy_by_kind"] == {"color": pytest.approx(3 / 4), "shape": 1.0}
    assert record["accuracy_by_third"] == {"middle": 1.0, "top": 1.0, "bottom": 1.0}
    assert record["ci"] == list(wilson(6, 7))
    assert (record["method"], record["keep"], record["layer"]) == ("unpruned", 1.0, None)
    difference = compare(first, found)
    assert (difference.paired.gained, difference.paired.lost) == (6, 0)


def test_batches_are_made_once_within_their_memory(
    model: Any, processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(*args: Any) -> Any:
        made.append(1)
        return build_inputs(*args)

    monkeypatch.setattr("pore.evaluation.batches.build_inputs", counted)
    for memory, times in ((1 << 20, 2), (0, 4)):
        made.clear()
        batches = Batches(model, processor, samples, batch_size=4, memory=memory)
        outcomes = [evaluate(model, processor, batches, pore.FastV(keep=4)) for _ in range(2)]
        assert outcomes[0] == outcomes[1]
        assert len(made) == times


def test_padding_is_read_off_pixels(processor: Any, samples: list[Sample], model: Any) -> None:
    pruner = pore.FastV(keep=4, suppress_padding=0.5)
    found = evaluate(model, processor, samples, pruner, max_new_tokens=2)
    assert [len(answer.kept[0]) for answer in found.answers] == [4] * 7


def test_what_cannot_be_asked(model: Any, processor: Any, samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="no samples"):
        evaluate(model, processor, [])
    with pytest.raises(InputError, match="'0/1' has no answer"):
        evaluate(model, processor, [samples[0], replace(samples[1], answer=None)])
    with pytest.raises(InputError, match="at least 1 sample"):
        evaluate(model, processor, samples, batch_size=0)


def test_other_questions_are_not_compared() -> None:
    one, other = (
        Outcome(None, (Answer("a", q, "x", "x", True, None, None, ((0,),), 1),)) for q in "pq"
    )
    with pytest.raises(InputError, match="same questions"):
        compare(one, other)


def test_timing(model: Any, processor: Any, samples: list[Sample]) -> None:
    steps: list[int] = []
    batches = Batches(model, processor, samples, batch_size=3)
    times = time_prefill(model, batches, PRUNERS[:2], count=2, rounds=2, progress=steps.append)
    assert len(times) == 2
    assert min(times) > 0
    assert steps == [6] * 6


# -- files ----------------------------------------------------------------------------------------


def records() -> list[dict[str, Any]]:
    answers = tuple(
        Answer(str(i), "q", "x", "x", i < 2, "color", (None, "top")[i % 2], ((0, 1),), 10)
        for i in range(3)
    )
    bias = PositionBias.exponential(0.1, 16)
    return [
        Outcome(None, answers, 1.5).record(),
        Outcome(pore.FastV(keep=0.25, reweight=bias), answers).record(),
        Outcome(pore.Downsample(keep=4), answers, budget=0.25).record(),
    ]


def test_records_as_files(tmp_path: Path) -> None:
    found = records()
    write_records(tmp_path / "new", found)
    assert read_records(tmp_path / "new" / "results.json") == found
    text = (tmp_path / "new" / "results.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text == to_csv(found)
    assert [row["method"] for row in rows] == ["unpruned", "FastV", "Downsample"]
    assert rows[1]["reweight"] == "exponential"
    assert float(rows[0]["ci_low"]) == found[0]["ci"][0]
    assert float(rows[0]["kind.color"]) == pytest.approx(2 / 3)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "results.csv",
        "results.json",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '[{"method": "FastV"}]', "[3]"])
def test_what_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_records(path)


def test_table_has_a_block_for_each_budget() -> None:
    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    console.print(table(records()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "all visual tokens",
        "unpruned",
        "keep 25 %",
        "FastV + PoRe",
        "Downsample",
    ]
    assert "66.7 [20.8, 93.9]" in text
    console.print(table(records(), parts=("kinds",)))
    assert "[" not in console.file.getvalue()[len(text) :]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keep", "label"),
    [(0.222, "keep 22.2 %"), (128, "keep 128"), (0.5, "keep 50 %"), (None, "method's own budget")],
)
def test_budget_label(keep: Any, label: str) -> None:
    assert budget_label(keep) == label


# -- position biases by name ----------------------------------------------------------------------


def test_bias_by_name(tmp_path: Path) -> None:
    bias = PositionBias.exponential(0.1, 16)
    assert load_bias(str(bias.save(tmp_path / "p.json"))) == (bias,)
    (himap,) = load_bias("published:himap/vqav2")
    assert len(himap) == 576
    with pytest.raises(InputError, match="published:himap/vqav2"):
        load_bias("published:himap")


def test_biases_go_to_their_stages() -> None:
    one, other = (PositionBias.exponential(rate, 16) for rate in (0.1, 0.2))
    assert reweighted(pore.FastV(keep=4), [one]) == pore.FastV(keep=4, reweight=one)
    assert reweighted(Stepwise(), [one]) == Stepwise(reweight=one)
    assert reweighted(Stepwise(), (one, other)) == Stepwise(reweight=(one, other))
    with pytest.raises(InputError, match="at 2 places, and there are biases for 3"):
        reweighted(Stepwise(), [one, one, other])
    with pytest.raises(InputError, match="Random does not rank"):
        reweighted(pore.Random(keep=4), [one])


def test_rope_bias_is_that_of_the_model(model: Any, processor: Any, samples: list[Sample]) -> None:
    found = rope_bias(model, processor, samples)
    inputs = build_inputs(processor, samples)["input_ids"]
    behind = sorted(len(row) - 1 - int((row == 90).nonzero()[-1]) for row in inputs)
    assert found.parameters["text_tokens"] == behind[3]
    assert found == PositionBias.rope(16, head_dim=8, text_tokens=behind[3], grid=(4, 4))
    with pytest.raises(InputError, match="there is none"):
        rope_bias(model, processor, [replace(samples[0], image=None)])


# -- the demo -------------------------------------------------------------------------------------

SETTINGS = demo.Settings(keeps=(0.5, 0.25), batch_size=4)
ABOUT = page.About("tiny <model>", "pore demo", "cal", "test", {"machine": "a & b"}, "Because.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def run_demo(checkpoint: Path, out: Path, **changes: Any) -> demo.Result:
    model, processor = load_model(str(checkpoint))
    given: dict[str, Any] = {
        "calibration": list(load_samples("embedded:calibration", limit=6)),
        "test": list(load_samples("embedded:test", limit=9)),
        "out": out,
        "settings": SETTINGS,
        "about": ABOUT,
    }
    return demo.run(model, processor, **(given | changes))


@pytest.fixture(scope="module")
def shares() -> list[float]:
    return []


@pytest.fixture(scope="module")
def result(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, shares: list[float]
) -> demo.Result:
    out = tmp_path_factory.mktemp("demo")
    return run_demo(checkpoint, out, progress=lambda _, share: shares.append(share))


def test_demo_writes_what_it_says(result: demo.Result) -> None:
    folder = result.report.parent
    assert {path.name for path in folder.iterdir()} == {
        "calibration.json",
        "profile.json",
        "results.json",
        "results.csv",
        "differences.json",
        "figure1.png",
        "figure2.png",
        "figure3.png",
        "examples",
        "report.html",
    }
    found = read_records(folder / "results.json")
    assert found == json.loads(json.dumps(result.records))
    assert all(tuple(record) == FIELDS for record in found)
    methods = ["FastV", "FastV", "FastV", "Random", "Downsample"]
    assert [record["method"] for record in found] == ["unpruned", *methods, *methods]
    assert [r["reweight"] for r in found[1:6]] == [None, "exponential", "rope", None, None]
    assert [r["keep"] for r in found] == [1.0] + [0.5] * 5 + [0.25] * 5
    assert [r["tokens_after"] for r in found] == [16, 8, 8, 8, 8, 9, 4, 4, 4, 4, 4]
    assert all(record["prefill_ms"] > 0 and record["n"] == 9 for record in found)
    assert PositionBias.load(folder / "profile.json") == result.bias
    assert pore.Calibration.load(folder / "calibration.json") == result.calibration
    assert len(json.loads((folder / "differences.json").read_text())) == 8


def test_demo_calibrates_on_calibration_samples_only(result: demo.Result) -> None:
    assert result.bias.provenance.samples == 6
    assert result.bias.provenance.source == "cal"


def test_examples_are_chosen_by_rule(result: demo.Result) -> None:
    kinds = [example.title for example in result.examples]
    assert sum("the first question of kind" in title for title in kinds) == 7


def test_report_opens_offline(result: demo.Result) -> None:
    text = result.report.read_text()
    assert "$" not in text
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    sources = re.findall(r"""src=['"](.{40})""", text)
    assert len(sources) == 3 + len(result.examples)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "tiny &lt;model&gt;" in text
    assert "a &amp; b" in text


def test_report_says_what_the_numbers_say(result: demo.Result) -> None:
    answers = tuple(
        Answer(str(i), "q", "x", "x", i < 50, None, None, ((0,),), 1) for i in range(100)
    )
    better = tuple(replace(answer, right=True) for answer in answers)
    host = Outcome(pore.FastV(keep=0.5), answers)
    own = Outcome(pore.FastV(keep=0.5, reweight=result.bias), answers)

    def verdict(outcome: Outcome) -> str:
        (line,) = page.verdicts(replace(result, differences=(compare(host, outcome),)))
        return line

    assert "is not clearly different from" in verdict(own)
    assert "is better than" in verdict(replace(own, answers=better))
    worse = tuple(replace(answer, right=False) for answer in answers)
    line = verdict(replace(own, answers=worse))
    assert "is worse than" in line
    assert "keep 50 %: −50.0 points" in line
    backwards = replace(result, bias=PositionBias.exponential(-0.1, 16))
    assert "favours the first visual token over the last" in page.facts(backwards)[1]


def test_interrupted_demo_leaves_whole_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def progress(what: str, share: float) -> None:
        told.append(what)
        assert 0 <= share <= 1
        if "keep 25 %" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(checkpoint, tmp_path, progress=progress)
    assert told[0] == "measuring the position bias"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["calibration.json", "figure1.png", "figure2.png", "profile.json"]
    PositionBias.load(tmp_path / "profile.json")


@pytest.mark.usefixtures("result")
def test_progress_comes_to_its_end(shares: list[float]) -> None:
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[-2] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("grid", "keep", "cells"),
    [
        ((12, 12), 0.5, 72),
        ((12, 12), 0.25, 36),
        ((12, 12), 0.222, 35),
        ((12, 12), 0.1, 16),
        ((24, 24), 128, 130),
        ((4, 4), 16, 16),
        ((4, 4), 13, 16),
    ],
)
def test_downsampling_gets_a_decent_grid(grid: tuple[int, int], keep: Any, cells: int) -> None:
    assert demo.fair_cells(grid, keep) == cells


def test_demo_needs_a_grid(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pore.families.llava.Llava.grid", lambda *_: None)
    with pytest.raises(InputError, match="one grid"):
        run_demo(checkpoint, tmp_path)
