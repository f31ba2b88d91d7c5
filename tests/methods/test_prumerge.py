"""PruMerge and PruMerge+: exact budgets, images of different counts, and the authors' counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.golden_models import tower_view
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from pore.errors import BudgetError, InputError, ScoreError
from pore.methods.prumerge import attention_and_keys, outliers, single_head_attention
from pore.methods.prumerge_plus import Grid, best_then_grid
from pore.tower.stages import TowerView


def view_of(
    images: int, patches: int, seed: int, cls: bool = True, sharp: float = 1.0
) -> TowerView:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return tower_view(
        draw(images, patches, 6),
        torch.empty(0),
        cls_feature=draw(images, 6) if cls else None,
        queries=(sharp * draw(images, 2, patches + cls, 3),),
        keys=(draw(images, 2, patches + cls, 3),),
    )


def part(view: TowerView, i: int) -> TowerView:
    """One image by itself."""
    one = slice(i, i + 1)
    return tower_view(
        view.features[one],
        view.cls_attention,
        cls_feature=None if view.cls_feature is None else view.cls_feature[one],
        queries=(view.queries[0][one],),
        keys=(view.keys[0][one],),
    )


def tokens_of(selection: Any, i: int) -> tuple[list[int], Tensor]:
    """Raster indices and features of the tokens of one image."""
    valid = selection.valid
    stays = slice(None) if valid is None else valid[i]
    return selection.raster[i][stays].tolist(), selection.features[i][stays]


PRUNERS = [
    (pore.PruMerge, {}),
    (pore.PruMergePlus, {"rule": "effivlm"}),
    (pore.PruMergePlus, {"rule": "prumerge"}),
]


@pytest.mark.parametrize(("kind", "settings"), PRUNERS)
@given(st.integers(1, 3), st.integers(1, 40), st.booleans(), st.integers(0, 999), st.data())
def test_budget_is_exact(
    kind: Any,
    settings: dict[str, str],
    images: int,
    patches: int,
    cls: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    keep = data.draw(st.integers(1, patches))
    view = view_of(images, patches, seed, cls)
    pruner = kind(keep=keep, **settings)
    selection = pruner._select(view)
    assert selection.valid is None
    assert selection.raster.shape == selection.features.shape[:2] == (images, keep)
    scores, _ = attention_and_keys(view)
    for i, raster in enumerate(selection.raster.tolist()):
        alone = pruner._select(part(view, i))
        assert alone.raster[0].tolist() == raster
        torch.testing.assert_close(alone.features[0], selection.features[i])
        if keep == patches:
            assert raster == list(range(patches))
            assert torch.equal(selection.features[i], view.features[i])
            continue
        assert raster[-1] == -1
        assert len(set(raster)) == keep  # nothing twice
        if kind is pore.PruMerge:
            assert raster[:-1] == scores[i].topk(keep - 1).indices.tolist()


@given(st.integers(0, 999), st.sampled_from([64, 128, 256]))
def test_budget_of_vtc_cls_is_exact_unless_faithful(seed: int, keep: int) -> None:
    view = view_of(1, 576, seed)
    raster = pore.PruMergePlus(keep=keep, rule="vtc-cls")._select(view).raster[0].tolist()
    assert len(set(raster)) == len(raster) == keep
    authors = pore.PruMergePlus(keep=keep, rule="vtc-cls", faithful=True)._select(view)
    theirs = authors.raster[0].tolist()
    assert (
        len(theirs) <= {64: 67, 128: 137, 256: 288}[keep]
    )  # where none of the best is on the grid
    best = {64: 13, 128: 40, 256: 95}[keep]
    assert theirs[:best] == raster[:best]
    both = min(len(theirs), keep) - 1
    assert theirs[:both] == raster[:both]


def test_the_extra_token_and_order() -> None:
    """By hand: two kept of four, one neighbour each, and the rest."""
    view = tower_view(
        torch.tensor([[[1.0], [10.0], [100.0], [1000.0]]], dtype=torch.float64),
        torch.empty(0),
        cls_feature=torch.zeros(1, 1),
        queries=(torch.tensor([[[[1.0, 0.0]] + [[0.0, 0.0]] * 4]], dtype=torch.float64),),
        keys=(
            torch.tensor(
                [[[[0.0, 0.0], [1.0, 1.0], [2.0, 0.1], [0.5, 0.6], [0.9, 0.0]]]],
                dtype=torch.float64,
            ),
        ),
    )
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.9], dtype=torch.float64) * 2**-0.5
    w = logits.softmax(-1)[1:]
    selection = pore.PruMerge(keep=3, neighbours=1)._select(view)
    assert selection.raster.tolist() == [[1, 0, -1]]
    # Patch 3 is nearest to 1, and 2 to 0.
    expected = torch.stack([10 + 1000 * w[3], 1 + 100 * w[2], 100 * w[2] + 1000 * w[3]])
    torch.testing.assert_close(selection.features[0, :, 0], expected)


@given(st.integers(1, 4), st.integers(4, 60), st.integers(0, 999))
def test_outliers_are_numpys(images: int, patches: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(images, patches, generator=generator, dtype=torch.float64).exp()
    lengths = torch.randint(1, patches + 1, (images,), generator=generator)
    valid = torch.arange(patches) < lengths[:, None]
    found = outliers(scores, valid).tolist()
    for row, length, count in zip(scores.numpy(), lengths.tolist(), found, strict=True):
        row = row[:length]
        low, high = np.percentile(row, 25), np.percentile(row, 75)
        assert count == int((row > high + 1.5 * (high - low)).sum())


def test_without_cls_scores_are_the_mean_over_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 9, 4, generator=generator, dtype=torch.float64)
    weights = (q @ k.mT / 2).softmax(-1)
    torch.testing.assert_close(single_head_attention(q, k, cls=False), weights.mean(1))
    torch.testing.assert_close(single_head_attention(q, k, cls=True), weights[:, 0, 1:])


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 999), st.data())
def test_best_then_grid(images: int, patches: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, patches, generator=generator, dtype=torch.float64)
    valid = torch.rand(images, patches, generator=generator) < 0.8
    number = st.integers(0, patches)
    grids = [
        Grid(data.draw(number), data.draw(number), data.draw(number) + 1, data.draw(number))
        for _ in range(images)
    ]
    order, counts = best_then_grid(scores, valid, grids)
    for i, (best, start, step, end) in enumerate(grids):
        patch = valid[i].nonzero()[:, 0].tolist()
        ranked = sorted(patch, key=lambda p: -scores[i, p].item())
        first = ranked[:best]
        grid = [patch[place] for place in range(start, min(end, len(patch)), step)]
        chosen = first + [p for p in grid if p not in first]
        rest = [p for p in ranked if p not in chosen]
        hidden = [p for p in range(patches) if p not in patch]
        got = order[i].tolist()
        assert got[: len(patch)] == chosen + rest
        assert sorted(got[len(patch) :]) == hidden
        assert counts[i] == len(chosen)


@pytest.mark.parametrize("kind", [pore.PruMerge, pore.PruMergePlus])
@given(st.integers(2, 4), st.integers(2, 60), st.integers(0, 999))
def test_adaptive_counts_are_of_every_image_by_itself(
    kind: Any, images: int, patches: int, seed: int
) -> None:
    view = view_of(images, patches, seed, sharp=3.0)
    selection = kind()._select(view)
    for i in range(images):
        raster, features = tokens_of(selection, i)
        alone, expected = tokens_of(kind()._select(part(view, i)), 0)
        assert raster == alone
        assert raster[-1] == -1
        assert len(set(raster)) == len(raster) <= patches
        torch.testing.assert_close(features, expected)


class TestFaithful:
    def test_the_extra_token_comes_on_top(self) -> None:
        view = view_of(1, 40, 0)
        for kind in (pore.PruMerge, pore.PruMergePlus):
            assert kind(keep=10)._select(view).raster.shape == (1, 10)
            assert kind(keep=10, faithful=True)._select(view).raster.shape == (1, 11)
            assert kind(keep=0.26, faithful=True)._select(view).raster.shape == (1, 11)
            same, theirs = kind(keep=11), kind(keep=10, faithful=True)
            assert torch.equal(same._select(view).features, theirs._select(view).features)

    def test_quartiles_over_the_batch(self) -> None:
        view = view_of(3, 60, 1, sharp=3.0)
        scores, _ = attention_and_keys(view)
        together = int(outliers(scores.reshape(1, -1), torch.ones(1, 180, dtype=torch.bool)))
        selection = pore.PruMerge(faithful=True)._select(view)
        assert selection.valid is None
        assert selection.raster.shape[1] == int(60 * (together / 180)) + 1
        assert pore.PruMerge()._select(view).valid is not None

    def test_truncation(self) -> None:
        """int(49 * (2 / 49)) is 1."""
        for seed in range(200):
            view = view_of(1, 49, seed)
            scores, _ = attention_and_keys(view)
            if int(outliers(scores, torch.ones(1, 49, dtype=torch.bool))) == 2:
                break
        assert pore.PruMerge(faithful=True)._select(view).raster.shape == (1, 2)
        assert pore.PruMerge()._select(view).raster.shape == (1, 3)

    def test_without_outliers(self) -> None:
        """All patches alike: the authors have the extra token alone, or divide by zero."""
        view = view_of(1, 49, 0, sharp=0.0)
        assert pore.PruMerge(faithful=True)._select(view).raster.tolist() == [[-1]]
        assert pore.PruMerge()._select(view).raster.shape == (1, 2)
        with pytest.raises(InputError, match="stands out"):
            pore.PruMergePlus(faithful=True)._select(view)
        assert pore.PruMergePlus()._select(view).raster.shape[1] > 2

    def test_adaptive_plus_takes_one_image(self) -> None:
        with pytest.raises(InputError, match="one image at a time, not 2"):
            pore.PruMergePlus(faithful=True)._select(view_of(2, 49, 0))

    def test_training_repeats_patches(self) -> None:
        view = view_of(2, 576, 0)
        pruner = pore.PruMergePlus(keep=0.125, rule="prumerge", faithful=True)
        raster = pruner._select(view).raster
        assert raster.shape == (2, 145)
        assert all(len(set(row)) < 145 for row in raster.tolist())
        exact = pore.PruMergePlus(keep=145, rule="prumerge")._select(view).raster
        assert all(len(set(row)) == 145 for row in exact.tolist())
        assert torch.equal(exact[:, :72], raster[:, :72])

    @pytest.mark.parametrize(("patches", "keep"), [(576, 0.11), (9, 0.1), (4, 0.1), (1, 0.5)])
    def test_training_where_the_grid_has_another_number(self, patches: int, keep: float) -> None:
        pruner = pore.PruMergePlus(keep=keep, rule="prumerge", faithful=True)
        with pytest.raises(BudgetError, match="equally many"):
            pruner._select(view_of(1, patches, 0))

    def test_effivlm_takes_the_mean_of_all_images(self) -> None:
        view = view_of(3, 60, 1, sharp=3.0)
        scores, _ = attention_and_keys(view)
        far = outliers(scores, torch.ones_like(scores, dtype=torch.bool)).tolist()
        assert len(set(far)) > 1
        best = max(int(60 * sum(n / 60 for n in far) / 3), 1)
        raster = pore.PruMergePlus(keep=30, faithful=True)._select(view).raster
        for row, order in zip(raster.tolist(), scores.argsort(-1, descending=True), strict=True):
            assert row[:best] == order[:best].tolist()
            grid = [p for p in range(0, 60, 2) if p not in row[:best]]
            assert row[best:-1] == grid[: 30 - best]

    def test_more_tokens_than_patches(self) -> None:
        for kind in (pore.PruMerge, pore.PruMergePlus):
            with pytest.raises(BudgetError, match="makes 41 tokens from 40 patches"):
                kind(keep=40, faithful=True)._select(view_of(1, 40, 0))


class TestRefused:
    @pytest.mark.parametrize("settings", [{"keep": 0}, {"keep": 1.5}, {"neighbours": -1}])
    def test_settings(self, settings: dict[str, Any]) -> None:
        for kind in (pore.PruMerge, pore.PruMergePlus):
            with pytest.raises(BudgetError):
                kind(**settings)

    def test_rules(self) -> None:
        with pytest.raises(BudgetError, match="64, 128, 256"):
            pore.PruMergePlus(keep=192, rule="vtc-cls")
        with pytest.raises(BudgetError, match="must be one of effivlm, vtc-cls, prumerge"):
            pore.PruMergePlus(keep=192, rule="topk")  # type: ignore[arg-type]

    def test_counts_that_the_image_decides(self) -> None:
        assert pore.PruMerge(keep=5).counts(N, 2) == [5, 5]
        for pruner in (pore.PruMerge(), pore.PruMergePlus(), pore.PruMerge(5, faithful=True)):
            with pytest.raises(BudgetError, match="give `keep`"):
                pruner.counts(N, 2)

    def test_scores_that_are_none(self) -> None:
        view = view_of(1, 20, 0)
        view.keys[0][0, 0, 3] = torch.nan
        with pytest.raises(ScoreError, match="NaN"):
            pore.PruMerge(keep=5)._select(view)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [pore.PruMerge, pore.PruMergePlus])
def test_ragged_images_in_a_model(kind: Any, side: str) -> None:
    """Adaptive counts differ between the images of a batch, which changes nothing for each."""
    model = tiny_llava(tower_layers=4)
    for name, weight in model.model.vision_tower.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 4  # so that some patches stand out
    prompts = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(2, 3, 4, 1)]
    inputs = batch(prompts, side)
    with torch.no_grad(), kind()(model) as run:
        logits = model(**inputs).logits
    kept = [len(image.kept) + image.extra for sample in run.report for image in sample.images]
    assert len(set(kept)) > 1
    first = 0
    for sample, row, ids in zip(run.report, logits, prompts, strict=True):
        count = ids.count(IMAGE) // N
        one: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if count:
            one["pixel_values"] = inputs["pixel_values"][first : first + count]
        first += count
        with torch.no_grad(), kind()(model) as alone:
            single = model(**one).logits[0]
        assert alone.report.samples[0].images == sample.images
        length = sample.tokens[-1]
        assert length == len(single)
        got = row[-length:] if side == "left" else row[:length]
        torch.testing.assert_close(got, single, rtol=1e-9, atol=1e-9)
