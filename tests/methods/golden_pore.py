"""Golden files of method "pore": padding suppression and the position weight of version 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from helpers.padding import padding_fraction, unpadded_cells
from pore.bias.position_bias import PositionBias
from pore.tensors.padding import cap, visible_patches
from pore.tensors.selection import top_k


class GoldenFile(Protocol):
    path: Path
    params: dict[str, Any]
    tensors: dict[str, Tensor]


_PARAMS = {"seed", "grid", "img_size", "threshold", "image_start", "image_len"}
_CASE = re.compile(r"c(\d+)\.(attn_heads|image_size_wh|pad_mask|unpad_mask|score)")
_KEPT = re.compile(r"c(\d+)\.r(\d+)\.(kept|kept_unweighted)")


def check(file: GoldenFile) -> float:
    """Assert that pore gives what the file holds.

    Returns:
        The largest absolute difference of any floating-point result.
    """
    params, tensors = file.params, file.tensors
    assert params.keys() == _PARAMS, params.keys() ^ _PARAMS
    side, threshold = params["grid"], params["threshold"]
    assert side * side == params["image_len"]

    cases: dict[int, dict[str, Tensor]] = {}
    kept: list[tuple[int, int, str, Tensor]] = []
    for key, value in tensors.items():
        if match := _CASE.fullmatch(key):
            cases.setdefault(int(match[1]), {})[match[2]] = value
        elif match := _KEPT.fullmatch(key):
            kept.append((int(match[1]), int(match[2]), match[3], value))
        else:
            assert key == "weight", f"{file.path}: a key that is not understood: {key}"
    assert cases
    assert kept

    weight = tensors["weight"].double()
    bias = PositionBias.fit(1 / weight, "empirical", grid=(side, side))
    padding, scores = {}, {}
    worst = (bias.values[0] / bias.values - weight / weight[0]).abs().max().item()
    for number, case in cases.items():
        sizes = case["image_size_wh"][None]
        padding[number] = padding_fraction(sizes, (side, side), params["img_size"])
        visible = visible_patches(padding[number], threshold)[0]
        assert torch.equal(visible, case["pad_mask"].bool()), number
        unpadded = unpadded_cells(sizes, (side, side))[0]
        assert torch.equal(unpadded, case["unpad_mask"].bool()), number
        scores[number] = case["attn_heads"].mean(0, keepdim=True)
        worst = max(worst, (scores[number][0] - case["score"]).abs().max().item())

    for number, rank, kind, expected in kept:
        score = bias.divide(scores[number]) if kind == "kept" else scores[number]
        count = cap(torch.tensor([rank]), padding[number], threshold)
        visible = visible_patches(padding[number], threshold)
        found = top_k(score, count, visible)[0].nonzero()[:, 0]
        assert torch.equal(found, expected), f"{file.path}: c{number}.r{rank}.{kind}"
    assert worst <= 1e-6, worst
    return worst
