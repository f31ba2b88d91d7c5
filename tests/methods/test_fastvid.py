"""FastVID: how the budget is shared out, and what merges where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pore
from cases.llava_next import LlavaOnevision
from helpers.families import PROMPTS
from helpers.golden_files import draw
from helpers.recording import Recording
from pore.errors import BudgetError
from pore.methods._merging_videos import Frames
from pore.methods.fastvid import Plan, dense_merging, exact_plan, onevision_plan, segment_plan


def parts_of(lengths: list[int]) -> list[range]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.integers(1, 12),
    st.floats(0, 1),
    st.integers(1, 5),
    st.data(),
)
def test_exact_plans(
    lengths: list[int], size: int, share: float, spacing: int, data: st.DataObject
) -> None:
    parts = parts_of(lengths)
    count = data.draw(st.integers(1, sum(lengths) * size))
    plan = exact_plan(count, size, parts, share, spacing)
    assert sum(plan.salient) + sum(plan.context) == count
    for part in parts:
        for frame in part:
            both = plan.salient[frame] + plan.context[frame]
            assert min(plan.salient[frame], plan.context[frame]) >= 0
            assert both <= size
            assert plan.context[frame] == 0 or (part[-1] - frame) % spacing == 0
        context = sum(plan.context[part.start : part.stop])
        assert context <= share * (context + sum(plan.salient[part.start : part.stop])) + 1e-9


def test_plans_of_the_authors() -> None:
    """Numbers by hand, for segments of five frames and of one; three tokens of ten are context."""
    parts = parts_of([5, 1])
    plan = onevision_plan(10, parts, 0.3, 2)
    assert plan.salient == [7] * 6
    assert plan.context == [5, 0, 5, 0, 5, 3]
    assert [len(pool) for pool in plan.pools] == [5, 5, 5, 5, 5, 1]
    plan = segment_plan(10, 20, parts, 0.32, 2)
    assert plan.salient == [7, 7, 7, 7, 6, 7]
    assert plan.context == [5, 0, 5, 0, 6, 3]
    # Frames 0 to 2 are one run, 3 and 4 another: half of a frame at most is context.
    plan = segment_plan(10, 20, parts, 0.5, 1, ends={2})
    assert plan.context == [0, 0, 10, 0, 10, 5]
    assert plan.salient == [0, 0, 10, 0, 10, 5]


@settings(max_examples=20)
@given(st.integers(0, 99), st.booleans(), st.floats(0, 1))
def test_merging(seed: int, itself: bool, beta: float) -> None:
    """Token by token, two anchors in one segment."""
    tokens, attention = draw(seed, 3, 6, 4).double(), draw(seed + 1, 3, 6).softmax(-1)
    plan = Plan([2, 1, 2], [0, 2, 1], [range(3)] * 3, itself)
    made = dense_merging(Frames(tokens, attention), plan, beta)
    index = made.index.tolist()
    salient = {(t, int(p)) for t in range(3) for p in attention[t].topk(plan.salient[t]).indices}
    kept = {(i // 6, i % 6): made.tokens[n] for n, i in enumerate(index)}
    assert index == sorted(set(index))
    assert salient <= kept.keys()
    for place in salient:
        assert torch.equal(kept[place], tokens[place])
    for anchor in (1, 2):
        targets = sorted(p for p in kept if p[0] == anchor and p not in salient)
        assert len(targets) == plan.context[anchor]
        pool = [(t, p) for t in range(3) for p in range(6) if (t, p) not in salient]
        pool = pool if itself else [place for place in pool if place not in targets]
        members: dict[Any, list[Any]] = {target: [] for target in targets}
        for place in pool:
            likeness = [torch.cosine_similarity(tokens[place], tokens[t], dim=0) for t in targets]
            members[targets[int(torch.stack(likeness).argmax())]].append(tokens[place])
        for target, some in members.items():
            weight = max(1 / (len(some) + 1), beta) if some else 1.0
            mean = torch.stack(some).mean(0) if some else 0.0
            expected = weight * tokens[target] + (1 - weight) * mean
            torch.testing.assert_close(kept[target], expected)


def test_context_is_dense_and_far_from_denser_ones() -> None:
    """Of two clumps of unattended tokens, one centre each."""
    clump = torch.tensor([[0.0], [0.1], [-0.1], [0.05], [9.0], [9.1], [8.9], [9.05]])
    tokens = torch.cat([clump, torch.ones(8, 1)], 1)[None]
    made = pore.FastVID(2, context=1.0).merge(Frames(tokens, torch.ones(1, 8)))
    assert [i // 4 for i in made.index.tolist()] == [0, 1]


def test_an_anchor_without_room() -> None:
    """Their code fails where an anchor frame gets more than it has."""
    with pytest.raises(BudgetError, match="of a frame of 8"):
        pore.FastVID(0.9, faithful=True, segments=1, tau=-1.0).merge(
            Frames(draw(0, 8, 8, 4), draw(1, 8, 8).softmax(-1))
        )
    with pytest.raises(BudgetError, match="keep more"):
        pore.FastVID(0.1, faithful=True).merge(Frames(draw(0, 8, 8, 4), draw(1, 8, 8)))


class WithHead(LlavaOnevision):
    """LLaVA-OneVision whose tower was loaded with its pooling head."""

    name = "LLaVA-OneVision with a head"

    def build(self) -> Any:
        made = super().build()
        made.config.vision_config.vision_use_head = True
        tower = type(made.model.vision_tower)._from_config(made.config.vision_config)
        made.model.vision_tower = tower
        return made.double()


def test_the_pooling_head_of_a_tower() -> None:
    """Its output is that of the model's own head for every frame, its attention is pooled."""
    case = WithHead()
    model, inputs = case.model(), case.inputs(PROMPTS["videos"][:1])
    recording = Recording(pore.FastVID(0.5))
    with torch.no_grad(), recording(model):
        model(**inputs)
    (encoded,) = recording.seen[0].view.tower
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values_videos"].flatten(0, 1))
    assert tower.pooler_output is not None
    torch.testing.assert_close(encoded.pooled, tower.pooler_output)
    weights = encoded.attention["pooled"]
    assert weights.shape[:2] == (2, 1)
    patches = model.config.vision_config
    tokens = weights.shape[2] / (patches.image_size // patches.patch_size) ** 2
    # Two by two patches make a token, whose weight is their mean.
    torch.testing.assert_close(weights.sum(-1), torch.full_like(weights[..., 0], tokens))
