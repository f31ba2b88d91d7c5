"""The demo for images of any size: photographs of mixed sizes, tiles, and what such models lack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoint import save_checkpoint
from helpers.pages import checked_page
from pore.bias.any_size import AnySizeBias
from pore.data.loading import load_model
from pore.data.sources import load_samples
from pore.errors import BudgetError, InputError
from pore.evaluation import demo
from pore.evaluation.results import About, DemoResult, DemoSettings
from processors import KINDS
from processors.base import parts_or_skip

pytestmark = pytest.mark.slow

SETTINGS = DemoSettings(layer=1, keeps=(0.5,), batch_size=2, example_keep=0.5)
NAMES = {str(kind): kind for kind in KINDS}


def run_demo(name: str, out: Path, **changes: Any) -> DemoResult:
    processor, model = parts_or_skip(NAMES[name])
    given: dict[str, Any] = {
        "calibration": load_samples("embedded:calibration:mixed", limit=4),
        "test": load_samples("embedded:test:mixed", limit=4),
        "out": out,
        "settings": SETTINGS,
        "about": About("a model", "pore demo", "cal", "test", {}),
    }
    return demo.run(model, processor, **(given | changes))


@pytest.fixture(scope="module", params=["Qwen2.5-VL", "LLaVA-NeXT", "Gemma 4", "Qwen3.5"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(request.param, tmp_path_factory.mktemp("demo"))


def test_p_is_a_function_of_the_distance(result: DemoResult) -> None:
    assert isinstance(result.bias, AnySizeBias)
    assert (result.bias.over, result.bias.kind) == ("distance", "power")
    folder = result.report.parent
    assert AnySizeBias.load(folder / "profile.json") == result.bias
    assert {"any_size.png", "results.json", "report.html"} <= {p.name for p in folder.iterdir()}


def test_every_image_keeps_its_own_share(result: DemoResult) -> None:
    unpruned, *pruned = result.outcomes
    sizes = [len(answer.kept[0]) for answer in unpruned.answers]
    assert len(set(sizes)) > 1
    for outcome in pruned:
        kept = [len(answer.kept[0]) for answer in outcome.answers]
        if outcome.method == "Downsample":  # may need a few more for a decent grid
            assert all(n / 2 <= k < 0.75 * n for n, k in zip(sizes, kept, strict=True))
        else:
            assert kept == [round(n / 2) for n in sizes]


def test_what_a_model_does_not_take_is_left_out_and_named(result: DemoResult) -> None:
    asked = [outcome.label for outcome in result.outcomes[1:]]
    every = ["FastV", "FastV + PoRe", "FastV + RoPE prior", "Random", "Downsample"]
    assert asked == [name for name in every if name not in result.left_out]
    page = result.report.read_text()
    for name, reason in result.left_out.items():
        assert name in every
        assert f"{name} was left out" in page
        assert reason.split(".")[0] in page
    tiles = any(answer.kept[0][-1] >= 1400 for answer in result.outcomes[0].answers)
    assert ("fill no grid" in result.left_out.get("Downsample", "")) == tiles
    flops = {outcome.record()["flops"] for outcome in result.outcomes}
    assert (flops == {None}) == ("FLOPs of this model are not known" in page)


def test_the_page_shows_every_method_that_drops_tokens(result: DemoResult) -> None:
    drawn = sum(outcome.method != "Downsample" for outcome in result.outcomes[1:])
    assert {len(example.paths) for example in result.examples} == {drawn}
    page = checked_page(result.report.read_text())
    figures = len(result.figures) + (result.records[0]["flops"] is not None)
    pair = 2 * any(example.only_ours for example in result.examples)
    assert len(page.all("img")) == figures + pair + drawn * len(result.examples)
    assert "a power of it, fitted to the geometric mean" in result.report.read_text()


def test_tokens_that_cannot_be_averaged_are_not(tmp_path: Path) -> None:
    found = run_demo("Qwen3-VL", tmp_path)
    assert "add features to every visual token" in found.left_out["Downsample"]


def test_a_budget_that_an_image_cannot_meet_is_known_first(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="more visual tokens than there are"):
        run_demo("Qwen2.5-VL", tmp_path, settings=replace(SETTINGS, keeps=(290,)))
    assert not list(tmp_path.iterdir())


def test_samples_without_images_are_refused(tmp_path: Path) -> None:
    model, processor = load_model(str(save_checkpoint(tmp_path / "model")))
    test = [replace(s, image=None) for s in load_samples("embedded:test", limit=3)]
    with pytest.raises(InputError, match="The samples have no images"):
        demo.run(
            *(model, processor),
            calibration=test,
            test=test,
            out=tmp_path / "out",
            settings=SETTINGS,
            about=About("a model", "pore demo", "cal", "test", {}),
        )
