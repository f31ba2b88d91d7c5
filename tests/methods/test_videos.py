"""Methods that choose among the frames of a video: their rules, budgets, families and refusals."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pore
from cases import CASES, COUSINS
from cases.base import Case
from helpers.families import (
    PROMPTS,
    check_cached_decode,
    check_masked_dense,
    forward,
    together,
)
from helpers.golden_files import draw
from helpers.videos import video_view
from pore.engine.pruner import Pruner
from pore.errors import BudgetError, InputError
from pore.families.registry import family_of
from pore.methods._videos import VideoPruner, videos
from pore.methods.vidcom2 import Counts

WITH_VIDEOS = [
    case
    for case in [*CASES, *(cousin for cousin in COUSINS if cousin.name == "LLaVA-NeXT-Video")]
    if case.videos is not None
]
METHODS = {
    "EVS": pore.EVS(0.75),
    "VidCom2": pore.VidCom2(0.4),
    "DyCoke": pore.DyCoke(0.75),
    "UniformFrames": pore.UniformFrames(0.6),
}
families = pytest.mark.parametrize("case", WITH_VIDEOS, ids=lambda case: case.name)
methods = pytest.mark.parametrize("pruner", METHODS.values(), ids=METHODS)


def kept(pruner: Pruner, *given: Tensor, pictures: int = 0) -> list[Tensor]:
    """(T, N) bool for every video, what stays of it; the last ones may be images."""
    view = video_view(given, pictures=pictures)
    (stage,) = pruner.stages()
    mask = stage.rule(view).keep  # type: ignore[arg-type]
    return [video.of(mask) for video in videos(view.layout)]


@settings(max_examples=40)
@given(
    st.sampled_from([pore.EVS, pore.VidCom2, pore.DyCoke, pore.UniformFrames]),
    st.integers(1, 9),
    st.integers(1, 8),
    st.floats(0.05, 1.0),
    st.integers(0, 999),
)
def test_budgets_are_met_or_refused(
    kind: Any, frames: int, size: int, keep: float, seed: int
) -> None:
    video = draw(seed, frames, size, 6)
    whole = {"EVS": size, "DyCoke": size * -(-frames // 4)}.get(kind.name, 1)
    if frames == 1 and kind.name in ("EVS", "DyCoke"):  # it stays whole
        keep = 1.0
    if round(keep * frames * size) < whole:
        with pytest.raises(BudgetError):
            kept(kind(keep), video)
        return
    (mask,) = kept(kind(keep), video)
    assert int(mask.sum()) == round(keep * frames * size) == kind(keep).kept(frames, size)


@settings(max_examples=40)
@given(st.integers(2, 7), st.integers(1, 6), st.data())
def test_evs_keeps_the_first_frame_and_what_changes_most(
    frames: int, size: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(size, frames * size))
    video = draw(data.draw(st.integers(0, 999)), frames, size, 5).double()
    (mask,) = kept(pore.EVS(count), video)
    assert mask[0].all()
    likeness = {
        (t, p): float(torch.cosine_similarity(video[t, p], video[t - 1, p], dim=0))
        for t in range(1, frames)
        for p in range(size)
    }
    least = sorted(likeness, key=lambda at: likeness[at])[: count - size]
    assert {(t + 1, p) for t, p in mask[1:].nonzero().tolist()} == set(least)


def test_a_still_video_keeps_the_first_tokens_that_repeat() -> None:
    """Of equal scores the earlier token wins, as in vLLM."""
    still = torch.eye(4, 6).repeat(3, 1, 1)
    (mask,) = kept(pore.EVS(6), still)
    assert mask.flatten().nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_dycoke_shares_evenly_what_the_whole_frames_leave() -> None:
    (mask,) = kept(pore.DyCoke(19), draw(0, 6, 5, 6))
    assert mask.sum(1).tolist() == [5, 3, 2, 2, 5, 2]
    (authors,) = kept(pore.DyCoke(2, faithful=True), draw(0, 7, 5, 6))
    assert authors.sum(1).tolist() == [5, 2, 2, 2, 5, 2, 0]
    for frames in range(5, 20):  # only of a multiple of four does the last third frame stay whole
        (mask,) = kept(pore.DyCoke(2, faithful=True), draw(0, frames, 5, 6))
        whole = {*range(0, frames - frames % 2, 4), *([frames - 2] if frames % 4 == 0 else [])}
        assert {i for i, count in enumerate(mask.sum(1).tolist()) if count == 5} == whole


def test_dycoke_compares_with_the_frame_it_says() -> None:
    """A frame that repeats the one it is compared with, but for one token, keeps that token."""
    video = draw(0, 4, 5, 6)
    for frame, other in ((1, 0), (2, 0), (3, 2)):
        changed = video.clone()
        changed[frame] = changed[other]
        changed[frame, 3] = -changed[other, 3]
        (mask,) = kept(pore.DyCoke(8), changed)
        assert mask[frame].nonzero()[:, 0].tolist() == [3]


def test_uniform_frames_are_whole_and_at_equal_distances() -> None:
    video = draw(0, 9, 4, 6)
    (mask,) = kept(pore.UniformFrames(12), video)
    assert mask.sum(1).tolist() == [4, 0, 0, 0, 4, 0, 0, 0, 4]
    (rest,) = kept(pore.UniformFrames(11), video)
    assert rest.sum(1).tolist() == [4, 0, 0, 0, 3, 0, 0, 0, 4]
    (few,) = kept(pore.UniformFrames(2), video)
    assert few.nonzero().tolist() == [[4, 0], [4, 3]]


def test_vidcom2_keeps_what_is_unlike_the_rest() -> None:
    video = torch.ones(4, 6, 8) + draw(0, 4, 6, 8) / 100
    video[..., 4:] *= torch.linspace(1, 9, 24).view(4, 6, 1)  # channels that do not count
    video[2, 4, :4] = torch.tensor([1.2, 0.8, 1.2, 0.8])
    (mask,) = kept(pore.VidCom2(4), video)
    assert mask[2, 4]


@pytest.mark.parametrize("counted", ["exact", "vllm", "repository"])
@pytest.mark.parametrize("keep", [0.1, 0.33, 0.8, 13])
def test_counts_of_vidcom2(counted: Any, keep: float) -> None:
    (mask,) = kept(pore.VidCom2(keep, counted=counted), draw(3, 5, 6, 8))
    share = keep / 30 if keep > 1 else keep
    if counted == "repository":
        with pytest.raises(BudgetError, match="known in advance"):
            pore.VidCom2(keep, counted=counted).kept(5, 6)
    else:
        assert int(mask.sum()) == pore.VidCom2(keep, counted=counted).kept(5, 6)
    if counted == "exact":
        assert int(mask.sum()) == round(share * 30)
    elif counted == "vllm":
        assert int(mask.sum()) == max(5, int(share * 30))
    else:
        assert (mask.sum(1) >= 1).all()


def test_counts_of_vllm_are_those_of_its_pruning_rate() -> None:
    """For every rate in hundredths, as 1 - rate and written out; whole numbers are themselves."""
    for frames, size, percent in itertools.product(range(1, 9), range(1, 13), range(100)):
        total, rate = frames * size, percent / 100
        for keep in (1 - rate, (100 - percent) / 100):
            left = int(total * (1 - rate))
            assert pore.VidCom2(keep, counted="vllm").kept(frames, size) == max(frames, left)
            assert pore.EVS(keep, faithful=True).kept(frames, size) == max(size, left)
    for frames, size in itertools.product(range(1, 9), range(1, 13)):
        for keep in range(1, frames * size + 1):
            assert pore.VidCom2(keep, counted="vllm").kept(frames, size) == max(frames, keep)
            assert pore.EVS(keep, faithful=True).kept(frames, size) == max(size, keep)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_what_vllm_would_keep_is_kept(frames: int, size: int, data: st.DataObject) -> None:
    total = frames * size
    keep = data.draw(st.integers(1, total) | st.integers(1, 100).map(lambda i: i / 100))
    video = draw(data.draw(st.integers(0, 99)), frames, size, 4)
    for method in (pore.VidCom2(keep, counted="vllm"), pore.EVS(keep, faithful=True)):
        assert int(method.choose(video).sum()) == method.kept(frames, size)


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(1, 9))
def test_more_than_all_tokens_are_refused(frames: int, size: int) -> None:
    total = frames * size
    every: list[VideoPruner] = [
        pore.VidCom2(total + 1, counted=counted) for counted in get_args(Counts)
    ]
    every += [kind(total + 1) for kind in (pore.EVS, pore.DyCoke, pore.UniformFrames)]
    for method in (*every, pore.EVS(total + 1, faithful=True)):
        with pytest.raises(BudgetError, match=f"than there are .{total}."):
            method.choose(draw(0, frames, size, 4))


@families
@methods
def test_every_family_that_takes_videos(case: Case, pruner: Any) -> None:
    """A cached decode equals a full forward of the same selection; where tokens keep their
    positions, also a forward in which the dropped tokens are masked."""
    assert case.videos is not None
    check_cached_decode(case, pruner, PROMPTS[case.videos])
    if family_of(case.model()).mrope:
        check_masked_dense(case, pruner, PROMPTS[case.videos], "left")


@families
@methods
def test_keeping_all_changes_nothing(case: Case, pruner: Any) -> None:
    assert case.videos is not None
    inputs = case.inputs(PROMPTS[case.videos], "left")
    made, _ = together(case, type(pruner)(1.0), inputs)
    assert torch.equal(made, forward(case, inputs))


@families
def test_frames_are_known(case: Case) -> None:
    assert case.videos is not None
    _, run = together(case, pore.EVS(1.0), case.inputs(PROMPTS[case.videos], "left"))
    inputs = case.inputs(PROMPTS[case.videos], "left")
    images = family_of(case.model()).images(case.model(), inputs)
    found = [image.frames for image in images if image.tiling is not None]
    assert max(found) > 1
    assert all(image.count % image.frames == 0 for image in images)
    assert len(run.report.samples) == 2


@methods
@pytest.mark.parametrize("name", ["LLaVA-1.5", "InternVL", "SmolVLM"])
def test_images_as_frames(pruner: VideoPruner, name: str) -> None:
    """Where frames come as images, `keep` can be of all of them together."""
    (case,) = (case for case in CASES if case.name == name)
    prompt = [5, -1, 6, -1, 6, -1, 6, -1, 7, 8]
    inputs = case.inputs([prompt])
    sizes = [i.count for i in family_of(case.model()).images(case.model(), inputs)]
    kind = type(pruner)
    _, run = together(case, kind(0.6, images_as_frames=True), inputs)
    left = [len(image.kept) for image in run.report.samples[0].images]
    assert sum(left) == round(0.6 * sum(sizes))
    assert kind is pore.VidCom2 or left[0] == sizes[0]


@methods
def test_an_image_beside_a_video(pruner: VideoPruner) -> None:
    """Methods that compare frames leave it whole, whatever number of tokens is asked for."""
    video, image = draw(0, 4, 6, 8), draw(1, 1, 9, 8)
    masks = kept(type(pruner)(0.5), video, image, pictures=1)
    assert [int(mask.sum()) for mask in masks] == [12, 9 if pruner.videos_only else 4]
    if pruner.videos_only:
        assert int(kept(type(pruner)(20), video, image, pictures=1)[0].sum()) == 20
        with pytest.raises(InputError, match="there are only images here"):
            kept(pruner, image, pictures=1)


@methods
@pytest.mark.parametrize("keep", [0.5, 4, 1.0])
def test_a_video_of_one_frame(pruner: VideoPruner, keep: float) -> None:
    """It is a video, alone or beside longer ones: whole where its first frame stays so."""
    method, frame, longer = type(pruner)(keep), draw(1, 1, 9, 8), draw(0, 4, 3, 8)
    (alone,) = kept(method, frame)
    whole = pruner.name in ("EVS", "DyCoke") or keep == 1.0
    assert int(alone.sum()) == method.kept(1, 9) == (9 if whole else 4)
    beside = kept(method, frame, longer)
    assert torch.equal(beside[0], alone)
    assert torch.equal(beside[1], kept(method, longer)[0])


@pytest.mark.parametrize(
    "case",
    [case for case in WITH_VIDEOS if getattr(case, "video_grids", ())],
    ids=lambda case: case.name,
)
@methods
def test_a_video_of_one_grid_beside_a_longer_one(
    case: Any, pruner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two frames are in Qwen-VL: a batch is its samples one by one."""
    (_, *sides), longer = case.video_grids
    monkeypatch.setattr(case, "video_grids", ((1, *sides), longer))
    prompts = PROMPTS["videos"]
    _, run = together(case, pruner, case.inputs(prompts, "left"))
    for prompt, sample in zip(prompts, run.report.samples, strict=True):
        _, alone = together(case, pruner, case.inputs([prompt]))
        assert alone.report.samples[0].images[0].kept == sample.images[0].kept
    check_cached_decode(case, pruner, prompts)


def test_frames_of_several_sizes_are_refused() -> None:
    (case,) = (case for case in CASES if case.name == "Qwen2.5-VL")
    with pytest.raises(InputError, match="all must have as many"):
        together(case, pore.EVS(0.9, images_as_frames=True), case.inputs([[5, -1, 6, -2, 7, 8]]))


def test_hidden_tokens_of_a_video_are_refused() -> None:
    (case,) = (case for case in CASES if case.name == "LLaVA-OneVision")
    inputs = case.inputs([[5, -100, 7, 8]])
    first = int((inputs["input_ids"][0] == case.video_placeholder).nonzero()[0])
    inputs["attention_mask"][0, first] = 0
    with pytest.raises(InputError, match="frames can be compared only where no token"):
        together(case, pore.EVS(0.9), inputs)


@pytest.mark.parametrize("kind", [pore.EVS, pore.DyCoke])
def test_a_budget_below_the_whole_frames_is_refused(kind: Any) -> None:
    with pytest.raises(BudgetError, match="ask for at least 6"):
        kept(kind(5), draw(0, 4, 6, 8))


def test_faithful_dycoke_needs_five_frames() -> None:
    with pytest.raises(InputError, match="at least five frames"):
        kept(pore.DyCoke(2, faithful=True), draw(0, 4, 6, 8))
