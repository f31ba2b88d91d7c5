"""FastVID, HoliTom and FlashVID in every family: budgets, decoding, their second part, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pore
from cases import CASES, COUSINS
from cases.base import Case
from helpers.families import PROMPTS, check_cached_decode, check_masked_dense, forward, together
from helpers.golden_files import draw
from helpers.videos import video_view
from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.families.registry import family_of
from pore.methods._merging_videos import Frames

# Settings with which tiny random videos have segments, trees and still places.
METHODS = {
    "FastVID": pore.FastVID(0.5, segments=1, tau=-1.0, spacing=1),
    "HoliTom": pore.HoliTom(0.5, tau=0.0),
    "FlashVID": pore.FlashVID(0.5, segments=1, cut_below=-1.0, merge_above=0.0, alpha=0.4),
}
TWO_PARTS = ["HoliTom", "FlashVID"]
WITH_VIDEOS = [
    case
    for case in [*CASES, *(cousin for cousin in COUSINS if cousin.name == "LLaVA-NeXT-Video")]
    if case.videos is not None and family_of(case.model()).tower_refusal is None
]
families = pytest.mark.parametrize("case", WITH_VIDEOS, ids=lambda case: case.name)
methods = pytest.mark.parametrize("pruner", METHODS.values(), ids=METHODS)


def in_two_parts(name: str, case: Case) -> Any:
    """The method with its second part, before the second layer that has attention."""
    family, model = family_of(case.model()), case.model()
    attends = [i for i, one in enumerate(family.layers(model)) if not family.recurrent(one)]
    return replace(METHODS[name], layer=attends[0] + 1, inner=0.5)


# -- in every family -------------------------------------------------------------------------------


@families
@methods
@pytest.mark.at_once(8)
def test_every_family_that_takes_videos(case: Case, pruner: Any) -> None:
    """Budgets are exact, nothing comes twice, and cached decoding equals a full forward."""
    prompts = PROMPTS[case.videos or ""]
    inputs = case.inputs(prompts, "left")
    _, run = together(case, pruner, inputs)
    videos = [i for i in family_of(case.model()).images(case.model(), inputs) if i.frames > 1]
    found = [image for sample in run.report.samples for image in sample.images]
    kept = [list(image.kept) for image in found if len(image.kept) < image.seen]
    assert list(map(len, kept)) == [round(0.5 * video.count) for video in videos]
    assert all(one == sorted(set(one)) for one in kept)
    check_cached_decode(case, pruner, prompts)


@families
@pytest.mark.parametrize("name", TWO_PARTS)
@pytest.mark.at_once(6)
def test_the_second_part(case: Case, name: str) -> None:
    pruner = in_two_parts(name, case)
    if family_of(case.model()).deepstack:
        pruner = replace(pruner, layer=3)
    prompts = PROMPTS[case.videos or ""]
    inputs = case.inputs(prompts, "left")
    _, run = together(case, pruner, inputs)
    videos = [i for i in family_of(case.model()).images(case.model(), inputs) if i.frames > 1]
    found = [image for sample in run.report.samples for image in sample.images]
    left = [len(image.kept) for image in found if len(image.kept) < image.seen]
    assert left == [pruner.left(round(0.5 * video.count)) for video in videos]
    check_cached_decode(case, pruner, prompts)


@families
@methods
@pytest.mark.at_once(8)
def test_keeping_all_changes_nothing(case: Case, pruner: Any) -> None:
    prompts = PROMPTS[case.videos or ""]
    inputs = case.inputs(prompts, "left")
    made, _ = together(case, replace(pruner, keep=1.0), inputs)
    assert torch.equal(made, forward(case, inputs))
    if pruner.name in TWO_PARTS:
        whole = replace(in_two_parts(pruner.name, case), keep=1.0, inner=1.0)
        made, _ = together(case, whole, inputs)
        torch.testing.assert_close(made, forward(case, inputs), rtol=case.close, atol=case.close)


@families
def test_without_merging_it_is_a_choice(case: Case) -> None:
    """Then a forward in which the dropped tokens are masked is the same. What DeepStack adds to a
    token is added to it where it now is."""
    prompts = PROMPTS[case.videos or ""]
    pruners = [pore.FastVID(0.5, context=0.0)]
    if family_of(case.model()).mrope:
        pruners += [pore.HoliTom(0.5, tau=1.1), pore.FlashVID(0.5, alpha=1.0)]
    for pruner in pruners:
        check_masked_dense(case, pruner, prompts, "left")


@methods
@pytest.mark.parametrize("name", ["LLaVA-1.5", "InternVL", "SmolVLM"])
def test_images_as_frames(pruner: Any, name: str) -> None:
    """Where frames come as images, `keep` can be of all of them together."""
    (case,) = (case for case in CASES if case.name == name)
    inputs = case.inputs([[5, -1, 6, -1, 6, -1, 7, 8]])
    sizes = [i.count for i in family_of(case.model()).images(case.model(), inputs)]
    frames = replace(pruner, images_as_frames=True)
    _, run = together(case, frames, inputs)
    assert sum(len(image.kept) for image in run.report.samples[0].images) == sum(sizes) // 2
    if pruner.name in TWO_PARTS:
        _, run = together(case, replace(frames, layer=2, inner=7), inputs)
        assert sum(len(image.kept) for image in run.report.samples[0].images) == 7


# -- what a stage decides --------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(METHODS)),
    st.integers(1, 9),
    st.integers(1, 8),
    st.floats(0.05, 1.0),
    st.integers(0, 999),
)
def test_budgets_are_met(name: str, frames: int, size: int, keep: float, seed: int) -> None:
    video = draw(seed, 1, size, 6) + draw(seed + 1, frames, size, 6) / 2
    attention = draw(seed, frames, size).softmax(-1)
    view = video_view([video], attention=[attention])
    pruner = pore.methods()[name](keep)
    rule = pruner.stages()[0].rule
    count = round(keep * frames * size)
    if count == 0:
        with pytest.raises(BudgetError, match="rounds to none"):
            rule(view)
        return
    made = rule(view)
    assert int(made.keep.sum()) == count == pruner.kept(frames, size)
    if keep == 1.0:
        assert torch.equal(made.features, view.features)


@methods
def test_an_image_beside_a_video(pruner: Any) -> None:
    """It stays whole."""
    video, image = draw(0, 4, 6, 8), draw(1, 1, 9, 8)
    both = [draw(2, 4, 6).softmax(-1), draw(3, 1, 9).softmax(-1)]
    view = video_view([video, image], attention=both, pictures=1)
    made = pruner.stages()[0].rule(view)
    assert made.keep.sum(1).tolist() == [12, 9]
    assert torch.equal(made.features[1, :9], image[0])
    with pytest.raises(InputError, match="there are only images here"):
        pruner.stages()[0].rule(video_view([image], attention=both[1:], pictures=1))


@methods
@pytest.mark.parametrize("faithful", [False, True])
def test_more_than_all_tokens_are_refused(pruner: Any, faithful: bool) -> None:
    view = video_view([draw(0, 4, 6, 8)], attention=[draw(2, 4, 6).softmax(-1)])
    with pytest.raises(BudgetError, match=r"sample 0: keep=25 asks for more .* than there are"):
        replace(pruner, keep=25, faithful=faithful).stages()[0].rule(view)


@methods
@pytest.mark.parametrize("faithful", [False, True])
def test_a_video_of_one_frame(pruner: Any, faithful: bool) -> None:
    """It is a video, and thinned out by attention, alone or beside longer ones."""
    videos, method = [draw(1, 1, 8, 8), draw(0, 4, 6, 8)], replace(pruner, faithful=faithful)
    attention = [draw(3, 1, 8).softmax(-1), draw(2, 4, 6).softmax(-1)]
    rule = method.stages()[0].rule
    both = rule(video_view(videos, attention=attention))
    assert int(both.keep[0].sum()) == 4 if not faithful else 4 <= int(both.keep[0].sum()) < 8
    for i, (video, weights) in enumerate(zip(videos, attention, strict=True)):
        alone, count = rule(video_view([video], attention=[weights])), video[..., 0].numel()
        assert torch.equal(both.keep[i, :count], alone.keep[0])
        assert torch.equal(both.features[i, :count], alone.features[0])


@pytest.mark.parametrize(
    "pruner",
    [
        pore.HoliTom(0.6, tau=0.8, faithful=True),
        pore.FlashVID(5, segments=4, alpha=0.5, faithful=True),
    ],
    ids=TWO_PARTS,
)
def test_the_authors_order_and_repeats(pruner: Any) -> None:
    """Tokens that leave their places, or come twice, lie in the order of their code."""
    video, attention = draw(0, 1, 6, 8) + draw(1, 4, 6, 8) / 2, draw(2, 4, 6).softmax(-1)
    made = pruner.stages()[0].rule(video_view([video], attention=[attention]))
    merged = pruner.merge(Frames(video, attention))
    assert torch.equal(made.features[0][made.keep[0]], merged.tokens)
    assert torch.equal(made.raster[0][made.keep[0]], merged.index)
    index = merged.index.tolist()
    if pruner.name == "HoliTom":
        assert index != sorted(index)
    else:
        assert len(set(index)) < len(index) == 4 * 5


@pytest.mark.parametrize("name", TWO_PARTS)
def test_a_position_bias_in_the_second_part(name: str) -> None:
    """One that says the same of every place changes nothing; a steep one does."""
    (case,) = (case for case in CASES if case.name == "LLaVA-OneVision")
    inputs = case.inputs(PROMPTS["videos"][:1])
    (video,) = family_of(case.model()).images(case.model(), inputs)
    flat = torch.full((video.count,), 0.01, dtype=torch.float64)
    steep = flat * torch.linspace(20, 0, video.count).exp()
    kept = []
    for values in (None, flat, steep):
        bias = None if values is None else pore.PositionBias.fit(values, kind="empirical")
        pruner = replace(in_two_parts(name, case), reweight=bias)
        _, run = together(case, pruner, inputs)
        kept.append(run.report.samples[0].images[0].kept)
    assert kept[0] == kept[1] != kept[2]
    with pytest.raises(BudgetError, match="give it a layer"):
        replace(METHODS[name], reweight=pore.PositionBias.fit(flat, kind="empirical"))


# -- refusals --------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("family", ["Gemma 4", "Gemma 4 with experts"])
def test_families_whose_tower_is_not_read_are_refused(pruner: Any, family: str) -> None:
    (case,) = (case for case in CASES if case.name == family)
    with pytest.raises(UnsupportedModelError, match="reads the vision tower"):
        together(case, pruner, case.inputs(PROMPTS["videos"]))


@pytest.mark.parametrize("name", TWO_PARTS)
def test_what_leaves_its_place_needs_counted_positions(name: str) -> None:
    (case,) = (case for case in CASES if case.name == "Qwen2.5-VL")
    with pytest.raises(UnsupportedModelError, match="position is its place in the video"):
        together(case, replace(METHODS[name], faithful=True), case.inputs(PROMPTS["videos"]))


@methods
def test_authors_numbers_are_not_known_in_advance(pruner: Any) -> None:
    with pytest.raises(BudgetError, match="depends on the video"):
        replace(pruner, faithful=True).kept(8, 9)


def test_settings_that_make_no_sense() -> None:
    for wrong in (
        lambda: pore.FastVID(0.1, spacing=0),
        lambda: pore.FastVID(0.1, context=1.5),
        lambda: pore.FastVID(0.1, variant="qwen"),
        lambda: pore.HoliTom(0.1, neighbours=0),
        lambda: pore.HoliTom(0.1, inner=0),
        lambda: pore.FlashVID(0.1, alpha=-0.1),
    ):
        with pytest.raises(BudgetError):
            wrong()
    with pytest.raises(pore.errors.PoreError, match="selecting"):
        pore.FlashVID(0.1, selecting="random")
