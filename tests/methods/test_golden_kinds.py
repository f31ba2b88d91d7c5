"""The checkers of golden files on files that are not at hand: further parameters, roundings, ends.

Each file is made here by a reference of its own, token by token and in plain arithmetic, from what
the specifications say that the authors' code does; the checker then takes it as one of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods import (
    golden_divprune,
    golden_hired,
    golden_prumerge,
    golden_prumerge_plus,
    golden_sparsevlm,
    golden_tome,
    golden_visionzip,
    golden_vispruner,
    golden_vtc_cls,
)
from pore.methods.hired import truncated_shares


@dataclass
class Made:
    """What a golden file holds."""

    params: dict[str, Any]
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- ToMe ------------------------------------------------------------------------------------------


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


# -- VisionZip -------------------------------------------------------------------------------------


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


# -- VTC-CLS ---------------------------------------------------------------------------------------


def vtc_cls_file(layers: int, start: int | None, keep: int) -> Made:
    patches = 36
    heads, features = draw(layers, layers, 3, patches).softmax(-1), draw(1, 1, patches, 5)
    first = 0 if start is None else start if start >= 0 else layers + start
    total = sum(heads[layer].mean(0) for layer in range(first, layers - 1))
    order = sorted(range(patches), key=lambda t: -float(total[t]))[:keep]
    kept = sorted(order)
    return Made(
        {"token_num": keep, "start_layer": start, "num_layers": layers, "num_patches": patches},
        {
            "cls_attention_heads": heads,
            "cls_attn_sum": total,
            "image_features": features,
            "kept_indices": torch.tensor(kept),
            "topk_indices": torch.tensor(order),
            "visual_features": features[:, kept],
        },
    )


@pytest.mark.parametrize("start", [-6, -3, -2, 0, 4, None])
@pytest.mark.parametrize("keep", [2, 35])
def test_vtc_cls(start: int | None, keep: int) -> None:
    golden_vtc_cls.check(vtc_cls_file(6, start, keep))


# -- PruMerge and PruMerge+ ------------------------------------------------------------------------


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


# -- HiRED -----------------------------------------------------------------------------------------


def hired_file(rate: float, alpha: float, images: int, seed: int) -> Made:
    """Images of 2 x 2 tiles and the whole one, 36 patches and 3 heads each."""
    n, tiles = 36, 5
    top, bottom = (draw(seed + i, images * tiles, 3, n).exp().softmax(-1) for i in range(2))
    masks, counts = [], []
    for b in range(images):
        own = slice(b * tiles, (b + 1) * tiles)
        first, last = top[own].sum(1), bottom[own].sum(1)
        total = int(tiles * n * rate)
        whole = min(int(total * alpha), n)
        sub = min(total - whole, (tiles - 1) * n)
        budgets = [whole, 0, 0, 0, 0]
        if sub > 0:
            marked = sorted(range(n), key=lambda t: -float(first[0, t]))[: int(n * (1 - alpha))]
            hits = [sum(t // (n // 4) == band for t in marked) for band in range(4)]
            for band, hit in enumerate(hits):
                share = np.float32(hit) / np.float32(sum(hits))  # tensors of torch: float32
                budgets[band + 1] = min(int(np.float32(share * np.float32(sub))), n)
        mask = torch.zeros(tiles, n, dtype=torch.bool)
        for tile, budget in enumerate(budgets):
            mask[tile, sorted(range(n), key=lambda t: -float(last[tile, t]))[:budget]] = True
        masks.append(mask)
        counts += budgets
    tensors = {
        "top_cls_attention_heads": top,
        "bottom_cls_attention_heads": bottom,
        "image_sizes": torch.tensor([[96, 96]] * images),
        "mask": torch.cat(masks),
        "num_patches": torch.tensor([tiles] * images),
        "tokens_per_patch": torch.tensor(counts),
    }
    params = {
        "token_budget_rate": rate, "alpha": alpha, "heads": 3, "num_vision_tokens": n,
        "image_sizes": [[96, 96]] * images, "image_grid_pinpoints": [[96, 96]], "image_size": 48,
    }  # fmt: skip
    return Made(params, tensors)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.45, 0.7])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1 / 3, 0.5, 0.75])
def test_hired(rate: float, alpha: float) -> None:
    for seed in range(3):
        golden_hired.check(hired_file(rate, alpha, 1 + seed % 2, seed))


def test_shares_of_hired_are_cut_off_in_single_precision() -> None:
    """7 of 24 hits of 216 are 63; the authors' tensors give 62.99999."""
    assert truncated_shares([7, 17], 216) == [62, 153]
    assert truncated_shares([3, 8], 55) == [15, 40]
    assert truncated_shares([5, 0, 5], 11) == [5, 0, 5]


# -- SparseVLM, DivPrune, VisPruner ----------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
def test_clusters_are_decided_by_the_files_noise(number: int) -> None:
    """Of two clusters equal densities leave the choice of centres to the noise."""
    for seed in range(6):
        x, noise = draw(seed, 14, 8), torch.rand(14, generator=torch.Generator().manual_seed(seed))
        distance = torch.cdist(x.double(), x.double()) / 8**0.5
        near = distance.square().sort(-1).values[:, :number].mean(-1)
        density = (-near).exp() + noise.double() * 1e-6
        gaps = []
        for i in range(14):
            denser = [float(distance[i, j]) for j in range(14) if density[j] > density[i]]
            gaps.append(min(denser, default=float(distance.max())))
        peak = torch.tensor(gaps) * density
        centres = sorted(range(14), key=lambda i: -float(peak[i]))[:number]
        group = [int(distance[i, centres].argmin()) for i in range(14)]
        for j, centre in enumerate(centres):
            group[centre] = j
        merged = torch.stack(
            [x[[i for i in range(14) if group[i] == j]].mean(0) for j in range(number)]
        )
        case = {"cluster_num": torch.tensor(number), "density_noise": noise, "x": x}
        tensors = {f"cluster0.{name}": value for name, value in {**case, "merged": merged}.items()}
        golden_sparsevlm.check(Made({}, tensors))


@pytest.mark.parametrize("ratio", [0.04, 0.098, 0.5, 1, 1.0])
def test_divprune(ratio: float) -> None:
    features = draw(7, 25, 6)
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    count = round(ratio * 25)
    nearest = distance.sort(0).values[1]
    order = [int(nearest.argmax())]
    while len(order) < count:
        order.append(int(distance[order].min(0).values.argmax()))
    tensors = {
        "features": features,
        "distance": distance,
        "order": torch.tensor(order),
        "sorted": torch.tensor(sorted(order)),
    }
    golden_divprune.check(Made({"ratio": ratio}, tensors))


@pytest.mark.parametrize(
    ("patches", "keep", "ratio"),
    [(36, 16, 0.75), (24, 10, 0.25), (24, 24, 0.5), (24, 5, 1.0), (24, 6, 0.0), (12, 8, 0.75)],
)
def test_vispruner(patches: int, keep: int, ratio: float) -> None:
    """The last one makes the authors' indexing keep one too few."""
    features, attention = draw(patches, 2, patches, 7), draw(keep, 2, 3, patches).softmax(-1)
    important, diverse = [], []
    for b in range(2):
        mean = attention[b].mean(0)
        order = sorted(range(patches), key=lambda t: -float(mean[t]))
        first = int(keep * ratio)
        unit = features[b] / features[b].norm(dim=-1, keepdim=True)
        rest = order[first:] if keep > first else []
        while (excess := len(rest) - (keep - first)) > 0 and rest:
            a, other, size = rest[0::2], rest[1::2], len(rest)
            score = {t: max(float(unit[t] @ unit[u]) for u in other) for t in a}
            drop = min(8, excess)
            a.sort(key=lambda t: -score[t])
            # Of an odd number their indices are one fewer, and of all that is left none stays.
            rest = [*a[drop:][: max(size // 2 - drop, 0)], *other]
        important.append(order[:first])
        diverse.append(rest)
    both = [sorted(i + d) for i, d in zip(important, diverse, strict=True)]
    mask = torch.zeros(2, patches, dtype=torch.long)
    for row, kept in zip(mask, both, strict=True):
        row[kept] = 1
    tensors = {
        "features": features,
        "attentions": attention,
        "attention_mean": attention.mean(1),
        "important": torch.tensor(important).long().view(2, -1),
        "diverse": torch.tensor(diverse).long().view(2, -1),
        "sorted": torch.tensor(both),
        "index_mask": mask,
    }
    golden_vispruner.check(Made({"visual_token_num": keep, "important_ratio": ratio}, tensors))
