"""FrameFusion: what is merged, when it prunes, what it costs, in every family that takes videos."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
from helpers.flops import sdpa_on_cpu
from helpers.golden_files import draw
from helpers.methods import ends
from helpers.videos import video_view
from pore.calibration.reading import attention_stages
from pore.engine.stages import Stage
from pore.errors import (
    BudgetError,
    CalibrationError,
    InputError,
    PoreError,
    ProfileMismatchError,
)
from pore.families.registry import family_of
from pore.methods.framefusion import by_place, fused, required

METHOD_NAME = "FrameFusion"  # for the table of what is tested


def takes(case: Case) -> bool:
    """Whether a family takes the method with its usual settings."""
    try:
        with pore.FrameFusion(0.5)(case.model()):
            return True
    except PoreError:
        return False


WITH_VIDEOS = [
    case
    for case in [*CASES, *(cousin for cousin in COUSINS if cousin.name == "LLaVA-NeXT-Video")]
    if case.videos is not None
]
TAKING = [case for case in WITH_VIDEOS if takes(case)]
families = pytest.mark.parametrize("case", TAKING, ids=lambda case: case.name)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def runs(states: Tensor, place: Tensor, close: Any) -> tuple[list[bool], list[Tensor]]:
    """Which tokens go, and what the others become, token by token along the frames."""
    goes, groups = [False] * len(place), {i: [i] for i in range(len(place))}
    for where in place.unique().tolist():
        head = None
        for i in (place == where).nonzero()[:, 0].tolist():
            if head is not None and close(i):
                goes[i] = True
                groups[head].append(i)
            else:
                head = i
    return goes, [states[groups[i]].mean(0) for i in range(len(place))]


@settings(max_examples=60)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 5), st.data())
def test_runs_become_their_mean(seed: int, frames: int, size: int, data: st.DataObject) -> None:
    """Of any tokens that are left of a video, in the order of the prompt."""
    n = frames * size
    left = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    place = (torch.arange(n) % size)[left]
    states = draw(seed, n, 4).double()[left]
    order, likeness = by_place(states, place)
    mark = torch.rand(n, generator=torch.Generator().manual_seed(seed))[left] < 0.6
    goes, expected = runs(states, place, lambda i: bool(mark[i]))
    close = mark[order] & (likeness > -2)
    merged, means = fused(states, order, close)
    assert merged.tolist() == goes
    for i, (gone, mean) in enumerate(zip(goes, expected, strict=True)):
        if not gone:
            torch.testing.assert_close(means[i], mean)


@given(st.integers(0, 999), st.integers(2, 5), st.integers(1, 4))
def test_likeness_is_to_the_token_before_at_the_same_place(
    seed: int, frames: int, size: int
) -> None:
    states = draw(seed, frames, size, 3).double()
    order, likeness = by_place(states.flatten(0, 1), torch.arange(frames * size) % size)
    for token, like in zip(order.tolist(), likeness.tolist(), strict=True):
        frame, place = divmod(token, size)
        if frame == 0:
            assert like == -2
        else:
            pair = states[frame, place], states[frame - 1, place]
            assert like == pytest.approx(float(torch.cosine_similarity(*pair, dim=0)))


@pytest.mark.parametrize(
    ("shares", "cost", "expected"),
    [
        ([], 0.3, 0.7),
        ([0.5], 0.3, 1 - (28 * 0.3 - 0.5) / (27 * 0.5)),
        ([0.9], 0.3, 0.0),  # more is left to spend than there is
        ([0.0] * 9, 0.3, None),
    ],
)
def test_what_must_go(shares: list[float], cost: float, expected: float | None) -> None:
    assert required(shares, cost, 28) == (expected if expected is None else pytest.approx(expected))


class TestBudget:
    """On a model of 6 layers, with videos of random frames that hardly repeat, or of one frame."""

    prompts: Any = PROMPTS["videos"]

    @families
    @pytest.mark.parametrize("similarity", [0.0, 0.6, 1.0])
    @pytest.mark.parametrize("keep", [0.1, 0.4, 7])
    @pytest.mark.at_once(8)
    def test_what_is_left_at_the_end(self, case: Case, keep: Any, similarity: float) -> None:
        inputs = case.inputs(self.prompts, "left")
        _, run = together(case, pore.FrameFusion(keep, similarity=similarity), inputs)
        for sample in run.report:
            for image in sample.images:
                share = round(keep * image.seen) if isinstance(keep, float) else keep
                assert len(image.kept) == share
                assert all(set(b[1]) <= set(a[1]) for a, b in pairwise(image.stages))
            left = sum(len(image.kept) for image in sample.images)
            assert (
                sample.tokens[-1]
                == sample.unpruned[0] - sum(image.seen for image in sample.images) + left
            )

    @families
    @pytest.mark.parametrize("similarity", [0.0, 0.6, 1.0])
    @pytest.mark.at_once(6)
    def test_the_mean_over_the_layers(self, case: Case, similarity: float) -> None:
        """Off by less than one token, which is what rounding the last call gives."""
        inputs = case.inputs(self.prompts, "left")
        method = pore.FrameFusion(0.6, similarity=similarity, average=True)
        _, run = together(case, method, inputs)
        for sample in run.report:
            wanted = sum(0.6 * image.seen for image in sample.images)
            assert abs(sample.mean_visual_tokens - wanted) < len(sample.images)

    def test_a_mean_that_is_spent_too_soon_is_refused(self) -> None:
        case = case_named("LLaVA-OneVision")
        method = pore.FrameFusion(0.1, similarity=1.0, average=True)
        with pytest.raises(BudgetError, match="is spent after 1 of them"):
            together(case, method, case.inputs(self.prompts))

    def test_faithful_counts_28_layers(self) -> None:
        case = case_named("LLaVA-OneVision")
        means = []
        for faithful in (False, True):
            method = pore.FrameFusion(0.5, similarity=1.0, average=True, faithful=faithful)
            _, run = together(case, method, case.inputs(self.prompts))
            means.append(run.report.samples[0].tokens)
        images = run.report.samples[0].images
        text = means[1][0] - images[0].seen
        share = required([0.0], 0.5, 28)
        assert share is not None
        assert means[1][-1] - text == round(images[0].seen * (1 - share))
        assert means[0][-1] < means[1][-1]

    def test_numbers_by_layer_are_not_known_in_advance(self) -> None:
        with pytest.raises(BudgetError, match="depends on what the video shows"):
            pore.FrameFusion(0.3).counts(100, 28)


@families
@pytest.mark.parametrize("keep", [0.35, 0.75])
@pytest.mark.at_once(6)
def test_cached_decoding(case: Case, keep: float) -> None:
    check_cached_decode(case, pore.FrameFusion(keep, similarity=0.2), PROMPTS["videos"])


@families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.at_once(6)
def test_where_nothing_is_alike_it_only_prunes(case: Case, side: str) -> None:
    """Then it is a method that drops tokens once, before layer 1, by the attention of layer 0."""
    method = pore.FrameFusion(0.4, similarity=1.0)
    check_masked_dense(case, method, PROMPTS["videos"], side)
    inputs = case.inputs(PROMPTS["videos"], side)
    logits, run = together(case, method, inputs)
    expected, other = together(case, pore.FastV(0.4, layer=1), inputs)
    last = [sample.images[0].kept for sample in other.report]
    assert [sample.images[0].kept for sample in run.report] == last
    torch.testing.assert_close(logits, expected, rtol=case.close, atol=case.close)


@families
@pytest.mark.parametrize("similarity", [0.2, 1.0])
@pytest.mark.at_once(3)
def test_flops_are_those_that_run(case: Case, similarity: float) -> None:
    """By PyTorch's own counter: MLPs run on all that entered their layer."""
    if not case.counted:
        pytest.skip("pore does not know the sizes of this decoder")
    model, inputs = case.model(), case.inputs(PROMPTS["videos"][:1])
    names = {part: f"{type(model).__name__}.{name}" for name, part in model.named_modules()}
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: sdpa_on_cpu})
    with pore.FrameFusion(0.4, similarity=similarity)(model) as run, counter:
        forward(case, inputs, use_cache=False)
    cost = run.report.samples[0].cost
    assert cost is not None
    layers = family_of(model).layers(model)
    measured = [sum(counter.flop_counts[names[layer]].values()) for layer in layers]
    assert sum(measured) == sum(cost.per_layer) + cost.probe
    assert sum(m == c for m, c in zip(measured, cost.per_layer, strict=True)) >= case.layers - 1


@families
def test_keeping_all_changes_nothing(case: Case) -> None:
    inputs = case.inputs(PROMPTS["videos"], "left")
    made, _ = together(case, pore.FrameFusion(1.0), inputs)
    assert torch.equal(made, forward(case, inputs))


@families
@pytest.mark.at_once(3)
def test_a_batch_equals_its_samples(case: Case) -> None:
    """Each video finishes when it has, whatever the others do."""
    prompts, method = PROMPTS["videos"], pore.FrameFusion(0.45, similarity=0.3)
    inputs = case.inputs(prompts, "left")
    logits, run = together(case, method, inputs)
    tokens = [sample.tokens[-1] for sample in run.report]
    for i, got in enumerate(ends(logits, inputs["attention_mask"], tokens)):
        single, alone = together(case, method, case.inputs([prompts[i]]))
        (one,), other = alone.report.samples, run.report.samples[i]
        assert one.tokens == other.tokens
        assert [image.kept for image in one.images] == [image.kept for image in other.images]
        torch.testing.assert_close(got, single[0], rtol=case.close, atol=case.close)


@pytest.mark.parametrize(
    "case", [case for case in WITH_VIDEOS if case not in TAKING], ids=lambda case: case.name
)
def test_other_families_say_why(case: Case) -> None:
    reasons = "adds? features|recurrent|look at keys"
    with pytest.raises(PoreError, match=reasons):
        pore.FrameFusion(0.5)(case.model()).__enter__()


def test_an_image_beside_a_video_stays_whole() -> None:
    case = case_named("LLaVA-OneVision")
    _, run = together(case, pore.FrameFusion(0.3), case.inputs(PROMPTS["mixed"]))
    image, video = sorted(run.report.samples[0].images, key=lambda one: len(one.kept) / one.seen)[
        ::-1
    ]
    assert len(image.kept) == image.seen
    assert len(video.kept) == round(0.3 * video.seen)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "InternVL", "SmolVLM"])
def test_images_as_frames(name: str) -> None:
    """Where frames come as images, they are merged across images, and `keep` is of all."""
    case = case_named(name)
    inputs = case.inputs([[5, -1, 6, -1, 6, -1, 7, 8]])
    sizes = [i.count for i in family_of(case.model()).images(case.model(), inputs)]
    method = pore.FrameFusion(0.3, images_as_frames=True, similarity=-1.0)
    _, run = together(case, method, inputs)
    left = [len(image.kept) for image in run.report.samples[0].images]
    assert sum(left) == round(0.3 * sum(sizes))
    with pytest.raises(InputError, match="only images here"):
        together(case, pore.FrameFusion(0.3), inputs)


def test_a_still_video_becomes_its_first_frame() -> None:
    """All is alike: merging alone does it, at once, and nothing is pruned."""
    still = draw(0, 1, 4, 6).expand(5, 4, 6)
    view = video_view([still])
    method = pore.FrameFusion(4)
    entry, *_ = method.stages_in(6)
    assert entry.prepare is not None
    view = type(view)(**{**view.__dict__, "memory": entry.prepare(view)})
    selection = entry.rule(view)
    assert selection.keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert selection.features is not None
    torch.testing.assert_close(selection.features[0, :4], still[0])
    assert entry.idle is None
    assert all(stage.idle is not None and stage.idle(view.memory) for stage in _)


def test_reweighting_changes_what_is_pruned() -> None:
    """P divides the attention, token by token of the whole video."""
    case = case_named("LLaVA-OneVision")
    inputs = case.inputs([PROMPTS["videos"][0]])
    (image,) = family_of(case.model()).images(case.model(), inputs)
    bias = pore.PositionBias.exponential(0.9, image.count)
    found = []
    for reweight in (None, bias):
        method = pore.FrameFusion(0.3, similarity=1.0, reweight=reweight)
        _, run = together(case, method, inputs)
        found.append(run.report.samples[0].images[0].kept)
    expected, other = together(case, pore.FastV(0.3, layer=1, reweight=bias), inputs)
    assert found[0] != found[1] == other.report.samples[0].images[0].kept
    assert expected.shape[1] < inputs["input_ids"].shape[1]
    elsewhere = pore.FrameFusion(0.3, reweight=pore.PositionBias.exponential(0.9, 7))
    with pytest.raises(ProfileMismatchError):
        together(case, elsewhere, inputs)


def test_it_is_no_host_to_calibrate() -> None:
    """Which layer prunes shows only in the video, so that no layer can be measured before."""
    with pytest.raises(CalibrationError, match="FastV before the layer that it pruned"):
        attention_stages(pore.FrameFusion(0.3))


def test_it_acts_in_every_layer_of_the_model() -> None:
    exact = [stage.layer for stage in pore.FrameFusion(0.3).stages_in(6)]
    assert exact == [0, 1, 2, 3, 4, 5]
    faithful = pore.FrameFusion(0.3, average=True, faithful=True)
    assert [stage.layer for stage in faithful.stages_in(6)] == [0, 1, 2, 3, 4, 5, 6]
    chain = pore.Chain(pore.DivPrune(1.0), pore.FrameFusion(0.3))
    assert [one.layer for one in chain.stages_in(3) if isinstance(one, Stage)] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0}, "at least 1"),
        ({"keep": 0.3, "faithful": True}, "set average=True"),
        ({"keep": 0.3, "similarity": 1.5}, "not a cosine"),
        ({"keep": 0.3, "least": -0.1}, "not a share"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        pore.FrameFusion(**given)
