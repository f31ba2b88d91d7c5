"""A survey, and a comparison of corrections, on images of mixed sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import pore
from helpers.survey import ABOUT
from pore.bias.any_size import AnySizeBias
from pore.corrections import load_corrections
from pore.data.sources import load_samples
from pore.engine.pruner import Pruner
from pore.evaluation import comparing, survey
from pore.evaluation.results import SurveyResult, SurveySettings
from processors import KINDS, qwen_vl
from processors.base import TEXT, parts_or_skip

pytestmark = pytest.mark.slow

SETTINGS = SurveySettings(keeps=(0.5,), batch_size=2, max_new_tokens=2, timing=False)
METHODS = ("Downsample", "FastV", "PyramidDrop", "SGL")


def some(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    monkeypatch.setattr(Pruner, "registry", {name: pore.methods()[name] for name in names})


@cache
def deep(name: str) -> tuple[Any, Any]:
    """The processor and the model of a family, with layers enough for methods of several stages."""
    (kind,) = (kind for kind in KINDS if kind.name == name)
    processor, _ = parts_or_skip(kind)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEXT, "num_hidden_layers", 5)
        patch.setitem(qwen_vl._QWEN25, "depth", 1)  # a tower that can be counted
        return processor, kind.model(processor.tokenizer).eval()


def given(name: str, out: Path, **changes: Any) -> dict[str, Any]:
    processor, model = deep(name)
    samples = {
        "calibration": list(load_samples("embedded:calibration:mixed", limit=4)),
        "test": list(load_samples("embedded:test:mixed", limit=4)),
    }
    return {"model": model, "processor": processor, "out": out, **samples, **changes}


@pytest.fixture(scope="module", params=["Qwen2.5-VL", "InternVL"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        some(patch, METHODS)
        out = tmp_path_factory.mktemp("survey")
        return survey.run(**given(request.param, out, settings=SETTINGS, about=ABOUT))


def test_hosts_divide_by_a_p_of_any_size(result: SurveyResult) -> None:
    asked = {(one.method, one.reweight) for one in result.outcomes}
    hosts = {"FastV", "SGL"} | ({"PyramidDrop"} - {one.method for one in result.left_out})
    assert {name for name, kind in asked if kind == "power"} == hosts
    assert {name for name, kind in asked if kind not in (None, "power")} == set()
    for biases in result.biases.values():
        assert all(isinstance(bias, AnySizeBias) for bias in biases)
    for path in (result.report.parent / "profiles").iterdir():
        assert all(isinstance(bias, AnySizeBias) for bias in load_corrections(path))


def test_every_image_keeps_its_own_share(result: SurveyResult) -> None:
    assert result.sizes.least < result.sizes.most
    sizes = [len(answer.kept[0]) for answer in result.outcomes[0].answers]
    (fastv,) = (o for o in result.outcomes if o.method == "FastV" and o.reweight is None)
    assert [len(answer.kept[0]) for answer in fastv.answers] == [round(n / 2) for n in sizes]
    assert {outcome.keep for outcome in result.outcomes[1:]} == {0.5}


def test_the_page_says_so(result: SurveyResult) -> None:
    page = result.report.read_text()
    assert f"the share of each image&#x27;s visual tokens, of {result.sizes}, left at" in page
    assert "a power of the distance" in page
    assert "Growth is P of the last" not in page


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "InternVL"])
def test_a_mean_over_layers_is_the_share_of_every_image(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some(monkeypatch, ("FastV",))
    settings = replace(SETTINGS, keeps=(0.6,), average=True)
    found = survey.run(**given(name, tmp_path, settings=settings, about=ABOUT))
    whole, fastv, _ = found.outcomes
    assert fastv.budget == "mean 0.6"
    pairs = zip(whole.answers, fastv.answers, strict=True)
    for one, other in pairs:
        seen = len(one.kept[0])
        assert other.mean_tokens == pytest.approx(0.6 * seen, abs=1)  # whole tokens
    assert not found.left_out


def test_corrections_over_positions_of_one_size_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some(monkeypatch, ("FastV",))
    names = ("spline", "per head", "distance", "distance, power", "RoPE prior", "without RoPE")
    found = comparing.run(
        **given("Qwen2.5-VL", tmp_path, settings=SETTINGS, source="cal", names=names)
    )
    made = [one.setting.correction for one in found.compared]
    assert made == ["none", "none", "distance", "distance, power", "RoPE prior", "without RoPE"]
    reasons = {one.method: one.reason for one in found.left_out}
    assert reasons.keys() == {"FastV, spline", "FastV, per head"}
    assert all("no position has a mean" in reason for reason in reasons.values())


def test_flops_that_are_not_known_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some(monkeypatch, ("FastV",))
    out = tmp_path / "survey"
    few = {
        "calibration": list(load_samples("embedded:calibration:mixed", limit=2)),
        "test": list(load_samples("embedded:test:mixed", limit=2)),
        "settings": SETTINGS,
    }
    found = survey.run(**given("Gemma 4", out, about=ABOUT, **few))
    assert [(one["method"], one["flops"]) for one in found.records] == [
        ("unpruned", None),
        ("FastV", None),
        ("FastV", None),
    ]
    assert not found.left_out
    assert (out / "pore.png").exists()
    assert not (out / "accuracy.png").exists()
    assert "FLOPs of this model are not known" in found.report.read_text()
    out = tmp_path / "comparison"
    names = ("distance", "RoPE prior")
    asked = comparing.run(**given("Gemma 4", out, source="cal", names=names, **few))
    assert [one.record()["flops"] for one in asked.compared] == [None] * 3
    (left_out,) = asked.left_out  # and the host is asked all the same
    assert (left_out.method, "no `rope_theta`" in left_out.reason) == ("FastV, RoPE prior", True)
