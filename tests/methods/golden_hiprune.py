"""Golden files of HiPrune: the patches that its `encode_images` keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pore
from helpers.golden_models import llava_of, tower_view, visual_embeddings
from pore.layout import Tiling
from pore.tensors.attention import received_attention

_SELECTION = {"deep_attention", "keys", "mask", "object_attention", "queries"}
_END_TO_END = {"features", "mask", "pixel_values", "projector.bias", "projector.weight"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    tensors: dict[str, Tensor] = file.tensors
    vision = {k: v for k, v in tensors.items() if k.startswith("vision.")}
    keys = tensors.keys() - vision.keys()
    pruner = pore.HiPrune(
        keep=file.params["retention"],
        alpha=file.params["alpha"],
        object_layer=file.params["object_layer"] - 1,
        faithful=True,
    )
    if vision:
        assert keys == _END_TO_END, keys ^ _END_TO_END
        return _check_end_to_end(file, pruner, vision)
    assert keys == _SELECTION, keys ^ _SELECTION
    return _check_selection(file, pruner)


def _check_selection(file: Any, pruner: pore.HiPrune) -> float:
    tensors: dict[str, Tensor] = file.tensors
    tiles, grid = file.params["tiles"], file.params["grid"]
    worst = 0.0
    for i, name in enumerate(("object_attention", "deep_attention")):
        query, key = tensors["queries"][i], tensors["keys"][i]
        got = received_attention(query, key, query.shape[-1] ** -0.5).mean(1)[:, 1:]
        torch.testing.assert_close(got, tensors[name], rtol=1e-4, atol=1e-7)
        worst = max(worst, float((got - tensors[name]).abs().max()))
    tiling = None
    if tiles > 1:
        every = tuple(range(tiles * grid * grid))
        tiling = (Tiling(tiles, (1, tiles - 1), grid * grid, every),)
    view = tower_view(
        torch.zeros(tiles, grid * grid, 1),
        torch.empty(0),
        queries=tuple(tensors["queries"]),
        keys=tuple(tensors["keys"]),
        tilings=tiling,
    )
    (stage,) = pruner.stages()
    selection = stage.rule(view)
    assert selection.valid is None
    expected = [row.nonzero()[:, 0].tolist() for row in tensors["mask"]]
    assert selection.raster.tolist() == expected
    assert list(map(len, expected)) == file.params["kept"]
    return worst


def _check_end_to_end(file: Any, pruner: pore.HiPrune, vision: dict[str, Tensor]) -> float:
    tensors: dict[str, Tensor] = file.tensors
    weight, bias = tensors["projector.weight"], tensors["projector.bias"]
    projector = nn.Linear(weight.shape[1], weight.shape[0])
    projector.load_state_dict({"weight": weight, "bias": bias})
    weights = {k.removeprefix("vision."): v for k, v in vision.items()}
    model = llava_of(file.params["vision_config"], weights, projector, weight.shape[0])
    got, run = visual_embeddings(model, pruner, tensors["pixel_values"])
    for sample, mask in zip(run.report, tensors["mask"], strict=True):
        assert list(sample.images[0].kept) == mask.nonzero()[:, 0].tolist()
    torch.testing.assert_close(got, tensors["features"], rtol=1e-4, atol=1e-5)
    return float((got - tensors["features"]).abs().max())
