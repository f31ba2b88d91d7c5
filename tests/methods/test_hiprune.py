"""HiPrune: anchors, buffers, registers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.golden_models import tower_view
from helpers.models import batch, prompt, tiny_llava
from pore.cost.named import model_shape
from pore.errors import BudgetError, InputError
from pore.methods.hiprune import neighbours
from pore.tensors.attention import received_attention
from pore.tower.stages import TowerSelection


def selected(
    pruner: pore.HiPrune, side: int, images: int = 1, seed: int = 0, cls: int = 1
) -> tuple[TowerSelection, tuple[Tensor, ...]]:
    """What the rule keeps of random patches, and the attention they received in both layers."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (
        tuple(torch.randn(2, images, 2, side * side + cls, 4, generator=generator).double())
        for _ in range(2)
    )
    received = tuple(
        received_attention(q, k, 0.5).mean(1)[:, cls:] for q, k in zip(queries, keys, strict=True)
    )
    features = torch.arange(side * side)[None, :, None].expand(images, -1, 1)
    view = tower_view(features, torch.empty(0), queries=queries, keys=keys)
    (stage,) = pruner.stages()
    return stage.rule(view), received


def around(places: list[int], height: int, width: int) -> set[int]:
    """By hand: the neighbours on a grid."""
    found = set()
    for place in places:
        row, column = divmod(place, width)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < height and 0 <= c < width:
                found.add(r * width + c)
    return found


class TestSelection:
    @given(
        st.integers(1, 6), st.data(), st.floats(0, 1), st.integers(0, 99), st.sampled_from([0, 1])
    )
    def test_anchors_buffers_registers(
        self, side: int, data: Any, alpha: float, seed: int, cls: int
    ) -> None:
        keep = data.draw(st.integers(1, side * side))
        pruner = pore.HiPrune(keep, alpha=alpha)
        selection, (objects, deep) = selected(pruner, side, images=2, seed=seed, cls=cls)
        count = min(round(keep * alpha / 5), keep // 5)
        for raster, first, last in zip(selection.raster.tolist(), objects, deep, strict=True):
            anchors = first.argsort(descending=True)[:count].tolist()
            kept = set(anchors) | around(anchors, side, side)
            others = [i for i in last.argsort(descending=True).tolist() if i not in kept]
            kept |= set(others[: keep - len(kept)])
            assert raster == sorted(kept)
            assert len(raster) == keep

    @given(st.integers(5, 36), st.floats(0, 1), st.integers(0, 99))
    def test_as_the_authors_or_an_error(self, keep: int, alpha: float, seed: int) -> None:
        """By hand, with their indices: clamped, and across the ends of rows."""
        pruner = pore.HiPrune(keep, alpha=alpha, faithful=True)
        count = round(keep * alpha / 5)
        _, (objects, deep) = selected(pore.HiPrune(keep), 6, seed=seed)
        anchors = objects[0].argsort(descending=True)[:count].tolist()
        steps = (0, -1, 1, -6, 6)
        kept = {min(max(place + step, 0), 35) for place in anchors for step in steps}
        if len(kept) > keep:
            with pytest.raises(BudgetError, match="authors' code stops"):
                selected(pruner, 6, seed=seed)
            return
        others = [i for i in deep[0].argsort(descending=True).tolist() if i not in kept]
        kept |= set(others[: keep - len(kept)])
        assert selected(pruner, 6, seed=seed)[0].raster[0].tolist() == sorted(kept)

    @given(st.integers(1, 7), st.integers(1, 7), st.data(), st.booleans())
    def test_neighbours(self, height: int, width: int, data: Any, wrap: bool) -> None:
        last = height * width - 1
        places = data.draw(st.lists(st.integers(0, last), unique=True))
        mask = torch.zeros(1, last + 1, dtype=torch.bool)
        mask[0, places] = True
        wrapped = {min(max(p + s, 0), last) for p in places for s in (-1, 1, -width, width)}
        got = set(neighbours(mask, (height, width), wrap=wrap)[0].nonzero()[:, 0].tolist())
        assert got == (wrapped if wrap else around(places, height, width))

    def test_the_difference(self) -> None:
        """An anchor at the end of a row: the authors take the start of the next one along."""
        mask = torch.zeros(1, 16, dtype=torch.bool)
        mask[0, 7] = True
        assert neighbours(mask, (4, 4))[0].nonzero()[:, 0].tolist() == [3, 6, 11]
        assert neighbours(mask, (4, 4), wrap=True)[0].nonzero()[:, 0].tolist() == [3, 6, 8, 11]


class TestModel:
    def test_the_layers_read(self) -> None:
        """Keeps what hand-made selections from the tower's own attention keep."""
        model, inputs = tiny_llava(tower_layers=4), batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)])
        with torch.no_grad(), pore.HiPrune(10, alpha=0.5, object_layer=1)(model) as run:
            model(**inputs)
        tower = tiny_llava(tower_layers=4, attention="eager").model.vision_tower
        out = tower(inputs["pixel_values"], output_attentions=True)
        objects, deep = (out.attentions[i].mean((1, 2))[:, 1:] for i in (1, 2))
        images = [image for sample in run.report for image in sample.images]
        for image, first, last in zip(images, objects, deep, strict=True):
            anchor = int(first.argmax())
            kept = {anchor} | around([anchor], 4, 4)
            others = [i for i in last.argsort(descending=True).tolist() if i not in kept]
            assert list(image.kept) == sorted(kept | set(others[: 10 - len(kept)]))

    def test_usual_scales_with_the_tower(self) -> None:
        shape = model_shape("llava-1.5-7b")
        assert pore.HiPrune.usual(64, shape).object_layer == 8
        assert pore.HiPrune.usual(64, model_shape("llava-1024x12")).object_layer == 1


class TestBadInput:
    @pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
    def test_alpha(self, alpha: float) -> None:
        with pytest.raises(BudgetError, match="choose 0 to 1"):
            pore.HiPrune(4, alpha=alpha)

    def test_a_layer_that_the_tower_lacks(self) -> None:
        with pytest.raises(BudgetError, match="8"), pore.HiPrune(4)(tiny_llava()):
            pass

    def test_patches_on_no_square(self) -> None:
        view = tower_view(
            torch.zeros(1, 6, 1),
            torch.empty(0),
            queries=(torch.zeros(1, 1, 7, 2),) * 2,
            keys=(torch.zeros(1, 1, 7, 2),) * 2,
        )
        (stage,) = pore.HiPrune(4).stages()
        with pytest.raises(InputError, match="square"):
            stage.rule(view)
