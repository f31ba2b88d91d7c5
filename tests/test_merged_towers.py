"""Methods in towers whose patches are merged into visual tokens, against attention by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pore
from family_cases import CASES, Case
from pore.errors import InputError, UnsupportedModelError
from pore.families import family_of
from pore.pruner import Pruner
from pore.tower import TowerSelection, TowerStage, TowerView

KEEP = 6
MERGED = [case for case in CASES if case.name in ("InternVL",)]
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
    tower = family_of(model).tower(model)
    calls: list[tuple[Any, Any]] = []
    hook = tower.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        (args, kwargs) = calls[0]
        tower.set_attn_implementation("eager")
        found = torch.stack(tower(*args, **{**kwargs, "output_attentions": True}).attentions)
        tower.set_attn_implementation("sdpa")
    if case.name == "InternVL":
        return found[..., 0, 1:]
    return found.mean(-2)


@of_each
class TestViews:
    def test_attention_is_the_mean_over_the_patches_of_a_token(self, case: Case) -> None:
        inputs, model = case.inputs(PROMPT), case.model()
        size = family_of(model).merge_size(model)
        expected = squares(attentions(case, inputs)[..., None], size)[..., 0]
        got = seen(case, inputs).cls_attention
        assert got.shape[-1] * size**2 == 64
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)

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
        assert torch.equal(seen(case, inputs).features, got[0])


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
                family_of(model).base(model).get_image_features(inputs["pixel_values"])

    def test_tiles_that_the_prompt_does_not_have_are_refused(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs(PROMPT[:1]) | case.encode([0])
        refused = pytest.raises(InputError, match="build the inputs with the model's own processor")
        with torch.no_grad(), refused, pore.FasterVLM(KEEP)(model):
            model(**inputs)
