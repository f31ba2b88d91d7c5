"""Golden files of SCOPE: choices, whole towers, and how tiles are packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pore
from helpers.golden_models import Worst, llava_of, tower_view, visual_embeddings
from helpers.recording import Recording
from pore.layout import Tiling
from pore.methods.scope import Combine, covering
from pore.tensors.gathering import cosine
from pore.tower.tiles import in_prompt_order

_COMBINE: dict[str, Combine] = {"multi": "multiply", "add": "add"}
_SELECTION = {"features", "kept_indices", "selected_order", "similarity"}
_ATTENTION = {"cls_attention_heads", "cls_attention_sum"}
_END_TO_END = {
    "cls_attention_sum", "hidden_states", "kept_indices", "pixel_values", "selected_order",
    "visual_features",
}  # fmt: skip
_PACKING = {"packed", "selected_order", "tile_features"}
_SIDE = 24
"""Rows and columns of patches in a tile, which the authors' packing does not read from anywhere."""


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    tensors: dict[str, Tensor] = file.tensors
    weights = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    keys = tensors.keys() - weights.keys()
    if weights:
        assert keys == _END_TO_END, keys ^ _END_TO_END
        return _check_end_to_end(file, weights)
    if "packed" in tensors:
        assert keys == _PACKING, keys ^ _PACKING
        return _check_packing(file)
    expected = _SELECTION | (_ATTENTION if file.params["attention"] else set())
    assert keys == expected, keys ^ expected
    return _check_selection(file)


def _check_selection(file: Any) -> float:
    tensors, params, worst = file.tensors, file.params, Worst()
    features, alpha = tensors["features"], float(params["alpha"])
    if params["attention"]:
        attention = tensors["cls_attention_heads"]
        worst.compare(attention.sum(1), tensors["cls_attention_sum"])
    else:
        attention, alpha = torch.ones(len(features), 1, features.shape[1]), 0.0
    similarity = cosine(features, features)
    worst.compare(similarity[0], tensors["similarity"])
    combine, keep = _COMBINE[params["combine"]], params["keep"]
    weights = attention.sum(1) ** alpha
    every = torch.ones(features.shape[:2], dtype=torch.bool)
    order, _ = covering(similarity, weights, keep, every, combine)
    assert torch.equal(order, tensors["selected_order"])
    for faithful in (False, True):
        total = keep * len(features) if faithful else keep
        method = pore.SCOPE(total, alpha, combine, faithful)
        selection = method._select(tower_view(features, attention[None]))
        assert torch.equal(selection.raster, tensors["kept_indices"])
        index = selection.raster[..., None].expand_as(selection.features)
        assert torch.equal(selection.features, features.gather(1, index))
    return worst.value


def _check_end_to_end(file: Any, weights: dict[str, Tensor]) -> float:
    tensors, params, worst = file.tensors, file.params, Worst()
    vision = {k.removeprefix("weights."): v for k, v in weights.items()}
    width = tensors["hidden_states"].shape[-1]
    model = llava_of(params["config"], vision, nn.Identity(), width)
    pixels = tensors["pixel_values"]
    assert params["total"] // len(pixels) == params["per_image"]
    combine = _COMBINE[params.get("combine", "multi")]
    settings: Any = {"alpha": float(params["alpha"]), "combine": combine}
    plain = visual_embeddings(model, pore.SCOPE(params["per_image"], **settings), pixels)[0]
    recording = Recording(pore.SCOPE(params["total"], faithful=True, **settings))
    got, run = visual_embeddings(model, recording, pixels)
    assert torch.equal(got, plain)
    ((_, view, selection),) = recording.seen
    assert torch.equal(selection.raster, tensors["kept_indices"])
    worst.compare(view.features, tensors["hidden_states"][:, 1:])
    worst.compare(view.cls_attention[0].sum(1), tensors["cls_attention_sum"])
    kept = [list(sample.images[0].kept) for sample in run.report]
    assert kept == tensors["kept_indices"].tolist()
    assert kept == tensors["selected_order"].sort(1).values.tolist()
    worst.compare(got, tensors["visual_features"])
    return worst.value


def _check_packing(file: Any) -> float:
    """Tiles side by side, as the engine puts what a stage in the tower keeps into the prompt."""
    tensors, columns, rows = file.tensors, file.params["width"], file.params["height"]
    raster = tensors["selected_order"].sort(1).values
    canvas = torch.arange(rows * columns * _SIDE * _SIDE)
    row, column = canvas // (columns * _SIDE), canvas % (columns * _SIDE)
    tile = row // _SIDE * columns + column // _SIDE
    slots = tile * _SIDE**2 + row % _SIDE * _SIDE + column % _SIDE
    tiling = Tiling(rows * columns, (rows, columns), _SIDE**2, tuple(slots.tolist()))
    every = torch.ones_like(raster, dtype=torch.bool)
    chosen, _ = in_prompt_order(tiling, raster, every, None)
    assert torch.equal(tensors["tile_features"].flatten(0, 1)[chosen], tensors["packed"])
    return 0.0
