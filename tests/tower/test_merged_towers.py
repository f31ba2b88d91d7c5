"""Methods in towers whose patches are merged into visual tokens, against attention by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pore
from cases.base import Case, noise
from helpers.families import check_cached_decode
from helpers.towers import MERGED, attentions, seen, squares
from pore.engine.pruner import Pruner
from pore.errors import InputError, UnsupportedModelError
from pore.families.registry import family_of
from pore.tensors.selection import proportional_shares
from pore.tower.stages import TowerSelection, TowerStage, TowerView

KEEP = 6
PROMPT = [[5, -1, 6, -2, 7, 8], [5, 6, 10, -4, 7, 8, 9]]
"""Three images; in families that cut them into tiles the first has three tiles."""

of_each = pytest.mark.parametrize("case", MERGED, ids=lambda case: case.name)


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
