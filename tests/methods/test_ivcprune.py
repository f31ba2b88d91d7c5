"""IVC-Prune: who votes, what positions single out, and both kinds of budget."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.caches import as_argument
from helpers.models import N, batch, prompt, tiny_llava
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.cost.named import model_shape
from pore.engine.readers import LayerAttention
from pore.engine.stages import View
from pore.errors import BudgetError, ScoreError
from pore.layout import Image, Layout
from pore.methods.ivcprune import Votes, turns, value_weights, voters

SIZE = 6  # of a head


def rotary(_: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].double() / 100 ** (torch.arange(SIZE).double() / SIZE)
    return angles.cos(), angles.sin()


def seen_of(
    pruner: pore.IVCPrune, images: list[Image], lengths: list[int], seed: int = 0, axes: int = 1
) -> tuple[View, Tensor]:
    """What the rule sees of random values, padded on the right; and these."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    tokens = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    layout = Layout.of(images, tokens)
    value = torch.randn(len(lengths), 2, shape[1], SIZE, generator=generator).double()
    nothing = value.new_zeros(len(lengths), 4, shape[1], SIZE)
    attention = LayerAttention(
        layout, nothing, nothing, None, 1.0, None, tokens[:, :0], tokens.long(), value=value
    )
    positions = torch.randint(0, 40, (axes, *shape), generator=generator)
    if axes == 1:
        positions = torch.arange(shape[1]).expand(1, *shape)
    view = View(
        layout,
        torch.zeros(*shape, 1).double(),
        pruner._read(attention),
        None,
        generator,
        norm=lambda x: x,
        positions=positions,
        rotary=rotary,
    )
    return view, value


def by_hand(
    pruner: pore.IVCPrune, view: View, value: Tensor, i: int, keep: int | None, foreground: int
) -> set[int]:
    """The tokens that stay of image i, pair by pair."""
    image, n = view.layout.images[i], view.layout.counts[i]
    own = list(image.columns)
    text = view.layout.text_after[i].nonzero()[:, 0].tolist()
    text = text[min(pruner.skip, len(text) - 1) :]
    tokens = view.layout.tokens[image.row].nonzero()[:, 0].tolist()
    seen = own if pruner.normalize == "visual" else tokens

    def row(one: int) -> list[float]:
        found = [0.0] * n
        for head in value[image.row]:
            logits = {k: float(head[one] @ head[k]) / SIZE**0.5 for k in seen}
            total = sum(torch.tensor(x).double().exp() for x in logits.values())
            for j, k in enumerate(own):
                found[j] += float(torch.tensor(logits[k]).double().exp() / total) / len(value[0])
        return found

    def best(scores: list[float], count: int) -> list[int]:
        return sorted(range(n), key=lambda j: -scores[j])[:count]

    rows = [row(one) for one in text]
    seeds = best([sum(r[j] for r in rows) for j in range(n)], max(1, round(pruner.seeds * n)))
    rows += [row(own[j]) for j in seeds]
    score = [sum(r[j] for r in rows) for j in range(n)]
    share = pruner.keep if pruner.keep is not None else pruner.foreground
    assert share is not None
    count = pruner.coordinates * share * (1 if isinstance(share, int) else n)
    places = view.positions[:, image.row, own].sort(0).values  # type: ignore[index]
    always = set(seeds)
    for part in (0, 1):
        table = [rotary(places, axis)[part].mean(-1) for axis in places]
        always |= set(best(torch.stack(table).mean(0).tolist(), round(count)))
    if keep is None:
        return always | set(best(score, foreground))
    return set(sorted(range(n), key=lambda j: (j not in always, -score[j]))[:keep])


counts = st.lists(st.integers(1, 24), min_size=1, max_size=3)


@given(
    counts,
    st.integers(0, 2**20),
    st.floats(0.05, 1.0),
    st.sampled_from(["visual", "prompt"]),
    st.integers(0, 4),
    st.sampled_from([1, 3]),
)
def test_is_what_its_rule_says_image_by_image(
    counts: list[int], seed: int, share: float, normalize: Any, skip: int, axes: int
) -> None:
    images = [Image(i, 0, range(2, 2 + n)) for i, n in enumerate(counts)]
    lengths = [n + 3 + (seed + i) % 5 for i, n in enumerate(counts)]
    settings: dict[str, Any] = {"normalize": normalize, "skip": skip, "seeds": 0.1}
    for pruner in (
        pore.IVCPrune(keep=share, coordinates=0.3, **settings),
        pore.IVCPrune(foreground=share, coordinates=0.4, **settings),
    ):
        view, value = seen_of(pruner, images, lengths, seed, axes)
        try:
            budgets = view.budget(share)
        except BudgetError:
            with pytest.raises(BudgetError, match="rounds to none"):
                pruner._select(view)
            return
        kept = pruner._select(view).keep
        assert not (kept & ~view.layout.valid).any()
        for i, budget in enumerate(budgets):
            exact = None if pruner.keep is None else budget
            expected = by_hand(pruner, view, value, i, exact, budget)
            assert set(kept[i].nonzero()[:, 0].tolist()) == expected
            assert exact is None or len(expected) == exact


def test_several_images_have_the_text_after_them() -> None:
    """Other images of the prompt have no vote."""
    pruner = pore.IVCPrune(keep=3)
    images = [Image(0, 0, range(1, 9)), Image(0, 1, range(11, 19))]
    view, value = seen_of(pruner, images, [24])
    kept = pruner._select(view).keep
    for i in range(2):
        expected = by_hand(pruner, view, value, i, 3, 3)
        assert set(kept[i].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize(
    ("there", "skip", "chosen"), [(5, 2, [2, 3, 4]), (3, 2, [2]), (2, 2, [1]), (1, 4, [0])]
)
def test_the_last_text_token_always_votes(there: int, skip: int, chosen: list[int]) -> None:
    index = torch.arange(10, 16)[None]
    found, valid = voters(index, torch.arange(6)[None] < there, skip)
    assert found[valid].tolist() == [10 + i for i in chosen]


def test_the_authors_budgets_of_llava() -> None:
    """6 seeds, 115 of the foreground, 29 and 29 coordinates of 576 tokens."""
    pruner = pore.IVCPrune(foreground=0.2, coordinates=0.25, normalize="prompt")
    assert pruner._coordinates(576) == 29
    view, _ = seen_of(pruner, [Image(0, 0, range(5, 581))], [590])
    assert isinstance(view.attention, Votes)
    assert int(view.attention.seeds.sum()) == 6
    assert 115 <= int(pruner._select(view).keep.sum()) <= 115 + 29 + 29 + 6
    with pytest.raises(BudgetError, match="depends on the prompt"):
        pruner.counts(576, 32)
    assert pore.IVCPrune(keep=0.5)._coordinates(576) == 58
    assert pore.IVCPrune(keep=100)._coordinates(576) == 20


def test_places_that_mirror_each_other_are_equals() -> None:
    """On several axes the row and the column of a patch count alike, to the last bit."""
    states = torch.zeros(1, 1, 1)
    positions = torch.tensor([[[7, 7]], [[9, 33]], [[33, 9]]])
    for one in turns(rotary, states, positions):
        assert float(one[0, 0]) == float(one[0, 1])


def test_complex_tables_say_the_same() -> None:
    """Llama 4 has one complex number for every two channels."""

    def complex_tables(states: Tensor, positions: Tensor) -> Tensor:
        cosines, sines = rotary(states, positions)
        return torch.complex(cosines, sines)

    positions = torch.arange(5)[None, None]
    states = torch.zeros(1, 1, 1)
    for one, other in zip(
        turns(rotary, states, positions), turns(complex_tables, states, positions), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_rows_are_computed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(2, 3, 9, 4, generator=torch.Generator().manual_seed(0))
    tokens = torch.ones(2, 9, dtype=torch.bool)
    rows, columns = torch.arange(2), torch.arange(2, 6).expand(2, -1)
    index = torch.arange(9).expand(2, -1)
    whole = value_weights(value, tokens, rows, columns, None, index)
    monkeypatch.setattr(sys.modules[value_weights.__module__], "_CHUNK", 100)
    torch.testing.assert_close(value_weights(value, tokens, rows, columns, None, index), whole)


def test_half_precision_is_computed_in_float32() -> None:
    pruner = pore.IVCPrune(keep=6)
    images = [Image(0, 0, range(1, 20))]
    tokens = torch.ones(1, 26, dtype=torch.bool)
    layout = Layout.of(images, tokens)
    value = torch.randn(1, 2, 26, SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    attention = LayerAttention(
        layout, value, value, None, 1.0, None, tokens[:, :0], tokens.long(), value=value
    )
    narrow, wide = pruner._read(attention), pruner._read(replace(attention, value=value.float()))
    assert narrow.scores.dtype == torch.float32
    assert torch.equal(narrow.scores, wide.scores)


class TestInAModel:
    def test_an_earlier_turn_counts_as_in_one_prompt(self) -> None:
        """Values in the cache are compared too, where the softmax runs over the prompt."""
        model, pruner = tiny_llava(), pore.IVCPrune(keep=5, layer=2, normalize="prompt")
        ids = prompt(3, 1, 6)
        inputs = batch([[20, 21, 22, 23, *ids]])
        whole, turns_ = Recording(pruner), Recording(pruner)
        with torch.no_grad():
            with whole(model):
                model(**inputs)
            with turns_(model):
                first = model(input_ids=torch.tensor([[20, 21, 22, 23]]), use_cache=True)
                model(
                    input_ids=torch.tensor([ids]),
                    pixel_values=inputs["pixel_values"],
                    **as_argument(cache_in(first)),
                )
        one, other = whole.seen[-1], turns_.seen[-1]
        torch.testing.assert_close(one.view.attention.scores, other.view.attention.scores)
        assert torch.equal(one.selection.keep, other.selection.keep)

    def test_after_another_method(self) -> None:
        model = tiny_llava()
        chain = pore.Chain(pore.FastV(9, layer=1), pore.IVCPrune(4, layer=3))
        with torch.no_grad(), chain(model) as run:
            model(**batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)]))
        for sample in run.report:
            for image in sample.images:
                assert len(image.kept) == 4
                assert set(image.kept) <= set(image.stages[0][1])

    def test_a_floating_budget(self) -> None:
        model = tiny_llava()
        pruner = pore.IVCPrune(foreground=0.25, coordinates=0.5, layer=2)
        with torch.no_grad(), pruner(model) as run:
            model(**batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)]))
        for sample in run.report:
            for image in sample.images:
                assert 4 <= len(image.kept) <= 4 + 2 + 2 + 1

    def test_a_layer_that_is_not_there(self) -> None:
        with pytest.raises(BudgetError, match="choose 1 to 4"), pore.IVCPrune(5)(tiny_llava()):
            pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either `keep`"),
        ({"keep": 5, "foreground": 5}, "either `keep`"),
        ({"keep": 0}, "at least 1"),
        ({"foreground": 1.5}, "fraction"),
        ({"keep": 5, "coordinates": 1.5}, "0 to 1"),
        ({"keep": 5, "seeds": -0.1}, "0 to 1"),
        ({"keep": 5, "normalize": "image"}, "normalize"),
        ({"keep": 5, "skip": -1}, "whole number"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((BudgetError, ScoreError), match=message):
        pore.IVCPrune(**settings)


def test_usual_is_the_middle_of_the_decoder() -> None:
    assert pore.IVCPrune.usual(N, model_shape("llava-64x32")).layer == 16
