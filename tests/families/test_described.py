"""Models that pore does not know, described by the user in a few lines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import pore
from helpers.described import Described
from helpers.engine import fingerprint
from helpers.families import PROMPTS, check_cached_decode, check_masked_dense, forward, together
from pore.engine.pruner import Pruner
from pore.engine.stages import Stage
from pore.errors import InputError, UnsupportedModelError
from pore.families.registry import families, family_of

METHODS = [pore.FastV(6), pore.DivPrune(6), pore.PyramidDrop(keep=6, layers=(1, 2, 4))]


@dataclass(frozen=True)
class InPlace(Pruner):
    """A method whose tokens keep their positions, so that it equals a masked dense forward."""

    method: Pruner

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.method.name

    def stages(self) -> list[Stage]:
        found = (stage for stage in self.method.stages() if isinstance(stage, Stage))
        return [replace(stage, positions="original") for stage in found]


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[pore.Family]]:
    """What a test describes is forgotten after it."""
    known = dict(pore.Family.registry)
    monkeypatch.setattr(pore.Family, "registry", known)
    return known


CASE = Described()


def describe(**body: Any) -> type[pore.Family]:
    """A description as a user writes it."""
    return type("MyVLM", (pore.Family,), {"name": "My VLM", "model_types": ("my_vlm",), **body})


def test_an_unknown_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedModelError, match=r"subclass of pore\.Family.*'my_vlm'"):
        pore.FastV(6)(CASE.model())


@pytest.mark.parametrize("grid", [(4, 4), None], ids=["grid", "runs"])
@pytest.mark.parametrize("pruner", METHODS, ids=lambda pruner: pruner.name)
class TestInvariants:
    """Without a grid every unbroken run is an image, with one, as many tokens as it has places."""

    @pytest.fixture(autouse=True)
    def described(self, registry: object, grid: tuple[int, int] | None) -> None:
        describe(grid=lambda *_: grid) if grid else describe()

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("situation", ["single", "ragged", "several", "without"])
    def test_equals_masked_dense(self, pruner: Pruner, situation: str, side: str) -> None:
        check_masked_dense(CASE, InPlace(pruner), PROMPTS[situation], side)

    @pytest.mark.parametrize("situation", ["ragged", "several"])
    def test_cached_decode(self, pruner: Pruner, situation: str) -> None:
        check_cached_decode(CASE, pruner, PROMPTS[situation])

    def test_keep_all_and_what_is_left_behind(self, pruner: Pruner) -> None:
        inputs, before = CASE.inputs(PROMPTS["several"]), fingerprint(CASE.model())
        everything = replace(pruner, keep=1.0)  # type: ignore[type-var]
        logits, run = together(CASE, everything, inputs)
        assert torch.equal(logits, forward(CASE, inputs))
        assert [image.seen for sample in run.report for image in sample.images] == [16] * 3
        assert fingerprint(CASE.model()) == before


def test_a_grid_parts_images_that_touch() -> None:
    describe(grid=lambda *_: (4, 4))
    _, run = together(CASE, pore.FastV(6), CASE.inputs([[5, -1, -2, 7]]))
    assert [image.grid for image in run.report.samples[0].images] == [(4, 4)] * 2
    describe()
    _, run = together(CASE, pore.FastV(6), CASE.inputs([[5, -1, -2, 7]]))
    assert [image.seen for image in run.report.samples[0].images] == [32]


def test_a_class_defined_once_more_takes_its_own_place() -> None:
    """As a cell of a notebook that runs again."""
    describe(name="First")
    second = describe(name="Second")
    assert type(family_of(CASE.model())) is second
    assert families()["my_vlm"].name == "Second"


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ({"name": "Other", "model_types": ("other", "my_vlm")}, "model type 'my_vlm'"),
        ({"name": "My VLM", "model_types": ("other",)}, "family name 'My VLM'"),
        ({"name": "Other", "model_types": ("llava",)}, "model type 'llava'"),
    ],
)
def test_a_name_that_another_family_has_is_refused(
    body: dict[str, Any], taken: str, registry: dict[str, type[pore.Family]]
) -> None:
    mine, before = describe(), dict(registry)
    with pytest.raises(InputError, match=f"Other has the {taken} of .*whose place it then takes"):
        type("Other", (pore.Family,), body)
    assert registry == before
    assert registry["my_vlm"] is mine


def test_a_subclass_may_take_the_place_of_its_family() -> None:
    kind = type("Other", (describe(),), {"model_types": ("my_vlm", "other")})
    assert type(family_of(CASE.model())) is kind


@pytest.mark.parametrize("placeholder", [100, "visual_token"])
def test_the_placeholder_by_number_or_name(placeholder: int | str) -> None:
    CASE.model().config.visual_token = 100
    describe(placeholder=placeholder)
    _, run = together(CASE, pore.FastV(6), CASE.inputs(PROMPTS["single"]))
    assert len(run.report.samples[0].images[0].kept) == 6


def test_the_tower_is_left_alone() -> None:
    describe()
    with pytest.raises(UnsupportedModelError, match="nothing is said of its tower"):
        pore.VisionZip(6)(CASE.model()).__enter__()


def test_a_string_of_model_types_is_refused() -> None:
    with pytest.raises(InputError, match=r"a tuple: \('my_vlm',\)"):
        describe(model_types="my_vlm")


def test_a_placeholder_of_the_answer_is_no_image() -> None:
    describe()
    inputs = CASE.inputs([[5, 6, 7]])
    inputs["input_ids"][0, 1] = 100
    with pore.FastV(6)(CASE.model()) as run:
        forward(CASE, inputs)
    assert run.report.samples[0].images == ()
