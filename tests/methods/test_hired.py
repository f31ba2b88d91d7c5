"""HiRED: budgets by region, exact by default, and how the authors' code differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPVisionConfig

import pore
from cases import CASES
from helpers.golden_files import Made, draw
from helpers.golden_models import tower_view
from helpers.golden_prompts import model_around
from methods import golden_hired
from pore.errors import BudgetError
from pore.families.registry import family_of
from pore.layout import Tiling
from pore.methods.hired import bands, ranks_of, regions, truncated_shares
from pore.tower.stages import TowerSelection, TowerView

SIDE = 6
N = SIDE * SIDE


def tiling_of(grid: tuple[int, int], cut: tuple[int, int] = (0, 0)) -> Tiling:
    """Tiles of 6 x 6 patches, of whose canvas some rows or columns on either side are padding."""
    rows, columns = (side * SIDE for side in grid)
    slots = [*range(N)]
    for r in range(cut[0], rows - cut[0]):
        for c in range(cut[1], columns - cut[1]):
            tile = r // SIDE * grid[1] + c // SIDE + 1
            slots.append(tile * N + r % SIDE * SIDE + c % SIDE)
        slots.append(-1)
    return Tiling(grid[0] * grid[1] + 1, grid, N, tuple(slots))


tilings = st.builds(
    tiling_of,
    st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 2)]),
    st.sampled_from([(0, 0), (1, 0), (0, 2), (2, 0)]),
)


def view_of(tilings: tuple[Tiling, ...] | None, images: int, seed: int) -> TowerView:
    generator = torch.Generator().manual_seed(seed)
    count = images if tilings is None else sum(tiling.tiles for tiling in tilings)
    attention = torch.rand(2, count, 3, N, generator=generator)
    return tower_view(torch.randn(count, N, 2), attention, tilings=tilings)


def kept(selection: TowerSelection) -> list[list[int]]:
    valid = selection.valid
    if valid is None:
        valid = torch.ones_like(selection.raster, dtype=torch.bool)
    return [row[ok].tolist() for row, ok in zip(selection.raster, valid, strict=True)]


@given(tilings, tilings, st.data(), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(0, 99))
def test_budget_is_exact_and_the_best_of_every_tile_stay(
    one: Tiling, other: Tiling, data: st.DataObject, alpha: float, seed: int
) -> None:
    keep = data.draw(st.integers(1, min(len(one.shown), len(other.shown))))
    view = view_of((one, other), 0, seed)
    found = kept(pore.HiRED(keep, alpha)._select(view))
    assert sum(map(len, found[: one.tiles])) == sum(map(len, found[one.tiles :])) == keep
    late = view.cls_attention[1].sum(1)
    for tile, (row, scores, shown) in enumerate(zip(found, late, view.shown, strict=True)):
        best = scores.masked_fill(~shown, -1.0).argsort(descending=True)[: len(row)]
        assert row == best.sort().values.tolist(), tile
    # One image does not see another.
    for tiling, part in ((one, slice(0, one.tiles)), (other, slice(one.tiles, None))):
        attention = view.cls_attention[:, part]
        alone = tower_view(view.features[part], attention, tilings=(tiling,))
        assert kept(pore.HiRED(keep, alpha)._select(alone)) == found[part]


@given(st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 3), (3, 2)]))
def test_a_patch_counts_for_the_tile_that_shows_it(grid: tuple[int, int]) -> None:
    where = regions(tiling_of(grid)).view(SIDE, SIDE)
    for r in range(SIDE):
        for c in range(SIDE):
            assert where[r, c] == r * grid[0] // SIDE * grid[1] + c * grid[1] // SIDE


def test_padding_of_the_canvas_is_no_part_of_the_whole_image() -> None:
    # Of 6 x 12 patches the middle 6 x 8 are shown: 4 of each tile.
    where = regions(tiling_of((1, 2), (0, 2))).view(SIDE, SIDE)
    assert where.tolist() == [[0, 0, 0, 1, 1, 1]] * SIDE
    # Of 18 x 6 the middle 14 x 6: 4, 6 and 4 rows.
    where = regions(tiling_of((3, 1), (2, 0))).view(SIDE, SIDE)
    assert where[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_tiles_are_given_what_the_first_layer_looks_at() -> None:
    """A quarter of the image, where the authors' bands see two runs of rows."""
    tiling = tiling_of((2, 2))
    view = view_of((tiling,), 0, 0)
    early = torch.zeros(SIDE, SIDE)
    early[:3, 3:] = 1.0  # top right
    attention = view.cls_attention.clone()
    attention[0, 0] = early.flatten()
    view = tower_view(view.features, attention, tilings=(tiling,))
    pruner = pore.HiRED(keep=20, alpha=0.75)  # the map is of 9 patches
    assert [len(row) for row in kept(pruner._select(view))] == [15, 0, 5, 0, 0]
    theirs = pore.HiRED(keep=20, alpha=0.75, faithful=True)
    # Rows 0 to 2 are bands 0 and 1, of 9 patches each in raster order: 3 hits and 6.
    assert [len(row) for row in kept(theirs._select(view))] == [15, 1, 3, 0, 0]


@given(st.integers(1, N), st.integers(0, 99))
def test_an_image_in_one_piece_is_fastervlm(keep: int, seed: int) -> None:
    view = view_of(None, 3, seed)
    got = pore.HiRED(keep)._select(view)
    expected = pore.FasterVLM(keep)._select(
        tower_view(view.features, view.cls_attention[1:].double())
    )
    assert torch.equal(got.raster, expected.raster)


class TestFaithful:
    def test_fractions_are_rounded_down_and_count_padding(self) -> None:
        view = view_of(None, 1, 0)
        assert len(kept(pore.HiRED(0.1)._select(view))[0]) == 4  # of 3.6
        assert len(kept(pore.HiRED(0.1, faithful=True)._select(view))[0]) == 3
        tiling = tiling_of((1, 2), (2, 0))  # 60 of 108 patches are shown
        view = view_of((tiling,), 0, 0)
        assert sum(map(len, kept(pore.HiRED(0.5)._select(view)))) == 30
        theirs = kept(pore.HiRED(0.5, faithful=True)._select(view))
        assert len(theirs[0]) == 27
        assert 52 <= sum(map(len, theirs)) <= 54
        shown = view.shown
        assert any(not shown[t, i] for t, row in enumerate(theirs) for i in row)

    def test_refuses_where_the_authors_code_stops(self) -> None:
        with pytest.raises(BudgetError, match="5 equal runs"):
            bands(N, 5)
        view = view_of((tiling_of((1, 2)),), 0, 0)
        with pytest.raises(BudgetError, match="divides by zero"):
            pore.HiRED(80, 1.0, faithful=True)._select(view)
        assert sum(map(len, kept(pore.HiRED(80, 1.0)._select(view)))) == 80
        with pytest.raises(BudgetError, match="rounds down to none"):
            pore.HiRED(0.001, faithful=True)._select(view)
        with pytest.raises(BudgetError, match="0 tokens in every tile"):
            pore.HiRED(1, faithful=True)._select(view)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_must_be_a_share(alpha: float) -> None:
    with pytest.raises(BudgetError, match="alpha"):
        pore.HiRED(keep=5, alpha=alpha)


def test_ends_of_rows_stay_unless_faithful() -> None:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        image_size=48, patch_size=8, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = model_around(vision, torch.randn(40, 8), [2, 2])
    inputs: dict[str, Tensor] = {"image_sizes": torch.tensor([[96, 60]])}
    (tiling,) = family_of(model).tilings(model, inputs)
    ids = [1, *[model.config.image_token_id] * len(tiling.slots), 2]
    inputs |= {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(1, 5, 3, 48, 48)}
    newlines = tiling.slots.count(-1)
    assert newlines == 12
    for faithful in (False, True):
        pruner = pore.HiRED(keep=40, faithful=faithful)
        with torch.no_grad(), pruner(model) as run:
            model(**inputs)
        (sample,) = run.report.samples
        count = len(sample.images[0].kept)
        assert count == 40 or (faithful and count < 40)
        assert sample.tokens[0] == 2 + count + (0 if faithful else newlines)


def test_faithful_lays_out_a_grid_that_is_not_square_as_if_transposed() -> None:
    """Two tiles side by side come one over the other, and the sides of that are cut off."""
    side, shown = 4, tuple(range(16)) + tuple(range(16, 48))
    tiling = Tiling(3, (1, 2), side * side, shown, size=(32, 64))
    ranks = ranks_of(tiling)
    assert ranks[0].tolist() == list(range(16))
    # An image twice as wide as high, on a canvas twice as high as wide: 2 of 8 rows are left.
    canvas = torch.arange(16, 48).view(8, 4)[3:5].flatten()
    left = (ranks.flatten() >= 0).nonzero().flatten()
    assert sorted(left.tolist()) == [*range(16), *canvas.tolist()]
    assert ranks.flatten()[canvas].tolist() == list(range(16, 24))
    square = Tiling(5, (2, 2), 4, tuple(range(20)), size=(10, 10))
    assert ranks_of(square).flatten().tolist() == list(range(20))


def test_faithful_in_the_engine_where_the_grid_is_not_square() -> None:
    """What the transposed layout cuts off never reaches the decoder; by default all does."""
    case = next(case for case in CASES if case.name == "LLaVA-NeXT")
    inputs = case.inputs([[5, -2, 7, 8]])  # 20 x 60 pixels: one row of two tiles
    with torch.no_grad():
        with pore.HiRED(keep=20)(case.model()) as run:
            case.model()(**inputs)
        (image,) = run.report.samples[0].images
        assert len(image.kept) + image.extra == 20
        with pore.HiRED(keep=20, faithful=True)(case.model()) as run:
            case.model()(**inputs)
        (image,) = run.report.samples[0].images
        assert len(image.kept) + image.extra < 20
        (tiling,) = family_of(case.model()).tilings(case.model(), inputs)
        ranks = ranks_of(tiling).flatten()
        assert all(ranks[tiling.shown[place]] >= 0 for place in image.kept)


# -- the checker of golden files, on files made here -----------------------------------------------


def hired_file(rate: float, alpha: float, images: int, seed: int) -> Made:
    """Images of 2 x 2 tiles and the whole one, 36 patches and 3 heads each."""
    n, tiles = 36, 5
    top, bottom = (draw(seed + i, images * tiles, 3, n).exp().softmax(-1) for i in range(2))
    masks, counts = [], []
    for b in range(images):
        own = slice(b * tiles, (b + 1) * tiles)
        first, last = top[own].sum(1), bottom[own].sum(1)
        total = int(tiles * n * rate)
        whole = min(int(total * alpha), n)
        sub = min(total - whole, (tiles - 1) * n)
        budgets = [whole, 0, 0, 0, 0]
        if sub > 0:
            marked = sorted(range(n), key=lambda t: -float(first[0, t]))[: int(n * (1 - alpha))]
            hits = [sum(t // (n // 4) == band for t in marked) for band in range(4)]
            for band, hit in enumerate(hits):
                share = np.float32(hit) / np.float32(sum(hits))  # tensors of torch: float32
                budgets[band + 1] = min(int(np.float32(share * np.float32(sub))), n)
        mask = torch.zeros(tiles, n, dtype=torch.bool)
        for tile, budget in enumerate(budgets):
            mask[tile, sorted(range(n), key=lambda t: -float(last[tile, t]))[:budget]] = True
        masks.append(mask)
        counts += budgets
    tensors = {
        "top_cls_attention_heads": top,
        "bottom_cls_attention_heads": bottom,
        "image_sizes": torch.tensor([[96, 96]] * images),
        "mask": torch.cat(masks),
        "num_patches": torch.tensor([tiles] * images),
        "tokens_per_patch": torch.tensor(counts),
    }
    params = {
        "token_budget_rate": rate, "alpha": alpha, "heads": 3, "num_vision_tokens": n,
        "image_sizes": [[96, 96]] * images, "image_grid_pinpoints": [[96, 96]], "image_size": 48,
    }  # fmt: skip
    return Made(params, tensors)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.45, 0.7])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1 / 3, 0.5, 0.75])
def test_hired(rate: float, alpha: float) -> None:
    for seed in range(3):
        golden_hired.check(hired_file(rate, alpha, 1 + seed % 2, seed))


def test_shares_of_hired_are_cut_off_in_single_precision() -> None:
    """7 of 24 hits of 216 are 63; the authors' tensors give 62.99999."""
    assert truncated_shares([7, 17], 216) == [62, 153]
    assert truncated_shares([3, 8], 55) == [15, 40]
    assert truncated_shares([5, 0, 5], 11) == [5, 0, 5]
