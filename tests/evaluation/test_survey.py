"""All methods at once: what is asked, what is kept of an interrupted run, what the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import pore
from helpers.calibrations import make_processor
from helpers.checkpoint import save_checkpoint
from helpers.models import tiny_llava
from helpers.survey import ABOUT, SETTINGS
from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.data.sources import load_samples
from pore.embedded import TAUGHT_LAYER, embedded_model
from pore.engine.pruner import Pruner
from pore.errors import BudgetError, InputError, ProfileError, UnsupportedModelError
from pore.evaluation import guided, page, survey
from pore.evaluation.guided import Guiding
from pore.evaluation.outcome import Outcome
from pore.evaluation.records import FIELDS, marks, read_records
from pore.families.llava import Llava, llava_shape

SOME = ("Downsample", "FastV", "FasterVLM", "PyramidDrop", "Random", "SGL", "Scored")


@dataclass(frozen=True)
class Fussy(pore.Random):
    """Refuses at last what its settings do not tell."""

    name: ClassVar[str] = "Fussy"
    experimental: ClassVar[bool] = True

    def _select(self, view: Any) -> Any:
        if self.keep == 4:
            raise BudgetError("not four")
        return super()._select(view)


del Pruner.registry["Fussy"]  # other tests know nothing of it


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: pore.methods()[name] for name in SOME} | {"Fussy": Fussy}
    monkeypatch.setattr(Pruner, "registry", some)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def run(checkpoint: Path, out: Path, **changes: Any) -> survey.Result:
    model, processor = load_model(str(checkpoint))
    given: dict[str, Any] = {
        "calibration": list(load_samples("embedded:calibration", limit=6)),
        "test": list(load_samples("embedded:test", limit=9)),
        "out": out,
        "settings": SETTINGS,
        "about": ABOUT,
    }
    return survey.run(model, processor, **(given | changes))


@pytest.fixture(scope="module")
def found(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[survey.Result, list[tuple[str, float]]]]:
    some = {name: pore.methods()[name] for name in SOME} | {"Fussy": Fussy}
    told: list[tuple[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pruner, "registry", some)
        out = tmp_path_factory.mktemp("survey")
        yield run(checkpoint, out, progress=lambda *now: told.append(now)), told


def itself(model: Any) -> Guiding:
    return Guiding(model, None, max_new_tokens=3, itself=True)


def labels(records: Any) -> list[tuple[str, str | None, Any]]:
    return [(r["method"], r["reweight"], r["keep"]) for r in records]


# -- what is asked --------------------------------------------------------------------------------


def test_every_method_that_is_there_is_asked_or_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # all of them
    model = tiny_llava(layers=8, tower_layers=4)
    planned, left_out = survey.lineup(model, survey.Settings(seed=7), itself(model))
    assert sorted({keep for keep, _ in planned}) == [2, 4, 5]
    asked = {pruner.name for _, pruner in planned} | {one.method for one in left_out}
    assert {n for n, kind in pore.methods().items() if kind.__module__.startswith("pore.")} <= asked
    assert all(one.reason for one in left_out)
    for keep, pruner in planned:
        counts = pruner.counts(16, 8)
        assert counts[-1] == keep or isinstance(pruner, pore.Downsample)
        assert getattr(pruner, "seed", 7) == 7


def test_budgets_by_the_mean_over_layers() -> None:
    model = tiny_llava(layers=8)
    settings = survey.Settings(keeps=(8, 3), average=True)
    planned, left_out = survey.lineup(model, settings, itself(model))
    for keep, pruner in planned:
        assert sum(pruner.counts(16, 8)) / 8 == pytest.approx(keep, abs=0.5)
    reasons = {(one.method, one.keep): one.reason for one in left_out}
    assert "cannot average 3 of 16" in reasons["FastV", 3]
    assert "needs more than a model" in reasons["Scored", 8]


def test_a_mean_is_named_as_one(checkpoint: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, keeps=(12,), average=True, timing=False)
    result = run(checkpoint, tmp_path, settings=settings)
    assert {record["keep"] for record in result.records} == {1.0, "mean 12"}
    by_name = {
        label[:2]: r for label, r in zip(labels(result.records), result.records, strict=True)
    }
    assert by_name["FastV", "exponential"]["mean_tokens"] == pytest.approx(12, abs=0.5)
    assert "Budgets are visual tokens of 16, their mean" in result.report.read_text()
    assert "mean 12" in result.report.read_text()


def test_hosts_are_asked_with_and_without(found: Any) -> None:
    result, _ = found
    hosts = [("FastV", None), ("FastV", "exponential"), ("PyramidDrop", None)]
    hosts = [*hosts, ("PyramidDrop", "exponential"), ("Random", None)]
    hosts = [*hosts, ("SGL", None), ("SGL", "exponential")]
    plain = [("Downsample", None), *hosts[:2], ("FasterVLM", None), *hosts[2:], ("Fussy", None)]
    expected = [("unpruned", None, 1.0), *((*each, 8) for each in plain)]
    expected += [(*each, 4) for each in plain[:-1]]
    records = read_records(result.report.parent / "results.json")
    assert sorted(map(str, labels(records))) == sorted(map(str, expected))
    assert records == json.loads(json.dumps(result.records))
    assert all(tuple(record) == FIELDS and record["prefill_ms"] > 0 for record in records)
    by_name = dict(zip(labels(records), records, strict=True))
    assert by_name["Downsample", None, 8]["tokens_after"] == 9
    assert by_name["FastV", None, 4]["mean_tokens"] == pytest.approx((2 * 16 + 3 * 4) / 5)
    assert by_name["PyramidDrop", None, 4]["looks_at"] == [1, 2, 3]
    assert [by_name[name, None, 8]["acts_in"] for name in ("FasterVLM", "FastV", "Downsample")] == [
        "tower",
        "decoder",
        "embeddings",
    ]


def test_what_fails_on_the_way_is_left_out(found: Any) -> None:
    reasons = {(one.method, one.keep): one.reason for one in found[0].left_out}
    assert reasons["Fussy", 4] == "not four"
    assert reasons["Scored", 8] == "it needs more than a model to be set up"
    assert len(reasons) == 3


def test_differences_are_of_hosts_with_themselves(found: Any) -> None:
    result, _ = found
    records = json.loads((result.report.parent / "differences.json").read_text())
    thirds = list(dict.fromkeys(record["third"] for record in records))
    assert thirds[0] is None
    assert {"top", "middle", "bottom"} >= set(thirds[1:])
    assert len(records) == 2 * 3 * len(thirds)
    asked = {third: sum(d["n"] for d in records if d["third"] == third) for third in thirds}
    assert asked[None] == 6 * 9
    for difference in result.differences:
        assert difference.first.method == difference.second.method
        assert (difference.first.reweight, difference.second.reweight) == (None, "exponential")
        assert difference.first.keep == difference.second.keep


def test_biases_are_measured_once_for_all_budgets(found: Any) -> None:
    result, _ = found
    folder = result.report.parent
    fastv, pyramiddrop, sgl = sorted(result.biases)
    assert (fastv, pyramiddrop) == ("fastv-1", "pyramiddrop-1-2-3")
    assert re.fullmatch("sgl-[0-9a-f]{8}", sgl)
    for kind in ("calibrations", "profiles"):
        names = {path.name for path in (folder / kind).iterdir()}
        assert names == {f"{name}.json" for name in (fastv, pyramiddrop, sgl)}
    pyramid = pore.HostCalibration.load(folder / "calibrations" / "pyramiddrop-1-2-3.json")
    assert [stage.count for stage in pyramid.stages] == [6, 6, 6]
    assert result.biases["pyramiddrop-1-2-3"] == pyramid.fit()


def test_a_form_that_does_not_fit_gives_way(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = found
    path = result.report.parent / "calibrations" / "fastv-1.json"
    measured = pore.Calibration.load(path)
    fit, refused = pore.Calibration.fit, {"exponential"}

    def picky(self: pore.Calibration, kind: Any = "exponential") -> pore.PositionBias:
        if kind in refused:
            raise ProfileError(f"no {kind}")
        return fit(self, kind)

    monkeypatch.setattr(pore.Calibration, "fit", picky)
    assert survey._fitted(measured, "exponential").kind == "spline"
    with pytest.raises(ProfileError, match="What is read of decoder layer 1: no exponential"):
        pore.HostCalibration((measured,)).fit()
    refused.add("spline")
    assert survey._fitted(measured, "exponential").kind == "empirical"
    refused.add("empirical")
    with pytest.raises(ProfileError, match="no empirical"):
        survey._fitted(measured, "exponential")


def test_progress_comes_to_its_end(found: Any) -> None:
    shares = [share for _, share in found[1]]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[-2] > 0.9


# -- interrupted and called again -----------------------------------------------------------------


def test_goes_on_where_it_stopped(
    checkpoint: Path, found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []
    evaluate, time_prefill = survey.evaluate, survey.time_prefill

    def counted(*args: Any, **given: Any) -> Outcome:
        outcome = evaluate(*args, **given)
        asked.append((outcome.label, outcome.keep))
        return outcome

    def stop(what: str, _: float) -> None:
        if what == stop_at[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(survey, "evaluate", counted)
    stop_at = ["asking: FastV + PoRe, keep 8"]
    with pytest.raises(KeyboardInterrupt, match=r"3 of 21 settings are done.*same command"):
        run(checkpoint, tmp_path, progress=stop)
    assert [label for label, _ in asked] == ["unpruned", "Downsample", "FastV"]
    assert len(read_records(tmp_path / "results.json")) == 3
    stop_at[0] = "timing the prefill, methods in turns"
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, progress=stop)
    assert len(asked) == len(set(asked)) == 20
    again = run(checkpoint, tmp_path)
    assert asked.count(("FastV", 8)) == 1
    result, _ = found
    for one, other in zip(again.outcomes, result.outcomes, strict=True):
        assert one.answers == other.answers
        assert one.record() | {"prefill_ms": None} == other.record() | {"prefill_ms": None}
    assert [d.record() for d in again.differences] == [d.record() for d in result.differences]
    # Whole, it asks nothing and times nothing any more.
    monkeypatch.setattr(survey, "time_prefill", None)
    whole = run(checkpoint, tmp_path)
    assert whole.records == again.records
    assert [o.answers for o in whole.outcomes] == [o.answers for o in again.outcomes]
    assert len(asked) == 20
    monkeypatch.setattr(survey, "time_prefill", time_prefill)
    # Under other conditions all is asked anew.
    run(checkpoint, tmp_path, settings=replace(SETTINGS, max_new_tokens=2, timing=False))
    assert len(asked) == 40


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"setting": 1}', None])
def test_damaged_answers_are_asked_again(
    checkpoint: Path, found: Any, tmp_path: Path, content: bytes | None
) -> None:
    result, _ = found
    samples = list(load_samples("embedded:test", limit=9))
    outcome = result.outcomes[2]
    conditions = {"pore": "1"}
    store = survey._Store(tmp_path, conditions)
    assert store.load(outcome.pruner, samples) is None
    store.save(outcome.pruner, outcome.answers)
    assert store.load(outcome.pruner, samples) == outcome.answers
    assert store.load(outcome.pruner, samples[::-1]) is None
    assert survey._Store(tmp_path, {"pore": "2"}).load(outcome.pruner, samples) is None
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
    assert len({json.dumps(survey._described(method)) for method in methods}) == len(methods)


# -- SGL, whose guide is of one batch -------------------------------------------------------------


def explicit(
    guide: tuple[Any, Any], model: Any, processor: Any, keep: int, bias: Any
) -> list[tuple[str, Any]]:
    """Answers and what was kept for them, batch by batch, by hand."""
    samples, found = list(load_samples("embedded:test", limit=9)), []
    for first in range(0, 9, SETTINGS.batch_size):
        part = samples[first : first + SETTINGS.batch_size]
        seen, inputs = (
            build_inputs(one, part, torch.device("cpu"), torch.float32)
            for one in (guide[1], processor)
        )
        made = pore.guide(guide[0], seen, max_new_tokens=SETTINGS.max_new_tokens)
        with pore.SGL(keep, layer=2, guide=made, reweight=bias)(model) as run, torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        kept = [tuple(image.kept for image in sample.images) for sample in run.report]
        found += zip((text.strip() for text in texts), kept, strict=True)
    return found


def sgl(result: survey.Result) -> list[Outcome]:
    return [outcome for outcome in result.outcomes if outcome.method == "SGL"]


def answered(outcome: Outcome) -> list[tuple[str, Any]]:
    return [(answer.given, answer.kept) for answer in outcome.answers]


def mean_importance(model: Any, processor: Any) -> torch.Tensor:
    samples = list(load_samples("embedded:calibration", limit=6))
    inputs = build_inputs(processor, samples, torch.device("cpu"), torch.float32)
    return pore.guide(model, inputs, max_new_tokens=3).importance.double().mean(0)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide") / "smaller"
    tiny_llava(layers=2, seed=3, dtype=torch.float32).save_pretrained(folder)
    make_processor(do_center_crop=False).save_pretrained(folder)
    return folder


def test_sgl_equals_a_loop_over_guides(checkpoint: Path, found: Any) -> None:
    result, _ = found
    model, processor = load_model(str(checkpoint))
    (name,) = (name for name in result.biases if name.startswith("sgl"))
    (bias,) = result.biases[name]
    mean = mean_importance(model, processor)
    torch.testing.assert_close(bias.values, pore.PositionBias.fit(mean).values, rtol=1e-5, atol=0)
    plain, divided, *_ = outcomes = sgl(result)
    assert [(o.keep, o.reweight) for o in outcomes] == [
        *((8, None), (8, "exponential"), (4, None), (4, "exponential"))
    ]
    for outcome in outcomes:
        given = None if outcome.reweight is None else bias
        assert answered(outcome) == explicit(
            (model, processor), model, processor, outcome.keep, given
        )
    assert [a.kept for a in plain.answers] != [a.kept for a in divided.answers]
    record = plain.record()
    assert (record["guide"], record["layer"], record["acts_in"]) == ("itself", 2, "decoder")
    assert record["looks_at"] == [0, 1, 2, 3, 4]
    assert record["tokens_after"] == 8
    assert record["mean_tokens"] == pytest.approx((2 * 16 + 3 * 8) / 5)
    (note,) = (note for note in page.notes(result) if note.startswith("§"))
    assert "Guided by the model itself" in note
    assert "saves nothing" in note


def test_another_model_guides(
    checkpoint: Path, smaller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pruner, "registry", {"SGL": pore.SGL})
    made: list[Any] = []
    guide = guided.guide

    def counted(model: Any, *args: Any, **given: Any) -> pore.Guide:
        made.append(model)
        return guide(model, *args, **given)

    monkeypatch.setattr(guided, "guide", counted)
    other = load_model(str(smaller))
    settings = replace(SETTINGS, timing=False)
    result = run(checkpoint, tmp_path, settings=settings, guide=other)
    assert made == [other[0]] * 3  # once a batch, whatever the budgets and P
    model, processor = load_model(str(checkpoint))
    ((bias,),) = result.biases.values()
    mean = mean_importance(*other)
    torch.testing.assert_close(bias.values, pore.PositionBias.fit(mean).values, rtol=1e-5, atol=0)
    assert (bias.provenance.host, bias.provenance.normalize) == ("SGL", "guide")
    assert bias.provenance.model == "smaller"
    for outcome in sgl(result):
        given = None if outcome.reweight is None else bias
        assert answered(outcome) == explicit(other, model, processor, outcome.keep, given)
    assert {(r["guide"], str(r["looks_at"])) for r in result.records[1:]} == {("smaller", "[]")}
    (note,) = page.notes(result)
    assert note.startswith("§ Guided by smaller, which answers every question first")
    # The same again asks nothing; with another guide, SGL is asked anew.
    again = run(checkpoint, tmp_path, settings=settings, guide=other)
    assert [o.answers for o in again.outcomes] == [o.answers for o in result.outcomes]
    assert len(made) == 3
    own = run(checkpoint, tmp_path, settings=settings)
    assert len(made) == 6
    assert own.outcomes[0].answers == result.outcomes[0].answers
    assert [o.guide for o in sgl(own)] == ["itself"] * 4
    assert sorted(path.name[:4] for path in (tmp_path / "profiles").iterdir()) == ["sgl-"] * 2


@pytest.mark.parametrize("known", [True, False])
def test_a_guide_with_other_tokens_is_left_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setattr(Pruner, "registry", {"FastV": pore.FastV, "SGL": pore.SGL})
    side = {"height": 24, "width": 24}
    processor = make_processor(do_center_crop=False, size=side)
    guide = tiny_llava(side=3, dtype=torch.float32), processor
    if not known:  # the sizes of a model that only the first batch tells

        def refused(self: Llava, config: Any, decoder: DecoderShape) -> ModelShape:
            if config.vision_config.image_size == 24:
                raise UnsupportedModelError("no sizes")
            return llava_shape(config, decoder)

        monkeypatch.setattr(Llava, "shape", refused)
    settings = replace(SETTINGS, keeps=(8,), timing=False)
    result = run(checkpoint, tmp_path, settings=settings, guide=guide)
    assert [record["method"] for record in result.records] == ["unpruned", "FastV", "FastV"]
    (one,) = result.left_out
    assert (one.method, one.keep) == ("SGL", 8)
    assert "cut" in one.reason
    assert "16" in one.reason
    assert "9" in one.reason
    assert "into the same tokens" in one.reason


def test_a_guided_method_prunes_nothing_itself(checkpoint: Path) -> None:
    model, processor = load_model(str(checkpoint))
    pruner = pore.SGL(4, layer=2, guide=Guiding(model, processor, max_new_tokens=3, itself=True))
    samples = list(load_samples("embedded:test", limit=2))
    inputs = build_inputs(processor, samples, torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match="is of one batch"), pruner(model):
        model(**inputs)
    assert survey._described(pruner)["guide"]["model"] == "tiny"


# -- the page -------------------------------------------------------------------------------------


def test_page_opens_offline(found: Any) -> None:
    text = found[0].report.read_text()
    assert "$" not in text
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    sources = re.findall(r"""src=['"](.{22})""", text)
    assert sources == ["data:image/png;base64,"] * 2
    assert "tiny &lt;model&gt;" in text
    assert "a &amp; b" in text
    assert "Fussy at 4: not four" in text
    assert "Fussy ‡" in text
    assert "†" not in text  # of the embedded model only
    assert "SGL + PoRe §" in text
    assert "all of the guide" in text


def test_methods_that_look_at_the_taught_layer_are_marked(found: Any) -> None:
    result, _ = found
    taught = replace(result, taught=3)
    notes = page.notes(taught)
    assert [note[0] for note in notes] == ["†", "‡", "§"]
    assert "decoder layer 3 or above" in notes[0]
    records = {record["method"]: record for record in result.records}
    assert [marks(records[name], 3) for name in ("PyramidDrop", "FastV", "Fussy", "unpruned")] == [
        " †",
        "",
        " ‡",
        "",
    ]
    assert marks(records["PyramidDrop"]) == ""
    text = page.write_survey(taught, ABOUT, result.report.parent).read_text()
    assert "PyramidDrop + PoRe †" in text
    page.write_survey(result, ABOUT, result.report.parent)


def test_only_the_embedded_model_has_a_taught_layer(checkpoint: Path) -> None:
    model, _ = load_model(str(checkpoint))
    assert survey.taught_layer(model) is None
    model.config.name_or_path = embedded_model()
    assert survey.taught_layer(model) == TAUGHT_LAYER == 4


def test_page_says_what_the_numbers_say(found: Any) -> None:
    result, _ = found
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
        compared = (survey.compare(first, second),)
        return page.findings(replace(result, differences=compared))[-1]

    assert "is clearly better than without" in line(wrong, right)
    assert "FastV: keep 8 +100.0 points" in line(wrong, right)
    assert "is clearly worse than without" in line(right, wrong)
    assert "is not clearly different" in line(right, right)
    best = page.findings(result)[1]
    assert best.startswith("Keep 8: most right answers")


def test_a_third_that_was_not_asked_about_is_refused(found: Any) -> None:
    one = found[0].outcomes[0]
    with pytest.raises(InputError, match="Cannot pair 0"):
        survey.compare(one, one, third="edge")


def test_numbers_of_tokens_count_what_stands_for_no_patch() -> None:
    from helpers.calibrations import make_samples

    model = tiny_llava(dtype=torch.float32, tower_layers=4)
    processor = make_processor(do_center_crop=False)
    pruner = pore.VisionZip(keep=6)
    outcome = survey.evaluate(model, processor, make_samples(3), pruner, max_new_tokens=1)
    assert outcome.tokens_after == outcome.mean_tokens == 6
    assert sum(answer.extra for answer in outcome.answers) > 0
    assert np.isfinite(outcome.flops)
