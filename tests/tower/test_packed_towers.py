"""Methods in towers that take all images in one sequence, against attention weights by hand."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from cases import CASES, COUSINS
from cases.base import Case
from cases.mistral3 import Mistral3
from pore.engine.pruner import Pruner
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError, InputError, ModelStateError, UnsupportedModelError
from pore.families.registry import family_of
from pore.tensors import attention as attention_module
from pore.tensors.attention import received_attention
from pore.tower.packed import slots_of
from pore.tower.stages import TowerSelection, TowerStage, TowerView

KEEP = 6
PACKED = [case for case in [*CASES, *COUSINS] if family_of(case.model()).packed]
QWEN25 = next(case for case in CASES if case.name == "Qwen2.5-VL")
PROMPT = [[5, -1, 6, -2, 7, 8], [5, 6, 10, -4, 7, 8, 9]]
"""Three images: of 4 x 6 tokens, of 3 x 3, and of 3 x 3."""
SIZES = [24, 9, 9]
GRIDS = [(4, 6), (3, 3), (3, 3)]

of_each = pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)


class Looking(Pruner):
    """Keeps all, and shows what a rule sees."""

    keep = 1.0

    def __init__(self) -> None:
        self.views: list[TowerView] = []

    def stages(self) -> list[TowerStage]:
        return [TowerStage(self._look)]

    def _look(self, view: TowerView) -> TowerSelection:
        self.views.append(view)
        return view.select(view.shown, [view.features.shape[1]])


def seen(case: Case, inputs: dict[str, Tensor]) -> list[TowerView]:
    looking = Looking()
    with torch.no_grad(), looking(case.model()):
        case.model()(**inputs)
    return looking.views


def in_windows(height: int, width: int, side: int) -> list[int]:
    """Tokens in raster order, in the order in which windows of side x side hold them."""
    return [
        y * width + x
        for top in range(0, height, side)
        for left in range(0, width, side)
        for y in range(top, min(top + side, height))
        for x in range(left, min(left + side, width))
    ]


def orders(case: Case) -> list[Tensor]:
    """Of the three images, which token in raster order every one of the tower is."""
    if case.name == "Qwen2.5-VL":
        return [torch.tensor(in_windows(*grid, 2)) for grid in GRIDS]
    return [torch.arange(height * width) for height, width in GRIDS]


def in_raster(case: Case, tokens: list[Tensor]) -> list[Tensor]:
    """What the tower has of every image's tokens, (n, ...), in raster order."""
    return [own[order.argsort()] for own, order in zip(tokens, orders(case), strict=True)]


def merge(case: Case) -> int:
    """Side of the square of patches that a visual token is made of."""
    return getattr(case, "merge", 2)


def of_tokens(case: Case, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, H) means over the patches of every token, of (N, H) in the tower's own order."""
    (height, width), side = grid, merge(case)
    if isinstance(case, Mistral3):  # row by row; in Qwen's towers, token by token
        rows = patches.view(height, side, width, side, -1)
        return rows.mean((1, 3)).flatten(0, 1)
    return patches.view(height * width, side**2, -1).mean(1)


def received(case: Case, inputs: dict[str, Tensor], monkeypatch: Any) -> list[Tensor]:
    """(n, H) of every image: means over queries, of the eager weights of the tower's last block."""
    model = case.model()
    family = family_of(model)
    tower: Any = family.tower(model)
    last = family.tower_attention(family.tower_layers(model)[-1])
    module = sys.modules[type(last).__module__]
    eager, found = module.eager_attention_forward, []

    def noting(which: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = eager(which, *args, **kwargs)
        if which is last:
            found.append(weights[0])
        return output, weights

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", noting)
        tower.set_attn_implementation("eager")
        model(**inputs)
        tower.set_attn_implementation("sdpa")
    if isinstance(case, Mistral3):  # all images at once
        ends = list(itertools.accumulate(merge(case) ** 2 * n for n in SIZES))
        found = [found[0][:, a:b, a:b] for a, b in itertools.pairwise([0, *ends])]
    means = [
        of_tokens(case, weights.mean(1).T, grid) for weights, grid in zip(found, GRIDS, strict=True)
    ]
    return in_raster(case, means)


@of_each
class TestViews:
    def test_attention_is_received_within_an_image(self, case: Case, monkeypatch: Any) -> None:
        inputs = case.inputs(PROMPT)
        expected = received(case, inputs, monkeypatch)
        views = seen(case, inputs)
        assert [len(one) for one in expected] == SIZES
        for view, weights in zip(views, expected, strict=True):
            torch.testing.assert_close(
                view.cls_attention[0, 0].T, weights, rtol=2e-5, atol=1e-7, check_dtype=False
            )
            assert weights.sum(0).tolist() == pytest.approx(
                [1 / merge(case) ** 2] * weights.shape[1]
            )

    def test_features_and_keys_are_in_raster_order(self, case: Case) -> None:
        model, inputs = case.model(), case.inputs(PROMPT)
        family = family_of(model)
        got: list[Tensor] = []
        hook = family.token_features(model).register_forward_pre_hook(
            lambda _, args: got.append(args[0])
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        tokens = list(got[0].reshape(sum(SIZES), -1).split(SIZES))
        for view, features in zip(seen(case, inputs), in_raster(case, tokens), strict=True):
            assert torch.equal(view.features[0], features)
            weights = received_attention(
                view.queries[0], view.keys[0], view.keys[0].shape[-1] ** -0.5
            )
            pooled = view.pooled(weights.transpose(1, 2))[0].T
            torch.testing.assert_close(pooled, view.cls_attention[0, 0])

    def test_images_are_shown_one_by_one(self, case: Case) -> None:
        views = seen(case, case.inputs(PROMPT))
        assert [view.grid for view in views] == [(4, 6), (3, 3), (3, 3)]
        assert [view.features.shape[:2] for view in views] == [(1, n) for n in SIZES]
        assert all(view.cls_feature is None and not view.has_cls for view in views)
        assert views[0].budgets(0.5) == [12]


@of_each
def test_what_stages_after_the_tower_see_of_it(case: Case) -> None:
    model, inputs, found = case.model(), case.inputs(PROMPT), []

    class Reading(Looking):
        def stages(self) -> list[Any]:
            return [Stage(0, self._read, tower=True)]

        def _read(self, view: View) -> Selection:
            found.append((view.tower, view.features, view.layout.valid))
            return Selection(view.layout.valid)

    with torch.no_grad(), Reading()(model):
        model(**inputs)
    [(encoded, features, valid)] = found
    for one, view, states, mask in zip(encoded, seen(case, inputs), features, valid, strict=True):
        assert torch.equal(one.features, view.features)
        assert torch.equal(one.projected[0], states[mask])


@of_each
def test_the_best_of_every_image_stay(case: Case, monkeypatch: Any) -> None:
    inputs, model = case.inputs(PROMPT), case.model()
    scores = [weights.mean(1) for weights in received(case, inputs, monkeypatch)]
    with torch.no_grad(), pore.FasterVLM(KEEP)(model) as run:
        model(**inputs)
    kept = [image.kept for sample in run.report for image in sample.images]
    assert [list(one) for one in kept] == [
        sorted(own.topk(KEEP).indices.tolist()) for own in scores
    ]


@of_each
def test_kept_tokens_have_the_features_and_positions_that_they_had(case: Case) -> None:
    model, inputs = case.model(), case.inputs(PROMPT)
    family, entered = family_of(model), []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        entered.append((hidden, kwargs["position_embeddings"]))

    with torch.no_grad():
        hook = family.layers(model)[0].register_forward_pre_hook(note, with_kwargs=True)
        model(**inputs)
        with pore.FasterVLM(KEEP)(model) as run:
            model(**inputs)
        hook.remove()
    (whole, tables), (hidden, short) = entered
    for row, sample in enumerate(run.report):
        visual, tokens = case.visual(PROMPT)[row], inputs["attention_mask"][row].bool()
        columns, start = visual.nonzero()[:, 0], 0
        stays = tokens & ~visual
        for image in sample.images:
            stays[columns[start : start + image.seen][list(image.kept)]] = True
            start += image.seen
        count = int(stays.sum())
        torch.testing.assert_close(hidden[row, -count:], whole[row, stays], rtol=1e-9, atol=1e-9)
        for table, full in zip(short, tables, strict=True):
            # Before transformers 5.17 the axes come first.
            left = table.select(-3, row)[..., -count:, :]
            own = full.select(-3, row)[..., stays, :] if family.mrope else full[0, :count]
            assert torch.equal(left, own)


@of_each
def test_the_projector_sees_fewer_patches(case: Case) -> None:
    model, inputs, sizes = case.model(), case.inputs(PROMPT), []
    # Before the hook of ours that puts what was kept back in its place.
    hook = (
        family_of(model)
        .projector(model)
        .register_forward_hook(lambda *args: sizes.append(args[2].shape[-2]))
    )
    with torch.no_grad(), pore.VisPruner(KEEP)(model):
        model(**inputs)
    hook.remove()
    assert sizes == [3 * KEEP]


def test_layers_with_windows_are_read_at_the_last_one_without() -> None:
    model = QWEN25.model()
    family, config = family_of(model), family_of(model).tower(model).config
    assert [family.tower_attended(model, layer) for layer in (0, 1)] == [1, 1]
    before, config.fullatt_block_indexes = config.fullatt_block_indexes, [3, 7]
    try:
        found = [family.tower_attended(model, layer) for layer in range(9)]
    finally:
        config.fullatt_block_indexes = before
    assert found == [3, 3, 3, 3, 3, 3, 3, 7, 7]
    with torch.no_grad(), pore.HiPrune(KEEP, object_layer=0)(model) as run:
        model(**QWEN25.inputs(PROMPT))
    assert "in their stead the attention of [1, 1] was read" in str(run.report)


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """FlashAttention's contract for packed sequences, on a CPU."""
    assert attention_mask is None
    if "cu_seq_lens_q" in kwargs:
        bounds = kwargs["cu_seq_lens_q"].tolist()
        assert bounds == kwargs["cu_seq_lens_k"].tolist()
    else:  # as Pixtral in transformers 5.16: an image starts where positions do
        starts = kwargs["position_ids"].flatten() == 0
        bounds = [*starts.nonzero()[:, 0].tolist(), query.shape[2]]
    outputs = []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        outputs.append((q @ k.mT * kwargs["scaling"]).softmax(-1) @ v)
    return torch.cat(outputs, 2).transpose(1, 2), None


@of_each
def test_flash_attention_hands_all_images_over_at_once(case: Case) -> None:
    model, inputs = case.model(), case.inputs(PROMPT)
    config: Any = family_of(model).tower(model).config
    ALL_ATTENTION_FUNCTIONS.register("flash_packed_test", _flash)
    expected = seen(case, inputs)
    config._attn_implementation_internal = "flash_packed_test"
    try:
        views = seen(case, inputs)
    finally:
        config._attn_implementation_internal = "sdpa"
    for one, other in zip(views, expected, strict=True):
        torch.testing.assert_close(one.cls_attention, other.cls_attention)
        torch.testing.assert_close(one.features, other.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_received_attention_in_parts(padded: bool, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 7, 4).unbind(0)
    real = torch.arange(7) < torch.tensor([[7], [5]]) if padded else None
    whole = received_attention(query, key, 0.5, real)
    monkeypatch.setattr(attention_module, "_LOGITS", 7 * 3)
    torch.testing.assert_close(received_attention(query, key, 0.5, real), whole)


def test_a_merged_rest_comes_in_place_of_a_token_that_goes() -> None:
    model, inputs = QWEN25.model(), QWEN25.inputs(PROMPT)
    with torch.no_grad(), pore.PruMerge(KEEP)(model) as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    images = [image for sample in run.report for image in sample.images]
    assert [(len(image.kept), image.extra) for image in images] == [(KEEP - 1, 1)] * 3


@given(st.data())
def test_slots(data: Any) -> None:
    n = data.draw(st.integers(1, 9))
    patches = data.draw(st.lists(st.integers(0, n - 1), unique=True))
    none = data.draw(st.integers(0, n - len(patches)))
    raster = torch.tensor(data.draw(st.permutations([*patches, *[-1] * none])), dtype=torch.long)
    slots = slots_of(raster, n)
    assert slots.unique().numel() == len(raster)
    assert torch.equal(slots[raster >= 0], raster[raster >= 0])
    free = sorted(set(range(n)) - set(patches))
    assert slots[raster < 0].tolist() == free[len(free) - none :]
    with pytest.raises(BudgetError, match="keep fewer"):
        slots_of(torch.cat([raster, torch.full((n + 1 - len(raster),), -1)]), n)


class TestRefused:
    def test_letterbox_padding(self) -> None:
        refused = pytest.raises(UnsupportedModelError, match="in their own shape")
        with refused, pore.FastV(KEEP, suppress_padding=0.1)(QWEN25.model()):
            pass

    def test_features_made_before(self) -> None:
        model, inputs = QWEN25.model(), QWEN25.inputs(PROMPT)
        with torch.no_grad():
            embeds = model.get_input_embeddings()(inputs["input_ids"])
        with torch.no_grad(), pore.FasterVLM(KEEP)(model) as run:
            run.mark_visual(QWEN25.visual(PROMPT))
            with pytest.raises(InputError, match="made before"):
                model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])

    def test_merging_without_saying_so(self) -> None:
        class Doubling(Looking):
            def _look(self, view: TowerView) -> TowerSelection:
                return TowerSelection(view.features[:, :3] * 2, view.raster[:, :3])

        refused = pytest.raises(ModelStateError, match="merges=True")
        with refused, torch.no_grad(), Doubling()(QWEN25.model()):
            QWEN25.model()(**QWEN25.inputs(PROMPT))
