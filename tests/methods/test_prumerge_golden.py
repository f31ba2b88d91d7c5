"""PruMerge and PruMerge+: the checkers of golden files, on files made here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.golden_files import Made, draw
from methods import golden_prumerge, golden_prumerge_plus


def attention_with(outliers: list[int], patches: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (B, N + 1, 8) and attention; so many patches, under a quarter, stand out."""
    q, k = (draw(seed + i, len(outliers), patches + 1, 8) for i in range(2))
    q[:, 0] = torch.tensor([8**0.5, *[0.0] * 7])  # of keys it sees the first entry
    for b, count in enumerate(outliers):
        mixed = torch.randperm(patches, generator=torch.Generator().manual_seed(seed + b)) + 1
        k[b, mixed, 0] = torch.linspace(-0.1, 0.1, patches)
        k[b, mixed[:count], 0] = torch.linspace(1.5, 2.0, count)
    return q, k, k[..., 0].softmax(-1)[:, 1:]


def prumerge_rest(
    tensors: dict[str, Tensor], kept: list[list[int]], others: list[list[int]], neighbours: int
) -> Tensor:
    """Kept patches with their neighbours added, and one token of the others, image by image."""
    tokens = []
    for b, (own, rest) in enumerate(zip(kept, others, strict=True)):
        x, w, k = tensors["image_features"][b], tensors["cls_attn"][b], tensors["k"][b, 1:]
        unit = k / k.norm(dim=-1, keepdim=True)
        rows = []
        for slot, token in enumerate(own):
            pool = [t for i, t in enumerate(own) if i != slot] + rest
            pool.sort(key=lambda t: -float(unit[token] @ unit[t]))
            rows.append(x[token] + sum(w[t] * x[t] for t in pool[:neighbours]))
        rows.append(sum((w[t] * x[t] for t in rest), torch.zeros(x.shape[1])))
        tokens.append(torch.stack(rows))
    return torch.stack(tokens)


def prumerge_file(outliers: list[int], patches: int, keep: float | None, seed: int = 0) -> Made:
    q, k, attention = attention_with(outliers, patches, seed)
    every = attention.flatten().double().numpy()
    low, high = np.percentile(every, 25), np.percentile(every, 75)
    far = int((every > high + 1.5 * (high - low)).sum())
    assert far == sum(outliers)
    ratio = far / every.size if keep is None else keep
    count = int(patches * ratio)  # in double precision, as Python has it
    order = [sorted(range(patches), key=lambda t: -float(row[t])) for row in attention]
    kept = [row[:count] for row in order]
    others = [sorted(row[count:]) for row in order]
    tensors = {
        "q": q,
        "k": k,
        "cls_attn": attention.contiguous(),
        "image_features": draw(seed + 3, len(outliers), patches, 6),
        "idx": torch.tensor(kept).long().view(len(outliers), count),
        "complement": torch.tensor(others),
        "topk": torch.tensor(count),
        "reduction_ratio": torch.tensor(ratio),  # float32
    }
    tensors["visual_features"] = prumerge_rest(tensors, kept, others, 8)
    params = {
        "B": len(outliers), "num_patches": patches, "dim": 6, "neighbours": 8, "qk_layer": 3,
        "seed": seed, "if_adaptive": keep is None,
    }  # fmt: skip
    return Made(params if keep is None else {**params, "reduction_ratio": keep}, tensors)


@pytest.mark.parametrize(
    ("outliers", "patches"),
    [
        ([11], 576),  # 11 / 576 in float32 times 576 is a hair below 11
        ([52], 576),
        ([13], 144),
        ([22], 144),
        ([8], 49),  # in double precision 8 / 49 times 49 is a hair below 8: the authors keep 7
        ([1], 49),  # and none
        ([5, 7], 64),
        ([6, 7], 100),
        ([12, 17], 100),  # 14.5 of each
        ([0], 64),
    ],
)
def test_prumerge_adaptive(outliers: list[int], patches: int) -> None:
    golden_prumerge.check(prumerge_file(outliers, patches, None))


@pytest.mark.parametrize(("patches", "keep"), [(100, 0.29), (64, 0.11), (50, 0.02), (30, 0.9)])
@pytest.mark.parametrize("images", [1, 2])
def test_prumerge_with_a_ratio(patches: int, keep: float, images: int) -> None:
    golden_prumerge.check(prumerge_file([3] * images, patches, keep))


@pytest.mark.parametrize(("patches", "outliers"), [(576, 11), (576, 52), (100, 7), (49, 8)])
def test_prumerge_plus_adaptive(patches: int, outliers: int) -> None:
    made = prumerge_file([outliers], patches, None)
    ratio = outliers / patches
    step = int(int(1 / ratio) / 3)
    best = made.tensors["idx"][0].tolist()
    kept = best + [t for t in range(0, patches - 1, step) if t not in best]
    others = [t for t in range(patches) if t not in kept]
    made.tensors |= {
        "grid_step": torch.tensor(step),
        "idx": torch.tensor([kept]),
        "complement": torch.tensor([others]),
        "visual_features": prumerge_rest(made.tensors, [kept], [others], 8),
    }
    golden_prumerge_plus.check(made)
