"""DART: pivots, picks, and the two ways of keeping a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.engine.stages import View
from pore.errors import BudgetError, ScoreError
from pore.layout import Image, Layout
from pore.methods.dart import key_norms, largest, least_similar, set_order, shares
from pore.tensors.gathering import cosine


def view(
    images: list[Image], lengths: list[int], seed: int = 0, scale: float = 1.0
) -> tuple[View, Tensor]:
    """What the rule sees of random states and key norms, padded on the right; and the norms."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    tokens = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    states = torch.randn(*shape, 6, generator=generator, dtype=torch.float64) * scale
    norms = torch.rand(shape, generator=generator, dtype=torch.float64).masked_fill(~tokens, 0)
    layout = Layout.of(images, tokens)
    return View(layout, states, norms, None, generator, norm=lambda x: x), norms


@st.composite
def views(draw: st.DrawFn) -> View:
    """Up to three prompts of one or two images each, of 1 to 20 tokens, and text after them."""
    images, lengths = [], []
    for row in range(draw(st.integers(1, 3))):
        column = draw(st.integers(0, 3))
        for index in range(draw(st.integers(1, 2))):
            count = draw(st.integers(1, 20))
            images.append(Image(row, index, range(column, column + count)))
            column += count
        lengths.append(column + draw(st.integers(1, 8)))
    return view(images, lengths, draw(st.integers(0, 2**20)))[0]


pivots = st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(any)


@given(views(), st.floats(0.05, 1.0), pivots)
def test_budget_is_exact(view: View, keep: float, pivots: tuple[int, int]) -> None:
    pruner = pore.DART(keep, image_pivots=pivots[0], text_pivots=pivots[1])
    try:
        counts = view.budget(keep)
    except BudgetError:
        with pytest.raises(BudgetError, match="rounds to none"):
            pruner._select(view)
        return
    kept = pruner._select(view).keep
    assert kept.sum(-1).tolist() == counts
    assert not (kept & ~view.layout.valid).any()
    own, is_own = largest(view.layout.gather(view.attention), pivots[0], view.layout.valid)
    for row, index, found, count in zip(kept, own, is_own, counts, strict=True):
        assert row[index[found][:count]].all()


@given(views(), st.floats(0.3, 1.0), pivots)
def test_faithful_keeps_the_authors_number(
    view: View, keep: float, pivots: tuple[int, int]
) -> None:
    pruner = pore.DART(keep, image_pivots=pivots[0], text_pivots=pivots[1], faithful=True)
    texts = view.layout.text_after.sum(-1).tolist()
    try:
        view.budget(keep)
    except BudgetError:
        return
    kept = pruner._select(view).keep.sum(-1).tolist()
    for count, image, text in zip(kept, view.layout.images, texts, strict=True):
        n = len(image.columns)
        own, others = min(pivots[0], n), min(pivots[1], text)
        assert count == min(n, own + int(n * keep / (own + others)) * (own + others))
        if text >= pivots[1] and n >= pivots[0]:
            assert count == pruner.counts(n, 5)[-1]


@given(views(), st.floats(0.1, 1.0), st.booleans())
def test_a_batch_is_its_images(view: View, keep: float, faithful: bool) -> None:
    pruner = pore.DART(keep, faithful=faithful)
    try:
        together = pruner._select(view).keep
    except BudgetError:
        return
    layout = view.layout
    for i, image in enumerate(layout.images):
        # The image alone; other images of its prompt are still no text.
        same = [other for other in layout.images if other.row == image.row]
        length = int(layout.tokens[image.row].sum())
        alone = View(
            Layout.of([Image(0, o.index, o.columns) for o in same], torch.ones(1, length) > 0),
            view.hidden_states[image.row, None, :length],
            view.attention[image.row, None, :length],
            None,
            view.generator,
            norm=view.norm,
        )
        n = len(image.columns)
        assert torch.equal(pruner._select(alone).keep[image.index, :n], together[i, :n])


@given(st.integers(0, 2**20), st.floats(1e-3, 1e3), st.booleans())
def test_scale_of_states_and_norms_does_not_matter(seed: int, scale: float, faithful: bool) -> None:
    image = [Image(0, 0, range(2, 26))]
    one, norms = view(image, [32], seed)
    other, _ = view(image, [32], seed, scale)
    other = View(other.layout, other.hidden_states, norms * scale, None, one.generator, one.norm)
    pruner = pore.DART(9, faithful=faithful)
    assert torch.equal(pruner._select(one).keep, pruner._select(other).keep)


@given(st.integers(0, 2**20), st.randoms(use_true_random=False))
def test_moves_with_its_tokens(seed: int, random: Any) -> None:
    one, norms = view([Image(0, 0, range(2, 26))], [32], seed)
    order = list(range(24))
    random.shuffle(order)
    moved = [0, 1, *(2 + i for i in order), *range(26, 32)]
    states = one.hidden_states[:, moved]
    other = View(one.layout, states, norms[:, moved], None, one.generator, one.norm)
    pruner = pore.DART(9)
    assert torch.equal(pruner._select(one).keep[:, order], pruner._select(other).keep)


def test_by_hand() -> None:
    """Two pivots, one of each kind, and three picks, on states in the plane."""
    angles = torch.tensor([0.0, 10.0, 80.0, 180.0, 90.0, 170.0, 0.0, 100.0]).deg2rad()
    states = torch.stack([angles.cos(), angles.sin()], -1)[None]
    norms = torch.tensor([[9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]])
    layout = Layout.of([Image(0, 0, range(6))], torch.ones(1, 8, dtype=torch.bool))
    seen = View(layout, states, norms, None, torch.Generator(), norm=lambda x: x)
    # Token 0 picks the two farthest from 0 degrees; the text at 100 the farthest of what is left.
    assert pore.DART(4, image_pivots=1, text_pivots=1)._select(seen).keep[0].tolist() == [
        True, True, False, True, False, True,
    ]  # fmt: skip
    # Budgets that the pivots do not divide, and below their number.
    assert pore.DART(3, image_pivots=1, text_pivots=1)._select(seen).keep[0].tolist() == [
        True, True, False, True, False, False,
    ]  # fmt: skip
    assert pore.DART(1, image_pivots=2, text_pivots=1)._select(seen).keep[0].tolist() == [
        True, False, False, False, False, False,
    ]  # fmt: skip


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40, unique=True))
def test_set_order_is_that_of_python(places: list[int]) -> None:
    found = torch.ones(2, len(places) + 1, dtype=torch.bool)
    found[:, -1] = False
    order = set_order(torch.tensor([[*places, 7], [*places, 7]]), found)
    assert [places[i] for i in order[1, :-1].tolist()] == list(set(places))
    assert order[0, -1] == len(places)


def test_the_order_of_the_authors_is_another() -> None:
    """Pivots take from one another, so the order in which they pick tells."""
    different = 0
    for seed in range(20):
        seen, _ = view([Image(0, 0, range(35, 135))], [160], seed)
        kept = [pore.DART(36, faithful=f)._select(seen).keep for f in (False, True)]
        assert [int(k.sum()) for k in kept] == [36, 36]  # 4 pivots, and 4 picks for each of 8
        different += not torch.equal(*kept)
    assert different > 0


def test_the_authors_budgets() -> None:
    assert pore.DART(128).counts(576, 4) == [576, 576, 128, 128]
    assert pore.DART(128, faithful=True).counts(576, 4) == [576, 576, 132, 132]
    # A fraction that falls short of 16 by rounding, cut to 1 for each of 8 pivots.
    assert pore.DART(1 - 0.8889, faithful=True).counts(144, 3)[-1] == 12
    assert pore.DART(1.0, faithful=True).counts(576, 3)[-1] == 576


def test_shares_are_even() -> None:
    exists = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    assert shares(torch.tensor([7, 5, 0]), exists).tolist() == [[3, 2, 2], [3, 0, 2], [0, 0, 0]]


def test_half_precision_is_computed_in_float32() -> None:
    key = torch.full((1, 1, 2, 3), 60000.0, dtype=torch.float16)
    assert key_norms(key).tolist() == [[180000.0, 180000.0]]
    assert cosine(key[0], key[0]).dtype == torch.float32
    assert key_norms(key.double()).dtype == torch.float64


def test_a_state_of_zeros_is_like_nothing() -> None:
    assert cosine(torch.zeros(1, 1, 4), torch.ones(1, 2, 4)).tolist() == [[[0.0, 0.0]]]


def test_picks_end_where_candidates_do() -> None:
    similarity = torch.rand(1, 2, 5)
    order, quota = torch.tensor([[0, 1]]), torch.tensor([[4, 4]])
    candidates = torch.tensor([[True, True, True, False, True]])
    assert torch.equal(least_similar(similarity, order, quota, candidates), candidates)


class TestOnAModel:
    """What the layer's keys are, whatever stands around the image."""

    def test_keys_are_those_of_the_cache(self) -> None:
        model = tiny_llava()
        inputs = batch([prompt(3, 1, 5), prompt(4, 2, 7, 1)])
        recording = Recording(pore.DART(5, layer=2))
        with torch.no_grad():
            keys = cache_in(model(**inputs)).layers[1].keys
            with recording(model):
                model(**inputs)
        expected = keys.abs().sum((1, 3)) * inputs["attention_mask"]
        torch.testing.assert_close(
            recording.seen[0].view.attention, expected, rtol=1e-12, atol=1e-12
        )
        assert keys.shape[1] == 2  # not repeated for the four query heads

    def test_padding_does_not_move_the_pivots(self) -> None:
        model = tiny_llava()
        prompts = [prompt(3, 1, 5), prompt(6, 1, 9, 1)]
        for faithful in (False, True):
            kept = []
            for side in ("left", "right"):
                inputs = batch(prompts, side)
                # As `generate` numbers them: rotated keys have another norm elsewhere.
                positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
                with torch.no_grad(), pore.DART(7, faithful=faithful)(model) as run:
                    model(**inputs, position_ids=positions)
                kept.append([sample.images for sample in run.report])
            with torch.no_grad(), pore.DART(7, faithful=faithful)(model) as run:
                model.generate(**batch(prompts), max_new_tokens=2)
            kept.append([sample.images for sample in run.report])
            assert kept[0] == kept[1] == kept[2]
            for row, ids in enumerate(prompts):
                pixels = batch(prompts)["pixel_values"][row : row + 1]
                with torch.no_grad(), pore.DART(7, faithful=faithful)(model) as run:
                    model(input_ids=torch.tensor([ids]), pixel_values=pixels)
                assert run.report.samples[0].images == kept[0][row]

    def test_one_text_token_after_the_image_is_enough(self) -> None:
        model = tiny_llava()
        with torch.no_grad(), pore.DART(7)(model) as run:
            model(**batch([[5, *[IMAGE] * N, 6]]))
        assert len(run.report.samples[0].images[0].kept) == 7

    def test_states_that_are_no_numbers_are_refused(self) -> None:
        seen, _ = view([Image(0, 0, range(2, 10))], [14])
        seen.hidden_states[0, 4] = torch.nan
        with pytest.raises(ScoreError, match="NaN"):
            pore.DART(3)._select(seen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "at least 1"),
        ({"keep": 1.5}, "fraction"),
        ({"keep": 5, "image_pivots": -1}, "image_pivots must be"),
        ({"keep": 5, "text_pivots": 2.0}, "text_pivots must be"),
        ({"keep": 5, "image_pivots": 0, "text_pivots": 0}, "at least one"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        pore.DART(**settings)


def test_a_layer_that_is_not_there() -> None:
    with (
        pytest.raises(BudgetError, match="first pruned layer"),
        pore.DART(5, layer=5)(tiny_llava()),
    ):
        pass
