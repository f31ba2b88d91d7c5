"""ToMe: exact budgets over the blocks, a tower that is really shorter, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pore
from cases.llava_next import LlavaNext
from helpers.flops import sdpa_on_cpu
from helpers.golden_files import Made, draw
from helpers.models import N, batch, prompt, tiny_llava
from methods import golden_tome
from pore.errors import BudgetError, UnsupportedModelError
from pore.methods.tome import even_schedule, parse_r


@given(st.integers(1, 600), st.integers(1, 40), st.data())
def test_schedule_meets_the_budget(patches: int, blocks: int, data: st.DataObject) -> None:
    least = patches
    for _ in range(blocks):
        least -= least // 2
    keep = data.draw(st.integers(least, patches))
    schedule = even_schedule(patches, keep, blocks)
    assert len(schedule) == blocks
    assert sum(schedule) == patches - keep
    assert list(schedule) == sorted(schedule, reverse=True)
    left = patches
    capped = []
    for count in schedule:
        capped.append(count == left // 2)
        left -= count
    free = [count for count, cap in zip(schedule, capped, strict=True) if not cap]
    assert not free or max(schedule[: len(free)]) - min(free) <= 1
    with pytest.raises(BudgetError, match=f"leave {least} to {patches}"):
        even_schedule(patches, least - 1, blocks)


@pytest.mark.parametrize(
    ("keep", "schedule"),
    [
        (192, [17] * 16 + [16] * 7),
        (128, [20] * 11 + [19] * 12),
        (64, [23] * 6 + [22] * 17),
    ],
)
def test_schedule_of_the_usual_budgets(keep: int, schedule: list[int]) -> None:
    """CLIP ViT-L has 24 blocks, of which LLaVA reads the last but one."""
    assert list(even_schedule(576, keep, 23)) == schedule


@given(st.integers(2, 40), st.integers(0, 40), st.floats(-1.0, 1.0))
def test_inflection(layers: int, r: int, inflection: float) -> None:
    schedule = parse_r(layers, (r, inflection))
    assert len(schedule) == layers
    assert sum(schedule) <= r * layers
    assert schedule == sorted(schedule, reverse=inflection < 0)
    if inflection == 0:
        assert schedule == [r] * layers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"keep": 5, "r": 3},
        {"keep": 0},
        {"r": (1, 2, 3)},
        {"r": 2.5},
    ],
)
def test_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        pore.ToMe(**settings)


def test_too_few_blocks() -> None:
    """LLaVA of two blocks reads the first alone, which can merge 8 of 16."""
    with (
        pytest.raises(BudgetError, match="1 blocks leave 8 to 16 of 16"),
        pore.ToMe(keep=7)(tiny_llava()),
    ):
        pass
    with pytest.raises(BudgetError, match="depends on the tower"):
        pore.ToMe(r=3).counts(N, 2)


@pytest.mark.parametrize(
    ("r", "kept"), [(3, 7), ((2, -1.0), 9), ((2, 1.0), 13), ([5], 11), ([1, 0, 2, 9], 13), (99, 2)]
)
def test_r(r: Any, kept: int) -> None:
    """Four blocks of 16 patches, of which the projector reads the third."""
    model = tiny_llava(tower_layers=4)
    with torch.no_grad(), pore.ToMe(r=r)(model) as run:
        model(**batch([prompt(3, 1, 5)]))
    (image,) = run.report.samples[0].images
    assert len(image.kept) == len(set(image.kept)) == kept
    assert image.extra == 0


@pytest.mark.parametrize(
    "pruner", [pore.ToMe(keep=5), pore.ToMe(r=2), pore.ToMe(r=3, proportional=False)], ids=repr
)
def test_flops_of_the_tower_are_those_of_a_shorter_one(pruner: pore.ToMe) -> None:
    """PyTorch counts what the tower's own modules do; the report says the same."""
    model = tiny_llava(tower_layers=4, dtype=torch.float32)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    inputs = batch([prompt(3, 2, 5)], dtype=torch.float32)

    def tower() -> int:
        counter = FlopCounterMode(display=False, custom_mapping={kernel: sdpa_on_cpu})
        with torch.no_grad(), counter:
            model(**inputs)
        counts = {name: sum(ops.values()) for name, ops in counter.flop_counts.items()}
        return sum(
            count
            for name, count in counts.items()
            if "vision_tower" in name and name.endswith((".self_attn", ".mlp", ".patch_embedding"))
        )

    with pruner(model) as run:
        counted = tower()
    sample = run.report.samples[0]
    assert counted == sample.cost.tower
    assert tower() == sample.unpruned_cost.tower > sample.cost.tower


def test_sizes_weigh() -> None:
    """Without weights, and without counting by size, the answers are others."""
    model, inputs = tiny_llava(tower_layers=4), batch([prompt(3, 1, 5)])
    found = []
    for settings in ({}, {"weighted": False}, {"proportional": False}):
        with torch.no_grad(), pore.ToMe(keep=5, **settings)(model):
            found.append(model(**inputs).logits)
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_tiles_take_r_only() -> None:
    """All tiles lose as many patches; what then stands for padding never gets to the decoder."""
    case = LlavaNext()
    model, inputs = case.model(), case.inputs([[5, -1, 7, 8], [5, 6, -2, 7, 8, 9]])
    with (
        pytest.raises(UnsupportedModelError, match="cannot meet a budget"),
        pore.ToMe(keep=9)(model),
    ):
        pass
    with torch.no_grad(), pore.ToMe(r=2)(model) as run:
        model(**inputs)
    for sample in run.report:
        (image,) = sample.images
        tiles = len(inputs["pixel_values"][0])
        assert 0 < len(image.kept) <= tiles * (16 - 3 * 2)  # three blocks, 4 x 4 patches
        assert len(set(image.kept)) == len(image.kept) < image.seen


# -- the checker of golden files, on files made here -----------------------------------------------


def tome_round(
    metric: Tensor, count: int, cls: bool, distill: bool
) -> tuple[list[int], list[int], list[int]]:
    """Of one image: places in A that stay, those that are merged, and where in B they go."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    a, b = unit[0::2], unit[1::2]
    best: dict[int, tuple[float, int]] = {}
    for i in range(len(a)):
        scores = [float(a[i] @ b[j]) for j in range(len(b))]
        if distill:
            scores[0] = -np.inf
        if cls and i == 0:
            scores = [-np.inf] * len(b)
        best[i] = max(scores), int(np.argmax(scores))
    order = sorted(best, key=lambda i: -best[i][0])
    merged, stay = order[:count], order[count:]
    return sorted(stay) if cls else stay, merged, [best[i][1] for i in merged]


def tome_file(n: int, rounds: list[int], cls: bool, distill: bool, seed: int, bare: bool) -> Made:
    """Rounds as the authors' code has them.

    Args:
        n: Tokens.
        rounds: How many every round is to merge.
        cls: Whether token 0 is CLS.
        distill: Whether the token after it is a distillation token.
        seed: Of the draws.
        bare: Whether a round that merges nothing comes without indices, as their code makes none.
    """
    images, x = 2, draw(seed, 2, n, 5)
    tensors = {"x": x.clone()}
    size, source = torch.ones(images, n, 1), torch.eye(n).expand(images, -1, -1)
    for i, asked in enumerate(rounds):
        length = x.shape[1]
        count = min(asked, (length - cls - distill) // 2)
        metric = draw(seed + 100 + i, images, length, 4)
        made: dict[str, list[Any]] = {"x": [], "size": [], "source": [], "unmerged": []}
        index: dict[str, list[list[int]]] = {"unm_idx": [], "src_idx": [], "dst_idx": []}
        for b in range(images):
            if count <= 0:
                groups, unmerge = [[t] for t in range(length)], list(range(length))
            else:
                stay, merged, target = tome_round(metric[b], count, cls, distill)
                for name, found in zip(index, (stay, merged, target), strict=True):
                    index[name].append(found)
                left = [[2 * t] for t in stay]
                odd = [[2 * j + 1] for j in range(length // 2)]
                for t, j in zip(merged, target, strict=True):
                    odd[j].append(2 * t)
                groups = left + odd
                if distill:
                    groups = [left[0], odd[0], *left[1:], *odd[1:]]
                # Their way back splits what is left as if all of A came first.
                unmerge = [0] * length
                for place, t in enumerate(stay):
                    unmerge[2 * t] = place
                for j in range(length // 2):
                    unmerge[2 * j + 1] = len(stay) + j
                for t, j in zip(merged, target, strict=True):
                    unmerge[2 * t] = len(stay) + j
            sums = torch.stack([(x[b] * size[b])[group].sum(0) for group in groups])
            sizes = torch.stack([size[b, group].sum(0) for group in groups])
            made["x"].append(sums / sizes)
            made["size"].append(sizes)
            made["source"].append(torch.stack([source[b, g].amax(0) for g in groups]))
            made["unmerged"].append((sums / sizes)[unmerge])
        x, size, source = (torch.stack(made[name]) for name in ("x", "size", "source"))
        tensors |= {
            f"metric_{i}": metric,
            f"effective_r_{i}": torch.tensor(count),
            f"x_{i}": x,
            f"size_{i}": size[..., 0],
            f"source_{i}": source,
            f"unmerged_{i}": torch.stack(made["unmerged"]),
        }
        if count > 0:
            tensors |= {f"{name}_{i}": torch.tensor(found) for name, found in index.items()}
        elif not bare:
            none = torch.zeros(images, 0, dtype=torch.long)
            tensors |= {f"{name}_{i}": none for name in index}
    params = {"r": rounds, "class_token": cls, "distill_token": distill, "B": images, "N": n}
    return Made(params, tensors)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("rounds", [[5, 7], [0, 4], [4, 0, 3], [99, 99, 1], [0]])
@pytest.mark.parametrize(("cls", "distill"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("n", [38, 37])
def test_tome(n: int, cls: bool, distill: bool, rounds: list[int], bare: bool) -> None:
    golden_tome.check(tome_file(n, rounds, cls, distill, seed=n, bare=bare))


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize(("cls", "distill"), [(False, False), (True, False), (True, True)])
def test_tome_of_a_few_tokens(n: int, cls: bool, distill: bool) -> None:
    golden_tome.check(tome_file(n, [1, 1, 1], cls, distill, seed=n, bare=True))


def test_tome_with_a_token_in_another_place_is_noticed() -> None:
    """The checker of what `unmerge` gives still tells right from wrong."""
    made = tome_file(38, [5], True, True, seed=3, bare=True)
    made.tensors["unmerged_0"] = made.tensors["unmerged_0"].roll(1, 1)
    with pytest.raises(AssertionError):
        golden_tome.check(made)
