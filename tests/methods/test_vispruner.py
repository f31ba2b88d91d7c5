"""VisPruner: every budget met exactly, and where the authors' code is short or stops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.golden_files import Made, draw
from helpers.golden_models import tower_view
from helpers.models import N, batch, prompt, tiny_llava
from methods import golden_vispruner
from pore.errors import BudgetError, ScoreError
from pore.layout import Tiling
from pore.methods.vispruner import _kept_by_the_authors, dissimilar


def problem(images: int, patches: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (I, N, 6) and attention (1, I, 2, N)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, patches, 6, generator=generator, dtype=torch.float64)
    attention = torch.rand(1, images, 2, patches, generator=generator, dtype=torch.float64)
    return features, attention


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[int, int, int, float, int]:
    """Images, patches, kept, the important share and a seed."""
    patches = draw(st.integers(1, 40))
    keep = draw(st.integers(1, patches))
    return (
        draw(st.integers(1, 3)),
        patches,
        keep,
        draw(st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0])),
        draw(st.integers(0, 999)),
    )


@given(settings_of())
def test_budget_is_exact_whatever_is_odd(case: tuple[int, int, int, float, int]) -> None:
    images, patches, keep, ratio, seed = case
    features, attention = problem(images, patches, seed)
    pruner = pore.VisPruner(keep=keep, important_ratio=ratio)
    selection = pruner._select(tower_view(features, attention))
    assert selection.raster.shape == (images, keep)
    assert (selection.raster.diff() > 0).all()  # ascending, so no patch twice
    best = attention[0].mean(1).argsort(dim=-1, descending=True)[:, : int(keep * ratio)]
    for row, important in zip(selection.raster.tolist(), best.tolist(), strict=True):
        assert set(important) <= set(row)


@given(settings_of())
def test_one_image_does_not_see_another(case: tuple[int, int, int, float, int]) -> None:
    images, patches, keep, ratio, seed = case
    features, attention = problem(images, patches, seed)
    pruner = pore.VisPruner(keep=keep, important_ratio=ratio)
    together = pruner._select(tower_view(features, attention)).raster
    for i in range(images):
        alone = pruner._select(tower_view(features[i : i + 1], attention[:, i : i + 1])).raster
        assert torch.equal(together[i : i + 1], alone)


@given(settings_of(), st.floats(1e-3, 1e3))
def test_length_of_features_and_scale_of_attention_do_not_matter(
    case: tuple[int, int, int, float, int], scale: float
) -> None:
    images, patches, keep, ratio, seed = case
    features, attention = problem(images, patches, seed)
    lengths = torch.rand(images, patches, 1, dtype=torch.float64) + 0.5
    pruner = pore.VisPruner(keep=keep, important_ratio=ratio)
    one = pruner._select(tower_view(features, attention))
    other = pruner._select(tower_view(features * lengths, attention * scale))
    assert torch.equal(one.raster, other.raster)


@given(settings_of())
def test_moves_with_its_patches(case: tuple[int, int, int, float, int]) -> None:
    images, patches, keep, ratio, seed = case
    features, attention = problem(images, patches, seed)
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    pruner = pore.VisPruner(keep=keep, important_ratio=ratio)
    plain = pruner._select(tower_view(features, attention)).raster
    moved = pruner._select(tower_view(features[:, order], attention[..., order])).raster
    assert torch.equal(order[moved].sort(-1).values, plain)


def test_a_round_drops_what_is_most_alike_and_deals_anew() -> None:
    # Patches 0 to 3 as (cosine to patch 1): dealt out as 0, 2 against 1, 3.
    angles = torch.tensor([[0.0, 1.0, 0.9, 2.0]])
    features = torch.stack([angles.cos(), angles.sin()], -1)
    assert dissimilar(features, torch.tensor([[0, 1, 2, 3]]), 3).tolist() == [[0, 1, 3]]
    # What stays of the first half comes first in the next deal, the most alike before the others.
    angles = (19 - torch.arange(20.0)[None]) ** 2 * 0.01
    features = torch.stack([angles.cos(), angles.sin()], -1)
    left = dissimilar(features, torch.arange(20)[None], 12)
    assert left[0].tolist() == [2, 0, *range(1, 20, 2)]


class TestFaithful:
    """The cases of the specification, and all others by the rules of indexing."""

    @settings(max_examples=300)
    @given(st.integers(1, 60), st.integers(1, 8))
    def test_it_counts_as_torch_does(self, count: int, drop: int) -> None:
        ranks = torch.zeros(1, (count + 1) // 2, dtype=torch.long)[:, drop:]
        try:
            rows = torch.arange(1)[:, None].expand(-1, count // 2 - drop)
            stay = torch.zeros(1, (count + 1) // 2)[rows, ranks].shape[1]
        except (RuntimeError, IndexError):
            with pytest.raises(BudgetError, match="faithful=False"):
                _kept_by_the_authors(count, drop)
        else:
            assert _kept_by_the_authors(count, drop) == stay

    @pytest.mark.parametrize(
        ("patches", "keep", "ratio"), [(36, 12, 0.5), (36, 18, 0.5), (16, 8, 0.75), (10, 4, 0.5)]
    )
    def test_stops_where_the_authors_code_does(self, patches: int, keep: int, ratio: float) -> None:
        view = tower_view(*problem(1, patches, 0))
        assert pore.VisPruner(keep, ratio)._select(view).raster.shape == (1, keep)
        with pytest.raises(BudgetError, match="authors' code stops"):
            pore.VisPruner(keep, ratio, faithful=True)._select(view)

    def test_keeps_one_too_few_where_the_authors_code_does(self) -> None:
        view = tower_view(*problem(2, 12, 0))
        exact = pore.VisPruner(8, 0.75)._select(view).raster
        short = pore.VisPruner(8, 0.75, faithful=True)._select(view).raster
        assert exact.shape == (2, 8)
        assert short.shape == (2, 7)
        assert all(set(s) < set(e) for s, e in zip(short.tolist(), exact.tolist(), strict=True))

    @pytest.mark.parametrize("keep", [192, 128, 64, 32])
    @pytest.mark.parametrize("ratio", [0.5, 0.75])
    def test_changes_nothing_at_the_authors_own_settings(self, keep: int, ratio: float) -> None:
        view = tower_view(*problem(1, 576, 1))
        plain = pore.VisPruner(keep, ratio)._select(view).raster
        assert torch.equal(plain, pore.VisPruner(keep, ratio, faithful=True)._select(view).raster)


def test_all_important_is_fastervlm() -> None:
    view = tower_view(*problem(2, 30, 3))
    expected = pore.FasterVLM(keep=11)._select(view)
    got = pore.VisPruner(keep=11, important_ratio=1.0)._select(view)
    assert torch.equal(got.raster, expected.raster)
    assert torch.equal(got.features, expected.features)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_ratio_must_be_a_share(ratio: float) -> None:
    with pytest.raises(BudgetError, match="important_ratio"):
        pore.VisPruner(keep=5, important_ratio=ratio)


class TestTiles:
    """An image of three tiles of 16 patches, of which 6 of the last show padding alone."""

    tiling = Tiling(3, (1, 2), 16, tuple(range(42)))

    @given(st.integers(1, 42), st.sampled_from([0.0, 0.5, 0.8]), st.integers(0, 99))
    def test_budget_is_shared_out_and_met_without_padding(
        self, keep: int, ratio: float, seed: int
    ) -> None:
        features, attention = problem(4, 16, seed)
        other = Tiling(1, (0, 0), 16, tuple(range(16)))
        view = tower_view(features, attention, tilings=(self.tiling, other))
        if keep > 16:
            with pytest.raises(BudgetError, match="more visual tokens than there are"):
                pore.VisPruner(keep, ratio)._select(view)
            view = tower_view(features[:3], attention[:, :3], tilings=(self.tiling,))
        selection = pore.VisPruner(keep, ratio)._select(view)
        valid = selection.valid
        if valid is None:
            valid = torch.ones_like(selection.raster, dtype=torch.bool)
        counts = valid.sum(1).tolist()
        assert sum(counts[:3]) == keep
        assert counts[:2] == sorted(counts[:2], reverse=True)
        assert counts[0] - counts[1] <= 1
        assert (selection.raster[2][valid[2]] < 10).all()
        for i, count in enumerate(counts[:3]):  # a tile is an image by itself
            if count and i < 2:
                alone = pore.VisPruner(count, ratio)._select(
                    tower_view(features[i : i + 1], attention[:, i : i + 1])
                )
                assert torch.equal(selection.raster[i][valid[i]], alone.raster[0])

    def test_the_authors_choose_among_padding_too(self) -> None:
        features, attention = problem(3, 16, 0)
        attention[:, 2, :, 10:] += 9
        view = tower_view(features, attention, tilings=(self.tiling,))
        selection = pore.VisPruner(24, 1.0, faithful=True)._select(view)
        assert selection.raster.shape == (3, 8)
        assert (selection.raster[2] >= 10).sum() >= 4


@pytest.mark.parametrize("where", ["attention", "features"])
def test_overflow_is_an_error(where: str) -> None:
    features, attention = problem(2, 12, 0)
    (attention if where == "attention" else features)[..., 3] = float("nan")
    with pytest.raises(ScoreError, match="NaN"):
        pore.VisPruner(keep=5)._select(tower_view(features, attention))


def test_several_images_and_rows_without_in_a_model() -> None:
    model = tiny_llava()
    prompts = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 1, 2)]
    inputs = batch(prompts)
    with torch.no_grad(), pore.VisPruner(keep=7)(model) as run:
        model(**inputs)
    counts = [[len(image.kept) for image in sample.images] for sample in run.report]
    assert counts == [[7, 7], [], [7]]
    with pytest.raises(BudgetError, match=f"more visual tokens than there are \\({N}\\)"):  # noqa: SIM117
        with pore.VisPruner(keep=N + 1)(model):
            model(**inputs)


# -- the checker of golden files, on files made here -----------------------------------------------


@pytest.mark.parametrize(
    ("patches", "keep", "ratio"),
    [(36, 16, 0.75), (24, 10, 0.25), (24, 24, 0.5), (24, 5, 1.0), (24, 6, 0.0), (12, 8, 0.75)],
)
def test_vispruner(patches: int, keep: int, ratio: float) -> None:
    """The last one makes the authors' indexing keep one too few."""
    features, attention = draw(patches, 2, patches, 7), draw(keep, 2, 3, patches).softmax(-1)
    important, diverse = [], []
    for b in range(2):
        mean = attention[b].mean(0)
        order = sorted(range(patches), key=lambda t: -float(mean[t]))
        first = int(keep * ratio)
        unit = features[b] / features[b].norm(dim=-1, keepdim=True)
        rest = order[first:] if keep > first else []
        while (excess := len(rest) - (keep - first)) > 0 and rest:
            a, other, size = rest[0::2], rest[1::2], len(rest)
            score = {t: max(float(unit[t] @ unit[u]) for u in other) for t in a}
            drop = min(8, excess)
            a.sort(key=lambda t: -score[t])
            # Of an odd number their indices are one fewer, and of all that is left none stays.
            rest = [*a[drop:][: max(size // 2 - drop, 0)], *other]
        important.append(order[:first])
        diverse.append(rest)
    both = [sorted(i + d) for i, d in zip(important, diverse, strict=True)]
    mask = torch.zeros(2, patches, dtype=torch.long)
    for row, kept in zip(mask, both, strict=True):
        row[kept] = 1
    tensors = {
        "features": features,
        "attentions": attention,
        "attention_mean": attention.mean(1),
        "important": torch.tensor(important).long().view(2, -1),
        "diverse": torch.tensor(diverse).long().view(2, -1),
        "sorted": torch.tensor(both),
        "index_mask": mask,
    }
    golden_vispruner.check(Made({"visual_token_num": keep, "important_ratio": ratio}, tensors))
