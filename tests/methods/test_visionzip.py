"""VisionZip: the budget and its split, ragged images, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.golden_files import Made, draw
from helpers.golden_models import tower_view
from helpers.models import N, batch, prompt, tiny_llava
from methods import golden_visionzip
from methods.golden_visionzip import tile_order
from pore.errors import BudgetError
from pore.methods.visionzip import zip_tokens
from pore.tower.stages import TowerView


def view_of(images: int, patches: int, seed: int, cls: bool = True) -> TowerView:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return tower_view(
        draw(images, patches, 6),
        draw(1, images, 2, patches).softmax(-1),
        cls_feature=draw(images, 6) if cls else None,
        keys=(draw(images, 2, patches + cls, 4),),
    )


def part(view: TowerView, i: int) -> TowerView:
    """One image by itself."""
    return tower_view(
        view.features[i : i + 1],
        view.cls_attention[:, i : i + 1],
        cls_feature=None if view.cls_feature is None else view.cls_feature[i : i + 1],
        keys=(view.keys[0][i : i + 1],),
    )


@given(st.integers(1, 3), st.integers(2, 40), st.booleans(), st.integers(0, 999), st.data())
def test_budget(images: int, patches: int, cls: bool, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, patches))
    contextual = data.draw(st.none() | st.integers(0, keep - 1))
    view = view_of(images, patches, seed, cls)
    pruner = pore.VisionZip(keep=keep, contextual=contextual)
    selection = pruner._select(view)
    assert selection.valid is None
    assert selection.raster.shape == selection.features.shape[:2] == (images, keep)
    for i, raster in enumerate(selection.raster.tolist()):
        assert len(set(raster)) == keep  # nothing twice
        alone = pruner._select(part(view, i))
        assert alone.raster[0].tolist() == raster
        torch.testing.assert_close(alone.features[0], selection.features[i])
        if keep == patches:
            assert raster == list(range(patches))
            assert torch.equal(selection.features[i], view.features[i])
            continue
        merged = round(keep * 10 / 64) if contextual is None else contextual
        dominant, targets = raster[: keep - merged], raster[keep - merged :]
        assert dominant == sorted(dominant)
        assert targets == sorted(targets)
        assert (dominant[0] == -1) == cls
        count = keep - merged - cls
        best = view.cls_attention[0, i].sum(0).topk(count).indices.tolist()
        assert dominant[cls:] == sorted(best)
        assert torch.equal(
            selection.features[i, cls : keep - merged], view.features[i, dominant[cls:]]
        )


@pytest.mark.parametrize(
    ("keep", "contextual"), [(192, 30), (128, 20), (64, 10), (32, 5), (2, 0), (1, 0)]
)
def test_the_authors_split(keep: int, contextual: int) -> None:
    assert pore.VisionZip(keep=keep)._merged([keep]) == [contextual]


@given(st.integers(0, 999), st.data())
def test_ragged_images_are_as_if_alone(seed: int, data: st.DataObject) -> None:
    patches, images = 20, 3
    view = view_of(images, patches, seed)
    kept = [data.draw(st.integers(0, 8)) for _ in range(images)]
    merged = [data.draw(st.integers(0, 6)) for _ in range(images)]
    order = view.cls_attention[0].sum(1).argsort(-1)
    rank = order.argsort(-1)
    dominant = rank < torch.tensor(kept)[:, None]
    others = (rank >= 9) & (rank < 18)  # the last two are filling
    metric = view.keys[0].mean(1)[:, 1:]
    tokens, index, valid = zip_tokens(view.features, metric, dominant, others, kept, merged)
    for i in range(images):
        one = slice(i, i + 1)
        alone = zip_tokens(
            view.features[one],
            metric[one],
            dominant[one],
            others[one],
            kept[one],
            merged[one],
        )
        assert bool(alone[2].all())
        assert torch.equal(index[i, valid[i]], alone[1][0])
        torch.testing.assert_close(tokens[i, valid[i]], alone[0][0])


def test_order_of_tiles() -> None:
    """Two tiles side by side, of 2 x 2 patches: rows go through both."""
    raster = torch.tensor([[-1, 1, 2, 0], [-1, 0, 3, 1]])
    order = tile_order(raster, 1, (1, 2), (2, 2))
    assert order.tolist() == [1, 5, 2, 6, 0, 4, 3, 7]


@pytest.mark.parametrize(
    "settings", [{"keep": 0}, {"keep": 5, "contextual": 5}, {"keep": 5, "contextual": -1}]
)
def test_refused(settings: dict[str, int]) -> None:
    with pytest.raises(BudgetError):
        pore.VisionZip(**settings)


def test_contextual_refused_by_the_images() -> None:
    with pytest.raises(BudgetError, match="at most 3"):
        pore.VisionZip(keep=0.25, contextual=8)._select(view_of(1, 16, 0))


def test_in_a_model() -> None:
    """CLS and merged patches count in the budget, and the report tells which is which."""
    model = tiny_llava()
    with pore.VisionZip(keep=8, contextual=3)(model) as run:
        model(**batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)]))
    for sample in run.report:
        for image in sample.images:
            assert (len(image.kept), image.extra, image.seen) == (7, 1, N)
    assert [sample.tokens[0] for sample in run.report] == [16, 24]


# -- the checker of golden files, on files made here -----------------------------------------------


def visionzip_file(patches: int, dominant: int, contextual: int, images: int, seed: int) -> Made:
    heads, n = 2, patches + 1
    attention = draw(seed, images, heads, patches).softmax(-1)
    states, metric = draw(seed + 1, images, n, 6), draw(seed + 2, images, n, 4)
    found: dict[str, list[Any]] = {
        name: []
        for name in (
            "all_indices", "contextual_positions", "counts", "dominant_positions", "merged_into",
            "merged_positions", "tokens",
        )
    }  # fmt: skip
    for b in range(images):
        scores = attention[b].sum(0).tolist()
        best = sorted(range(patches), key=lambda t: -scores[t])[: dominant - 1]
        kept = [0, *sorted(t + 1 for t in best)]
        rest = [t for t in range(n) if t not in kept]
        step = max(1, len(rest) // contextual)
        targets = rest[::step][:contextual]
        members = [t for t in rest if t not in targets]
        into = []
        for t in members:
            alike = [float(torch.cosine_similarity(metric[b, t], metric[b, j], 0)) for j in targets]
            into.append(int(np.argmax(alike)))
        sums = []
        for j, target in enumerate(targets):
            own = [t for t, group in zip(members, into, strict=True) if group == j]
            sums.append(states[b, target] + states[b, own].sum(0) / max(1, len(own)))
        rows = [
            [0, *(t + 1 for t in best)], targets,
            [max(1, into.count(j)) for j in range(len(targets))], kept, into, members,
            torch.cat([states[b, kept], torch.stack(sums)]),
        ]  # fmt: skip
        for name, row in zip(found, rows, strict=True):
            found[name].append(row if isinstance(row, Tensor) else torch.tensor(row).long())
    tensors = {name: torch.stack(rows) for name, rows in found.items()}
    tensors |= {"cls_attention_heads": attention, "hidden_states": states, "metric": metric}
    return Made({"dominant": dominant, "contextual": contextual}, tensors)


@pytest.mark.parametrize(
    ("patches", "dominant", "contextual"),
    [
        (30, 28, 2),  # three left to merge, two of them targets; as many tokens as patches
        (30, 27, 2),
        (30, 28, 1),
        (30, 26, 5),  # all that are left are targets, and CLS makes one token too many
        (30, 25, 5),
        (30, 1, 29),
        (12, 1, 1),
        (2, 1, 1),
        (49, 14, 5),
    ],
)
@pytest.mark.parametrize("images", [1, 2])
def test_visionzip(patches: int, dominant: int, contextual: int, images: int) -> None:
    golden_visionzip.check(visionzip_file(patches, dominant, contextual, images, patches + images))
