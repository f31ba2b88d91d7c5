"""Methods in towers whose patches are merged into visual tokens, against attention by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pore
from cases import CASES, COUSINS
from cases.base import Case, noise
from helpers.families import check_cached_decode
from pore.engine.pruner import Pruner
from pore.errors import InputError, UnsupportedModelError
from pore.families.registry import family_of
from pore.methods.prumerge import attention_and_keys
from pore.tensors.attention import cls_attention, received_attention, visible
from pore.tensors.selection import proportional_shares
from pore.tower.stages import TowerSelection, TowerStage, TowerView

KEEP = 6
MERGED = [
    case
    for case in [*CASES, *COUSINS]
    if family_of(case.model()).merged and not family_of(case.model()).packed
]
PROMPT = [[5, -1, 6, -2, 7, 8], [5, 6, 10, -4, 7, 8, 9]]
"""Three images; in families that cut them into tiles the first has three tiles."""

of_each = pytest.mark.parametrize("case", MERGED, ids=lambda case: case.name)


class Looking(Pruner):
    """Keeps all, and shows what a rule sees."""

    keep = 1.0
    view: TowerView

    def stages(self) -> list[TowerStage]:
        return [TowerStage(self._look, layers=lambda read, _: range(read + 1))]

    def _look(self, view: TowerView) -> TowerSelection:
        self.view = view
        return view.select(view.shown, [view.features.shape[1]] * len(view.features))


def seen(case: Case, inputs: dict[str, Tensor]) -> TowerView:
    looking = Looking()
    with torch.no_grad(), looking(case.model()):
        case.model()(**inputs)
    return looking.view


def squares(values: Tensor, size: int) -> Tensor:
    """(..., P, d) of patches in raster order: their means over squares, in raster order."""
    side = round(values.shape[-2] ** 0.5)
    planes = values.unflatten(-2, (side, side)).movedim(-1, -3)
    shape = planes.shape
    means = nn.functional.avg_pool2d(planes.reshape(-1, side, side)[None], size)[0]
    return means.view(*shape[:-2], -1).mT


def attentions(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """(S, I, H, P) attention to the patches, of CLS or the mean, by transformers' eager code."""
    model = case.model()
    family = family_of(model)
    found: list[Tensor] = []
    hooks = [
        family.tower_attention(layer).register_forward_hook(
            lambda _, __, output: found.append(output[1])
        )
        for layer in family.tower_layers(model)
    ]
    family.tower(model).set_attn_implementation("eager")
    with torch.no_grad():
        model(**inputs)
    family.tower(model).set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    weights = torch.stack(found)
    if not family.tower_has_cls(model):
        real = weights.sum(-2, keepdim=True) > 0  # no query sees what is padding
        return (weights * real.mT).sum(-2) / real.sum(-1)
    if not family.cls_first:
        weights = weights.roll((1, 1), (-2, -1))
    return weights[..., 0, 1:]


@of_each
class TestViews:
    def test_attention_is_the_mean_over_the_patches_of_a_token(self, case: Case) -> None:
        inputs, model = case.inputs(PROMPT), case.model()
        size = family_of(model).merge_size(model)
        expected = squares(attentions(case, inputs)[..., None], size)[..., 0]
        got = seen(case, inputs).cls_attention
        assert got.shape[-1] * size**2 == 64
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)  # float32 softmax

    def test_keys_are_pooled_likewise(self, case: Case) -> None:
        inputs, model = case.inputs(PROMPT), case.model()
        view, size = seen(case, inputs), family_of(model).merge_size(model)
        cls = family_of(model).tower_has_cls(model)
        assert view.has_cls == cls
        assert view.cls_feature is None
        for key in view.keys:
            keys = key.mean(1)
            pooled = view.pooled(keys)
            torch.testing.assert_close(pooled[:, cls:], squares(keys[:, cls:], size))
            assert torch.equal(pooled[:, :cls], keys[:, :cls])
            torch.testing.assert_close(view.pooled(keys[:, cls:]), pooled[:, cls:])

    def test_features_are_what_the_projector_gets(self, case: Case) -> None:
        inputs, model = case.inputs(PROMPT), case.model()
        got: list[Tensor] = []
        module = family_of(model).token_features(model)
        hook = module.register_forward_pre_hook(lambda _, args: got.append(args[0]))
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        assert torch.equal(seen(case, inputs).features, got[0].flatten(1, -2))


@of_each
def test_the_best_of_every_tile_stay(case: Case) -> None:
    inputs, model = case.inputs(PROMPT), case.model()
    size = family_of(model).merge_size(model)
    tiles = squares(attentions(case, inputs)[-1].mean(1)[..., None], size)[..., 0]
    with torch.no_grad(), pore.FasterVLM(KEEP)(model) as run:
        model(**inputs)
    start = 0
    for image in (image for sample in run.report for image in sample.images):
        n = tiles.shape[1]
        count = image.seen // n
        expected = [
            tile * n + place
            for tile in range(count)
            for place in sorted(tiles[start + tile].topk(KEEP // count).indices.tolist())
        ]
        assert list(image.kept) == expected
        start += count
    assert start == len(tiles)


@of_each
def test_the_projector_sees_fewer_tokens(case: Case) -> None:
    inputs, model = case.inputs(PROMPT), case.model()
    sizes: list[int] = []
    module = family_of(model).token_features(model)
    with torch.no_grad(), pore.VisionZip(KEEP)(model) as run:
        hook = module.register_forward_hook(
            lambda _, args, __: sizes.append(args[0].shape[:-1].numel())
        )
        model(**inputs)
        hook.remove()
    assert sizes == [3 * KEEP]
    assert all(image.extra == 0 for sample in run.report for image in sample.images)


class Turned(Pruner):
    """Of every tile the first three tokens, the last of them first; one stands for no patch."""

    keep = 3

    def stages(self) -> list[TowerStage]:
        return [TowerStage(self._turn)]

    def _turn(self, view: TowerView) -> TowerSelection:
        raster = torch.tensor([2, 1, -1]).expand(len(view.features), -1)
        return TowerSelection(view.features[:, [2, 1, 0]], raster, structure=False)


@of_each
def test_what_is_left_of_a_tile_stays_in_its_place(case: Case) -> None:
    """Tags and separators between tiles too, whatever a method does to their tokens."""
    inputs, model = case.inputs(PROMPT[:1]), case.model()
    family = family_of(model)
    seen: list[Tensor] = []
    hook = family.layers(model)[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs)
        with Turned()(model) as run:
            model(**inputs)
    hook.remove()
    length, n = inputs["input_ids"].shape[1], 16
    left: dict[int, int | None] = {column: column for column in range(length)}
    for image in family.images(model, inputs):
        for i, column in enumerate(image.columns):
            left[column] = image.columns[i // n * n + 2 - i % n] if i % n < 3 else None
    expected = [column for column in left.values() if column is not None]
    torch.testing.assert_close(seen[1][0], seen[0][0, expected], rtol=case.close, atol=case.close)
    for image in run.report.samples[0].images:
        tiles = image.seen // n
        assert list(image.kept) == [tile * n + place for tile in range(tiles) for place in (2, 1)]
        assert image.extra == tiles


@of_each
def test_eager_towers_are_the_same(case: Case) -> None:
    """Keeping all is bit-equal to eager attention unread, and the same tokens stay."""
    model, inputs = case.model(), case.inputs(PROMPT)
    tower = family_of(model).tower(model)
    with torch.no_grad(), pore.FasterVLM(KEEP)(model) as run:
        model(**inputs)
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            dense = model(**inputs).logits
            with pore.FasterVLM(1.0)(model):
                assert torch.equal(model(**inputs).logits, dense)
            with pore.FasterVLM(KEEP)(model) as again:
                model(**inputs)
    finally:
        tower.set_attn_implementation("sdpa")
    assert [s.images for s in run.report] == [s.images for s in again.report]


@of_each
def test_the_report_says_that_attention_was_averaged(case: Case) -> None:
    with torch.no_grad(), pore.FasterVLM(KEEP)(case.model()) as run:
        case.model()(**case.inputs(PROMPT))
    size = family_of(case.model()).merge_size(case.model())
    assert f"Every visual token is made of {size} x {size} patches" in str(run.report)


@of_each
def test_merging_inside_the_tower_is_refused(case: Case) -> None:
    refused = pytest.raises(UnsupportedModelError, match="on the full grid")
    with refused, pore.ToMe(r=2)(case.model()):
        pass


@of_each
def test_relevance_by_clip_is_refused(case: Case) -> None:
    refused = pytest.raises(UnsupportedModelError, match="relevance of single patches")
    relevance = pore.ClipRelevance(nn.Module(), None, "what")
    with refused, pore.CDPruner(KEEP, relevance=relevance)(case.model()):
        pass


@of_each
def test_letterbox_bars_are_found_on_the_grid_of_tokens(case: Case) -> None:
    """Bars of 8 of 32 pixels above and below are the first and the last row of four."""
    model, inputs = case.model(), case.inputs([[5, -2, 6, 7]])
    inputs["pixel_values"][..., :8, :] = 0
    inputs["pixel_values"][..., 24:, :] = 0
    with torch.no_grad(), pore.FastV(16, layer=2, suppress_padding=0.5)(model) as run:
        model(**inputs)
    assert list(run.report.samples[0].images[0].kept) == list(range(4, 12))


def test_tiles_have_no_grid_to_find_bars_on() -> None:
    case = next(case for case in MERGED if case.name == "InternVL")
    refused = pytest.raises(InputError, match="cannot be matched with padding")
    with torch.no_grad(), refused, pore.FastV(6, layer=2, suppress_padding=0.5)(case.model()):
        case.model()(**case.inputs([[5, -2, 6, -1, 7]]))


@of_each
def test_a_chain_from_the_tower_into_the_decoder(case: Case) -> None:
    chain = pore.Chain(pore.PruMerge(9), pore.FastV(KEEP, layer=2))
    check_cached_decode(case, chain, PROMPT)
    with torch.no_grad(), chain(case.model()) as run:
        case.model()(**case.inputs(PROMPT))
    assert all(len(i.kept) + i.extra == KEEP for s in run.report for i in s.images)


class TestPadding:
    """Idefics3 pads images that it does not cut: its tower does not look at what is not there."""

    case = next(case for case in MERGED if case.name == "SmolVLM")

    def inputs(self) -> dict[str, Tensor]:
        inputs = self.case.inputs([[5, -2, 6, -4, 7, 8]])
        mask = torch.ones(1, 2, 32, 32, dtype=torch.bool)
        mask[:, 0, :, 20:] = False  # three columns of eight, so that some tokens are half padding
        return {**inputs, "pixel_attention_mask": mask}

    def test_attention_is_that_of_what_is_there(self) -> None:
        inputs = self.inputs()
        view, found = seen(self.case, inputs), attentions(self.case, inputs)
        assert view.real is not None
        assert view.real.sum(1).tolist() == [40, 64]
        assert bool((view.cls_attention[:, 0].unflatten(-1, (4, 4))[..., 3:] == 0).all())
        expected = squares(found[..., None], 2)[..., 0]
        torch.testing.assert_close(view.cls_attention, expected, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("pruner", [pore.FasterVLM, pore.HiPrune, pore.PruMerge])
    def test_an_image_is_pruned_as_by_itself(self, pruner: Any) -> None:
        model, inputs = self.case.model(), self.inputs()
        settings = {"object_layer": 0} if pruner is pore.HiPrune else {}
        reports = []
        with torch.no_grad(), pruner(KEEP, **settings)(model) as run:
            model(**inputs)
            reports += run.report.samples[-1].images
            for i in range(2):
                pixels = {name: inputs[name][:, i : i + 1] for name in inputs if "pixel" in name}
                model(**{**self.case.inputs([[5, -2, 6]]), **pixels})
                reports += run.report.samples[-1].images
        assert [image.kept for image in reports[:2]] == [image.kept for image in reports[2:]]

    def test_heads_taken_as_one(self) -> None:
        """PruMerge's own attention, by hand on what is there."""
        view = seen(self.case, self.inputs())
        scores, keys = attention_and_keys(view)
        query, key = (x[0][0].transpose(0, 1).flatten(1) for x in (view.queries, view.keys))
        there = view.real[0]  # type: ignore[index]
        weights = torch.zeros(64, dtype=torch.float64)
        logits = query[there] @ key[there].mT * query.shape[1] ** -0.5
        weights[there] = logits.softmax(-1).mean(0)
        torch.testing.assert_close(scores[0], squares(weights[:, None], 2)[:, 0])
        torch.testing.assert_close(keys[0], squares(key, 2))

    def test_keeping_all_is_bit_equal(self) -> None:
        model, inputs = self.case.model(), self.inputs()
        with torch.no_grad():
            dense = model(**inputs).logits
            with pore.VisionZip(1.0)(model):
                assert torch.equal(model(**inputs).logits, dense)


class TestMasks:
    """What a tower's kernel is given to leave padding out, in the forms that kernels take."""

    there = torch.tensor([[True, True, False, True], [True] * 4])

    @pytest.mark.parametrize("form", ["bool", "additive", "padding"])
    def test_what_is_seen(self, form: str) -> None:
        mask = self.there[:, None, None].expand(-1, 1, 4, -1)
        if form == "additive":
            mask = torch.zeros(2, 1, 4, 4).masked_fill(~mask, torch.finfo(torch.float32).min)
        elif form == "padding":
            mask = self.there.long()
        seen = visible(mask, 2)
        assert seen is not None
        assert torch.equal(seen, self.there)
        assert visible(mask[1:], 2) is None

    def test_one_mask_for_all(self) -> None:
        seen = visible(self.there[:1, None, None].expand(-1, 1, 4, -1), 3)
        assert seen is not None
        assert seen.tolist() == [self.there[0].tolist()] * 3
        assert visible(None, 3) is None

    @pytest.mark.parametrize("read", [cls_attention, received_attention])
    def test_attention_is_that_without_padding(self, read: Any) -> None:
        query, key = noise(1, 2, 3, 4, 5), noise(2, 2, 3, 4, 5)
        alone = [0, 1, 3]
        cls = int(read is cls_attention)
        expected = torch.zeros(3, 4, dtype=torch.float64)
        expected[:, alone[cls:]] = read(query[:1, :, alone], key[:1, :, alone], 0.5)[0]
        got = read(query, key, 0.5, self.there)
        torch.testing.assert_close(got[0], expected[:, cls:])
        torch.testing.assert_close(got[1:], read(query[1:], key[1:], 0.5))


class TestHiRED:
    @pytest.mark.parametrize("name", ["SmolVLM", "Llama 4"])
    def test_tiles_share_by_the_early_attention_of_the_whole_image(self, name: str) -> None:
        """Four tiles in a square, each of which shows a quarter of the whole image."""
        case = next(case for case in MERGED if case.name == name)
        model, tile = case.model(), [case.placeholder] * 16
        pixels = noise(7, 5, 3, 32, 32)
        if name == "SmolVLM":
            rows = [91, 81, *tile, 91, 82, *tile, 93, 91, 83, *tile, 91, 84, *tile, 93]
            ids, pixels = [5, *rows, 91, 92, *tile, 91, 7], pixels[None]
        else:
            rows = [*tile, 103, *tile, 104] * 2
            ids = [5, 101, *rows, 105, *tile, 102, 7]
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
        with torch.no_grad(), pore.HiRED(20)(model) as run:
            model(**inputs)
        kept = torch.tensor(run.report.samples[0].images[0].kept)
        early = squares(attentions(case, inputs)[0, -1].sum(0)[:, None], 2)[:, 0]
        best = early.topk(8).indices
        quarter = best // 8 * 2 + best % 4 // 2
        shares = proportional_shares(10, quarter.bincount(minlength=4).tolist(), [16] * 4)
        assert (kept // 16).bincount(minlength=5).tolist() == [*shares, 10]

    def test_tiles_that_are_nowhere_are_refused(self) -> None:
        case = next(case for case in MERGED if case.name == "InternVL")
        model = case.model()
        with torch.no_grad(), pore.HiRED(KEEP)(model) as run:
            model(**case.inputs([[5, -2, 6, 7]]))
            with pytest.raises(InputError, match="where the tiles lie in the image"):
                model(**case.inputs([[5, -1, 6, 7]]))
        assert len(run.report.samples[0].images[0].kept) == KEEP

    def test_the_authors_tiles_are_others(self) -> None:
        case = next(case for case in MERGED if case.name == "SmolVLM")
        refused = pytest.raises(InputError, match="only the tiles of LLaVA-NeXT")
        with refused, torch.no_grad(), pore.HiRED(KEEP, faithful=True)(case.model()):
            case.model()(**case.inputs([[5, -1, 6, 7]]))


@pytest.mark.parametrize(
    "case",
    [case for case in MERGED if family_of(case.model()).tiled_prompts],
    ids=lambda case: case.name,
)
class TestTiles:
    def test_pixels_without_their_prompt_are_refused(self, case: Case) -> None:
        model, inputs = case.model(), case.inputs(PROMPT)
        refused = pytest.raises(InputError, match="pass input_ids and pixel_values together")
        with torch.no_grad(), pore.FasterVLM(KEEP)(model):
            model(**inputs)
            with refused:
                family_of(model).tower(model)(inputs["pixel_values"].flatten(0, -4))

    def test_tiles_that_the_prompt_does_not_have_are_refused(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs(PROMPT[:1])
        inputs["pixel_values"] = case.inputs([[5, -1, 7]])["pixel_values"]
        refused = pytest.raises(InputError, match="build the inputs with the model's own processor")
        with torch.no_grad(), refused, pore.FasterVLM(KEEP)(model):
            model(**inputs)
