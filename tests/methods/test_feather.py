"""FEATHER: scores without RoPE, the grid, budgets, settings that cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from helpers.models import N, batch, prompt, tiny_llava
from pore.engine.stages import Selection, View
from pore.errors import BudgetError, ProfileMismatchError
from pore.families.registry import shape_of
from pore.layout import Image, Layout, Tiling
from pore.methods.feather import on_grid


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=6)


def view_of(scores: Tensor, layout: Layout, **more: Any) -> View:
    states = torch.zeros(*layout.tokens.shape, 1)
    return View(layout, states, scores, None, torch.Generator(), norm=lambda x: x, **more)


def layout_of(*images: Image, length: int = 80) -> Layout:
    return Layout.of(images, torch.ones(1, length, dtype=torch.bool))


def scores_of(*values: float) -> Tensor:
    return torch.tensor([values])


class Noting(pore.FEATHER):
    """FEATHER that notes what it saw."""

    def _select(self, stage: int, view: View) -> Selection:
        seen.append(view.attention)
        return super()._select(stage, view)


seen: list[Tensor] = []


class TestScores:
    def test_they_are_the_definition(self, model: Any) -> None:
        inputs = batch([prompt(3, 1, 5)])
        seen.clear()
        with torch.no_grad(), Noting(6, (2, 4))(model):
            states = model(**inputs, output_hidden_states=True).hidden_states[1]
        block = model.model.language_model.layers[1]
        states = block.input_layernorm(states)[0]
        query = block.self_attn.q_proj(states[-1]).view(4, 8)
        keys = block.self_attn.k_proj(states[3 : 3 + N]).view(N, 2, 8)
        heads = [(keys[:, head // 2] @ query[head] / 8**0.5).softmax(0) for head in range(4)]
        torch.testing.assert_close(seen[0][0], torch.stack(heads).mean(0))

    def test_positions_do_not_matter(self, model: Any) -> None:
        inputs, kept = batch([prompt(3, 1, 5)]), []
        for step in (1, 7):
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None] * step
            with torch.no_grad(), pore.FEATHER(6, (1,), stride=None)(model) as run:
                model(**inputs)
            kept.append(run.report.samples[0].images[0].kept)
        assert kept[0] == kept[1]

    def test_a_bias_divides_them_and_leaves_the_grid(self, model: Any) -> None:
        image = Image(0, 0, range(1, 17), (4, 4))
        scores = torch.linspace(1, 2, 16)[None]
        bias = pore.PositionBias.exponential(1.0, 16)
        for stage in (0, 1):
            view = view_of(scores, layout_of(image), correction=bias)
            kept = pore.FEATHER(2, (1, 2), reweight=bias)._select(stage, view).keep[0]
            ratio = scores[0] / torch.as_tensor(bias.values)
            best = ratio.argsort(descending=True).tolist()
            grid = [0, 3, 12, 15] if stage == 0 else []
            count = int(kept.sum())
            expected = grid + [i for i in best if i not in grid][: count - len(grid)]
            assert kept.nonzero()[:, 0].tolist() == sorted(expected)

    def test_biases_of_another_number_of_stages_are_refused(self) -> None:
        bias = pore.PositionBias.exponential(0.1, 16)
        with pytest.raises(ProfileMismatchError, match="for 2 stages"):
            pore.FEATHER(6, (1, 2), reweight=(bias,) * 3)


class TestGrid:
    def marked(self, image: Image, stride: int = 3) -> list[int]:
        layout = layout_of(image)
        return layout.raster[on_grid(layout, stride) & layout.valid].tolist()

    def test_every_third_row_and_column(self) -> None:
        assert self.marked(Image(0, 0, range(1, 26), (5, 5))) == [0, 3, 15, 18]
        assert self.marked(Image(0, 0, range(1, 13), (2, 6))) == [0, 3]
        assert self.marked(Image(0, 0, range(1, 13), (6, 2))) == [0, 6]
        assert self.marked(Image(0, 0, range(1, 10), (3, 3)), 1) == list(range(9))

    def test_an_image_of_no_known_grid(self) -> None:
        assert self.marked(Image(0, 0, range(1, 17))) == [0, 3, 12, 15]  # as if it were a square
        assert self.marked(Image(0, 0, range(1, 13))) == [0, 9]

    def test_each_tile_has_one(self) -> None:
        tiling = Tiling(2, (1, 1), 16, (*range(16), -1, *range(16, 32)))
        marked = self.marked(tiling.image(0, 0, range(1, 34)))
        assert marked == [0, 3, 12, 15, 16, 19, 28, 31]

    def test_each_frame_of_a_video_has_one(self) -> None:
        tiling = Tiling(1, None, 16, tuple(range(16)), video=(2, 2, 4))
        assert self.marked(tiling.image(0, 0, range(1, 17))) == [0, 3, 8, 11]

    def test_tokens_that_show_no_patch_are_on_none(self) -> None:
        layout = layout_of(Image(0, 0, range(1, 17), (4, 4)))
        layout.raster[0, 0] = -1
        assert layout.raster[on_grid(layout, 3)].tolist() == [3, 12, 15]


class TestBudget:
    def test_the_default_is_exact(self) -> None:
        # The cube root of 2 of 16 is a half: 8 by score, and 4 of the grid.
        method = pore.FEATHER(2, (1, 2))
        assert method.remaining(16) == [12, 2]
        assert method.counts(16, 4) == [16, 12, 2, 2]
        assert pore.FEATHER(1.0, (1, 2)).remaining(16) == [16, 16]
        assert pore.FEATHER(20, (8, 16)).remaining(729) == [219 + 81, 20]
        scores = scores_of(*(float(i) for i in range(16)))
        view = view_of(scores, layout_of(Image(0, 0, range(1, 17), (4, 4))))
        kept = method._select(0, view).keep[0].nonzero()[:, 0].tolist()
        assert kept == [0, 3, *range(6, 16)]  # 12 and 15 of the grid are among the best

    def test_the_authors_is_a_union(self) -> None:
        method = pore.FEATHER(0.5, (1, 2), faithful=True)
        scores = scores_of(*(float(i) for i in range(16)))
        view = view_of(scores, layout_of(Image(0, 0, range(1, 17), (4, 4))))
        kept = method._select(0, view).keep[0].nonzero()[:, 0].tolist()
        assert kept == [0, 3, *range(8, 16)]
        kept = method._select(1, view).keep[0].nonzero()[:, 0].tolist()
        assert kept == [12, 13, 14, 15]
        with pytest.raises(BudgetError, match="depends on the image"):
            method.counts(16, 4)

    def test_images_of_a_batch_may_then_differ(self, model: Any) -> None:
        inputs = batch([prompt(3, 1, 5), prompt(7, 1, 2, 1), prompt(1, 1, 4, 2)])
        method = pore.FEATHER(0.5, (2, 4), faithful=True)
        with torch.no_grad(), method(model) as run:
            model(**inputs)
        for sample in run.report:
            (image,) = sample.images
            (_, first), (_, last) = image.stages
            assert {0, 3, 12, 15} < set(first)
            assert 8 <= len(first) <= 12
            assert len(last) == len(first) // 4

    def test_fractions_are_those_of_the_authors(self) -> None:
        share = 1 - 0.7
        assert pore.FEATHER(share, (3,), None, faithful=True).remaining(729) == [218]
        assert pore.FEATHER(share, (3, 5), None, faithful=True).remaining(729) == [218, 65]

    def test_without_a_grid_equal_ratios_lead_to_the_last(self) -> None:
        assert pore.FEATHER(4, (1, 2), stride=None).remaining(16) == [8, 4]

    def test_usual(self, model: Any) -> None:
        shape = shape_of(model.config)
        assert pore.FEATHER.usual(5, shape) == pore.FEATHER(5, (1, 3))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"keep": 3, "faithful": True}, "not a number of tokens such as 3"),
            ({"keep": 3, "layers": (8,)}, "give two layers"),
            ({"keep": 3, "stride": 0}, "stride must be a whole number"),
            ({"keep": 0.0}, "not a fraction"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, settings: Any, words: str) -> None:
        with pytest.raises(BudgetError, match=words):
            pore.FEATHER(**settings)

    def test_shares_that_leave_nothing_are_refused(self) -> None:
        with pytest.raises(BudgetError, match="keeps none of 16 visual tokens"):
            pore.FEATHER(0.01, (1,), None, faithful=True).remaining(16)
        with pytest.raises(BudgetError, match="more visual tokens than there are"):
            pore.FEATHER(17, (1, 2)).remaining(16)
