"""Methods in the vision tower on videos: of every frame they keep what they keep of a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pore
from cases import CASES, COUSINS
from cases.base import Case, noise
from cases.llava_next import LlavaOnevision
from helpers.families import PROMPTS, check_cached_decode, forward, refusal, together, usual
from helpers.methods import EVERY
from pore.engine.pruner import Pruner
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.families.registry import family_of
from pore.methods._tower import tower_attention
from pore.tensors.selection import even_shares
from pore.tower.stages import TowerAttention, TowerSelection, TowerStage, TowerView

KEEP = 6
VIDEO = [[5, 6, -100, 7, 8]]


class OddOnevision(LlavaOnevision):
    """Frames of 5 x 5 patches, which become 3 x 3 tokens by interpolation between them."""

    name = "LLaVA-OneVision, odd"
    side = 40

    def build(self) -> Any:
        made = super().build()
        made.config.vision_config.image_size = self.side
        tower = type(made.model.vision_tower)._from_config(
            made.config.vision_config, dtype=torch.float64
        )
        made.model.vision_tower = tower
        return made.double()

    def video_ids(self, video: int) -> list[int]:
        return [101] * 19

    def encode_videos(self, videos: Any) -> dict[str, Tensor]:
        frames = [noise(50 + i, 2, 3, self.side, self.side) for i in videos]
        return {"pixel_values_videos": torch.stack(frames)}


def methods(case: Case) -> list[str]:
    """The methods in the tower that a family takes on videos."""
    return [
        name
        for name in EVERY
        if any(isinstance(stage, TowerStage) for stage in usual(name, 1.0, case).stages())
        and refusal(case, name) is None
        and name != "ToMe"
    ]


WITH_VIDEOS = [
    case
    for case in [*CASES, *COUSINS, OddOnevision()]
    if case.videos and family_of(case.model()).tower_refusal is None
]
STACKED = [case for case in WITH_VIDEOS if not family_of(case.model()).packed]
PACKED = [case for case in WITH_VIDEOS if case not in STACKED]
families = pytest.mark.parametrize("case", WITH_VIDEOS, ids=lambda case: case.name)


def pairs(cases: list[Case]) -> Any:
    """Families with the methods that they take."""
    return pytest.mark.parametrize(
        ("case", "name"),
        [
            pytest.param(case, name, id=f"{case.name}-{name}")
            for case in cases
            for name in methods(case)
        ],
    )


def prompts(case: Case) -> Any:
    return VIDEO if isinstance(case, OddOnevision) else PROMPTS[case.videos or "videos"]


# -- every method in every family ------------------------------------------------------------------


@pairs(WITH_VIDEOS)
@pytest.mark.at_once(12)
def test_budgets_keep_all_and_decoding(case: Case, name: str) -> None:
    """`keep` is of a whole video, beside an image or not; keeping all changes no bit."""
    inputs = case.inputs(prompts(case))
    assert torch.equal(together(case, usual(name, 1.0, case), inputs)[0], forward(case, inputs))
    _, run = together(case, usual(name, KEEP, case), inputs)
    for sample in run.report:
        for image in sample.images:
            assert len(image.kept) + image.extra == KEEP
            assert len(set(image.kept)) == len(image.kept)
    check_cached_decode(case, usual(name, KEEP, case), prompts(case))


@pytest.mark.parametrize("case", STACKED, ids=lambda case: case.name)
def test_what_the_projector_does_is_counted(case: Case) -> None:
    """Where tokens are made after it, all patches go through it whatever stays."""
    _, run = together(case, pore.FasterVLM(KEEP), case.inputs(VIDEO))
    (sample,) = run.report
    assert sample.cost is not None
    assert sample.unpruned_cost is not None
    before, after = sample.unpruned_cost.projector, sample.cost.projector
    assert before
    if family_of(case.model()).of_videos.pools_after is None:
        assert after == before * KEEP // sample.images[0].seen
    else:
        assert after == before


class Seeing(Pruner):
    """A method that also notes what its rule saw and decided."""

    keep = KEEP

    def __init__(self, method: Pruner) -> None:
        self.method = method
        self.seen: list[tuple[TowerView, TowerSelection]] = []

    def stages(self) -> list[TowerStage]:
        (stage,) = self.method.stages()
        assert isinstance(stage, TowerStage)
        rule = stage.rule

        def watch(view: TowerView) -> TowerSelection:
            self.seen.append((view, rule(view)))
            return self.seen[-1][1]

        return [replace(stage, rule=watch)]


def seen(case: Case, method: Pruner) -> tuple[TowerView, TowerSelection]:
    """What a rule saw of a single video, and decided."""
    seeing = Seeing(method)
    together(case, seeing, case.inputs(VIDEO))
    ((view, selection),) = seeing.seen
    return view, selection


@pairs(WITH_VIDEOS)
@pytest.mark.at_once(12)
def test_of_a_frame_stays_what_stays_of_a_picture(case: Case, name: str) -> None:
    """The rule on single frames, each as a picture with its even share of `keep`."""
    view, selection = seen(case, usual(name, KEEP, case))
    frames, n = view.features.shape[:2]
    shares = even_shares(KEEP - frames * view.beside, [n] * frames)
    for frame, share in enumerate(shares):
        one = slice(frame, frame + 1)
        alone = replace(
            view,
            features=view.features[one],
            cls_attention=view.cls_attention[:, one],
            queries=tuple(query[one] for query in view.queries),
            keys=tuple(key[one] for key in view.keys),
            raster=view.raster[one],
            tilings=None,
        )
        (stage,) = usual(name, share, case).stages()
        expected = stage.rule(alone)  # type: ignore[arg-type]
        valid = slice(None) if selection.valid is None else selection.valid[frame]
        assert selection.raster[frame, valid].tolist() == expected.raster[0].tolist()
        torch.testing.assert_close(selection.features[frame, valid], expected.features[0])


@pairs(PACKED)
@pytest.mark.at_once(8)
def test_frames_given_as_images_keep_the_same(case: Case, name: str) -> None:
    """In towers without attention between frames, through the whole model."""
    inputs = case.inputs(VIDEO)
    frames, height, width = inputs["video_grid_thw"][0].tolist()
    n = height * width // 4
    _, run = together(case, usual(name, KEEP, case), inputs)
    ids = [5, 6, *[i for _ in range(frames) for i in (102, *[100] * n, 103)], 7, 8]
    one = torch.tensor([ids])
    alone: dict[str, Tensor] = {
        "input_ids": one,
        "attention_mask": torch.ones_like(one),
        "mm_token_type_ids": (one == 100).int(),
        "pixel_values": inputs["pixel_values_videos"],
        "image_grid_thw": torch.tensor([[1, height, width]] * frames),
    }
    _, other = together(case, usual(name, KEEP // frames, case), alone)
    assert KEEP % frames == 0
    (video,), images = run.report.samples[0].images, other.report.samples[0].images
    kept = [frame * n + place for frame, image in enumerate(images) for place in image.kept]
    assert sorted(video.kept) == sorted(kept)


# -- what a rule sees ------------------------------------------------------------------------------


def pooled(case: Case, values: Tensor) -> Tensor:
    """(..., n) of the patches of square frames, as the model pools its features; (..., N)."""
    if case.name == "Video-LLaVA":
        return values
    side = round(values.shape[-1] ** 0.5)
    plane = values.reshape(-1, 1, side, side)
    if "NeXT" in case.name:
        plane = nn.functional.avg_pool2d(plane, 2)
    elif "OneVision" in case.name:
        half = (side + 1) // 2
        plane = nn.functional.interpolate(plane, size=(half, half), mode="bilinear")
    return plane.view(*values.shape[:-1], -1)


def weights_in(case: Case) -> Tensor:
    """(T, H, q, n) attention in the tower layer that the projector reads, by transformers."""
    model = case.model()
    frames = family_of(model).of_videos
    layer = frames.tower_layers(model)[frames.tower_read(model)]
    found: list[Tensor] = []
    module = frames.tower_attention(layer)
    hook = module.register_forward_hook(lambda _, __, output: found.append(output[1]))
    frames.tower(model).set_attn_implementation("eager")
    forward(case, case.inputs(VIDEO))
    frames.tower(model).set_attn_implementation("sdpa")
    hook.remove()
    return found[0]


@pytest.mark.parametrize("case", STACKED, ids=lambda case: case.name)
def test_what_a_rule_sees_is_what_the_model_makes_tokens_of(case: Case) -> None:
    view, _ = seen(case, pore.FasterVLM(1.0))
    model, weights = case.model(), weights_in(case)
    cls = family_of(model).of_videos.tower_has_cls(model)
    expected = pooled(case, weights[:, :, 0, 1:] if cls else weights.mean(2))
    torch.testing.assert_close(view.cls_attention[0], expected)
    pixels = case.inputs(VIDEO)["pixel_values_videos"]
    with torch.no_grad():
        made = model.model.get_video_features(pixels).pooler_output
        if "OneVision" in case.name:
            tokens, features = made[0, :-1], view.features
        else:
            tokens, features = made, model.model.multi_modal_projector(view.features)
    frames = tokens.reshape(len(features), -1, tokens.shape[-1])[:, view.beside :]
    torch.testing.assert_close(features, frames)
    kept = pore.FasterVLM(KEEP)
    _, selection = seen(case, kept)
    share = (KEEP - 2 * view.beside) // 2
    best = expected.mean(1).topk(share).indices.sort().values
    assert selection.raster.tolist() == best.tolist()


# -- what stages on the embeddings see -------------------------------------------------------------


class Asking(Pruner):
    """Keeps all, and notes the attention in the tower."""

    keep = 1.0

    def __init__(self, kind: TowerAttention) -> None:
        self.kind = kind
        self.attention: Tensor
        self.view: View

    def stages(self) -> list[Stage]:
        return [Stage(0, self._look, tower=True, tower_attention=self.kind)]

    def _look(self, view: View) -> Selection:
        self.view, self.attention = view, tower_attention(view, self.kind)
        return Selection(view.layout.valid)


def by_hand(view: TowerView, kind: TowerAttention, case: Case) -> Tensor:
    """(T, N) attention of a kind from queries and keys, averaged over heads."""
    ((query,), (key,)) = view.queries, view.keys
    cls = int(view.has_cls)
    own = cls - view.beside
    frames, heads, _, width = key.shape
    many = family_of(case.model()).packed

    def tokens(values: Tensor) -> Tensor:
        return values.reshape(frames, heads, -1, 4).mean(-1) if many else pooled(case, values)

    if kind == "mean":
        mean = query[:, :, cls:].mean(2, keepdim=True)
        key = torch.stack([tokens(key[:, :, own:, i].contiguous()) for i in range(width)], -1)
        return (mean @ key.mT * width**-0.5).softmax(-1).mean((1, 2))
    weights = (query @ key.mT * width**-0.5).softmax(-1)
    row = weights[:, :, 0] if kind == "cls" and cls else weights.mean(2)
    return tokens(row[:, :, own:].contiguous()).mean(1)


@families
@pytest.mark.parametrize("kind", ["cls", "received", "mean"])
def test_attention_for_stages_on_the_embeddings(case: Case, kind: TowerAttention) -> None:
    asking = Asking(kind)
    together(case, asking, case.inputs(VIDEO))
    view, _ = seen(case, pore.FasterVLM(1.0))
    expected = by_hand(view, kind, case)
    torch.testing.assert_close(asking.attention.view_as(expected), expected)
    (encoded,) = asking.view.tower or ()
    assert encoded.features.shape[:2] == encoded.projected.shape[:2] == expected.shape
    got = encoded.projected.flatten(0, 1)
    torch.testing.assert_close(got, asking.view.features[0], check_dtype=False)


@families
def test_a_prompt_with_an_image_and_videos(case: Case) -> None:
    """What is read of each is what is read of it alone."""
    if case.videos != "mixed" or isinstance(case, OddOnevision):
        pytest.skip("it has no such prompts")
    asking = Asking("received")
    together(case, asking, case.inputs([[5, -100, 6, -2, 7, 8], [5, 6, 10, -101, 7, 8, 9]]))
    every, valid = asking.attention, asking.view.layout.valid
    for i, prompt in enumerate(([5, -100, 7], [5, -2, 7], [5, -101, 7])):
        together(case, asking, case.inputs([prompt]))
        torch.testing.assert_close(every[i, valid[i]], asking.attention[0])


# -- refusals --------------------------------------------------------------------------------------


@families
def test_merging_inside_the_tower_is_refused(case: Case) -> None:
    family = family_of(case.model())
    if family.packed:
        pytest.skip("such families refuse the method altogether")
    with pytest.raises(UnsupportedModelError, match="Patches are merged from block to block"):
        together(case, pore.ToMe(r=1), case.inputs(VIDEO))


@pytest.mark.parametrize(
    ("made", "error", "match"),
    [
        (lambda: pore.FasterVLM(2), BudgetError, "each of which keeps its CLS token"),
        (lambda: pore.HiRED(6, faithful=True), InputError, "knows only images"),
    ],
)
def test_what_no_video_can_have(
    made: Callable[[], Pruner], error: type[Exception], match: str
) -> None:
    (case,) = (case for case in CASES if case.name == "Video-LLaVA")
    with pytest.raises(error, match=match):
        together(case, made(), case.inputs(VIDEO))
