"""HoloV: shares of crops, against the definition written out token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.golden_files import Made, draw
from helpers.models import N, batch, prompt, tiny_llava
from methods import golden_holov
from pore.errors import BudgetError, InputError, PoreError, UnsupportedModelError
from pore.methods.holov import crops_of


def by_hand(
    features: Tensor, attention: Tensor, crops: int, keep: int, alpha: float, faithful: bool
) -> tuple[list[int], list[int]]:
    """What every crop gets, and the tokens in the authors' order, without vectors of zeros."""
    n = len(features)
    sizes = [s for s in (n // crops + (i < n % crops) for i in range(crops)) if s]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    scores = []
    for start, z in zip(starts, sizes, strict=True):
        tokens = range(start, start + z)
        a = [1000 * float(attention[i]) for i in tokens]
        if z == 1:
            scores.append(a[0] / 1000 if faithful else a[0])
            continue
        unit = [features[i] / (features[i].norm() + 1e-6) for i in tokens]
        s = [[float(p @ q) * (p is not q) for q in unit] for p in unit]
        m = [sum(row) / (z - 1) for row in s]
        v = [sum((x - m[i]) ** 2 for x in row) / (z - 1) for i, row in enumerate(s)]
        factor = (sum(map(abs, a)) / z) / (sum(map(abs, v)) / z + 1e-6)
        scores.append(sum(x + alpha * y * factor for x, y in zip(a, v, strict=True)) / z)
    share = [score / (sum(scores) + 1e-6) for score in scores]
    counts = [math.floor(x * keep) for x in share]
    for i in sorted(range(len(share)), key=lambda i: -share[i])[: keep - sum(counts)]:
        counts[i] += 1
    order: list[int] = []
    for start, z, count in zip(starts, sizes, counts, strict=True):
        tokens = list(range(start, start + z))
        if count < z:
            tokens = sorted(tokens, key=lambda i: -float(attention[i]))[:count]
        order += tokens
    return counts, order


def problem(images: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (I, N, 5) and attention (I, N)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, tokens, 5, generator=generator, dtype=torch.float64)
    return features, torch.rand(images, tokens, generator=generator, dtype=torch.float64) ** 3


CASES = (st.integers(1, 30), st.integers(1, 9), st.data(), st.integers(0, 999))


class TestSelection:
    @given(*CASES)
    def test_shares_then_the_best_of_all_others(
        self, tokens: int, crops: int, data: Any, seed: int
    ) -> None:
        keep = data.draw(st.integers(1, tokens))
        features, attention = problem(2, tokens, seed)
        (stage,) = pore.HoloV(keep, crops, alpha=0.3).stages()
        selection = stage.rule(golden_holov._view(features, attention))
        assert selection.features is None  # so that tokens stay in their order
        for mask, states, weights in zip(selection.keep, features, attention, strict=True):
            _, order = by_hand(states, weights, crops, keep, 0.3, faithful=False)
            others = sorted(set(range(tokens)) - set(order), key=lambda i: -float(weights[i]))
            expected = sorted([*order, *others[: keep - len(order)]])
            assert mask.nonzero()[:, 0].tolist() == expected

    @given(*CASES)
    def test_faithful_has_their_order_and_zeros(
        self, tokens: int, crops: int, data: Any, seed: int
    ) -> None:
        keep = data.draw(st.integers(1, tokens))
        features, attention = problem(2, tokens, seed)
        (stage,) = pore.HoloV(keep, crops, faithful=True).stages()
        selection = stage.rule(golden_holov._view(features, attention))
        for i in range(2):
            _, order = by_hand(features[i], attention[i], crops, keep, 0.09, faithful=True)
            expected = (order + [-1] * keep)[:keep]
            assert selection.raster[i, :keep].tolist() == expected
            assert selection.keep[i].tolist() == [j < keep for j in range(tokens)]
            for token, state in zip(expected, selection.features[i], strict=False):
                wanted = features[i, token] if token >= 0 else torch.zeros(5, dtype=torch.float64)
                assert torch.equal(state, wanted)

    def test_every_part_of_the_image_keeps_some(self) -> None:
        """Where the most attention alone would leave the lower half out."""
        attention = torch.cat([torch.full((8,), 0.3), torch.full((8,), 0.1)])[None]
        attention = attention + torch.arange(16) * 1e-3
        (stage,) = pore.HoloV(8, crops=2).stages()
        features = draw(0, 1, 16, 4)
        kept = stage.rule(golden_holov._view(features, attention)).keep[0]
        assert kept[:8].sum().item() == 6

    def test_the_usual_number_of_crops(self) -> None:
        method = pore.HoloV(64)
        assert method._crops([576, 576, 100, 64], [64, 192, 100, 64]) == [16, 5, 1, 1]


@pytest.mark.parametrize(
    ("tokens", "crops", "lengths"),
    [([7], [3], [[3, 2, 2]]), ([4, 2], [2, 5], [[2, 2], [1, 1]]), ([6], [1], [[6]])],
)
def test_crops(tokens: list[int], crops: list[int], lengths: list[list[int]]) -> None:
    index, there = crops_of(tokens, crops)
    assert there.sum(-1).tolist() == lengths
    for row, marks, n in zip(index, there, tokens, strict=True):
        assert row[marks].tolist() == list(range(n))


class TestModel:
    def test_attention_is_that_of_the_tower(self) -> None:
        """One crop is the whole image: the tokens of the most CLS attention, as by FasterVLM."""
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5), prompt(9, 0, 4, 1), prompt(1, 2, 2)])
        kept = []
        for method in (pore.HoloV(7, crops=1), pore.FasterVLM(7)):
            with torch.no_grad(), method(model) as run:
                logits = model(**inputs).logits
            kept.append([[image.kept for image in sample.images] for sample in run.report])
        assert kept[0] == kept[1]
        assert torch.isfinite(logits).all()

    def test_zeros_of_the_authors_reach_the_decoder(self) -> None:
        """A crop gets more than it has: the report counts zeros as tokens that show no patch."""
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
        with torch.no_grad(), pore.HoloV(14, crops=6, faithful=True)(model) as run:
            model(**inputs)
        (image,) = run.report.samples[0].images
        assert len(image.kept) + image.extra == 14
        with torch.no_grad(), pore.HoloV(14, crops=6)(model) as run:
            model(**inputs)
        (image,) = run.report.samples[0].images
        assert (len(image.kept), image.extra) == (14, 0)

    def test_after_another_method(self) -> None:
        model, inputs = tiny_llava(tower_layers=4), batch([prompt(3, 1, 5)])
        chain = pore.Chain(pore.FasterVLM(10), pore.HoloV(4, crops=1))
        with torch.no_grad(), chain(model) as run, pytest.MonkeyPatch.context():
            model(**inputs)
        with torch.no_grad(), pore.FasterVLM(4)(model) as alone:
            model(**inputs)
        assert run.report.samples[0].images[0].kept == alone.report.samples[0].images[0].kept
        merging = pore.Chain(pore.ToMe(10), pore.HoloV(4, crops=1))
        with torch.no_grad(), merging(model), pytest.raises(InputError, match="no single patch"):
            model(**inputs)


class TestBadInput:
    @pytest.mark.parametrize("crops", [0, -1, 1.5, True])
    def test_crops_are_a_number(self, crops: Any) -> None:
        with pytest.raises(BudgetError, match="crops must be a whole number"):
            pore.HoloV(4, crops)

    @pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
    def test_alpha_is_finite(self, alpha: float) -> None:
        with pytest.raises(PoreError, match="alpha"):
            pore.HoloV(4, alpha=alpha)

    def test_too_many(self) -> None:
        model = tiny_llava()
        with pytest.raises(BudgetError, match=f"there are \\({N}\\)"):  # noqa: SIM117
            with torch.no_grad(), pore.HoloV(N + 1)(model):
                model(**batch([prompt(3, 1, 5)]))

    def test_order_is_refused_where_positions_are_places(self) -> None:
        from cases import CASES as FAMILIES

        (case,) = (case for case in FAMILIES if case.name == "Qwen2-VL")
        with pytest.raises(UnsupportedModelError, match="faithful=False"):  # noqa: SIM117
            with pore.HoloV(4, faithful=True)(case.model()):
                pass

    def test_overflow(self) -> None:
        features, attention = problem(1, 9, 0)
        attention[0, 4] = float("nan")
        (stage,) = pore.HoloV(4).stages()
        with pytest.raises(PoreError, match="NaN"):
            stage.rule(golden_holov._view(features, attention))


# -- the checker of golden files, on files made here -----------------------------------------------


@pytest.mark.parametrize(("n", "crops", "keep"), [(49, 16, 20), (10, 7, 6), (6, 9, 4), (20, 4, 18)])
def test_holov(n: int, crops: int, keep: int) -> None:
    """Crops of one token beside others, or nothing but those; a crop that gets more than it has."""
    features, attention = draw(1, 2, n, 6), draw(2, 2, n).softmax(-1)
    found = [
        by_hand(f, a, crops, keep, 0.09, faithful=True)
        for f, a in zip(features, attention, strict=True)
    ]
    order = torch.tensor([(order + [-1] * keep)[:keep] for _, order in found])
    real = [sorted(i for i in row if i >= 0) for row in order.tolist()]
    width = max(map(len, real))
    picked = features.gather(1, order.clamp(min=0)[..., None].expand(-1, -1, 6))
    tensors = {
        "features": features,
        "attention": attention,
        "tokens": picked * (order >= 0)[..., None],
        "kept_order": order,
        "kept_indices": torch.tensor([row + [-1] * (width - len(row)) for row in real]),
        "allocated": torch.tensor([counts for counts, _ in found]),
    }
    params = {"variant": "llava", "crops": crops, "keep": keep, "alpha": 0.09}
    golden_holov.check(Made(params, tensors))
