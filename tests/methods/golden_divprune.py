"""Golden files of DivPrune."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import pore
from helpers.golden_models import llava_of, visual_embeddings
from pore.methods.divprune import cosine_distance, farthest
from pore.tensors.selection import budget

_SELECTION = {"distance", "features", "order", "sorted"}
_END_TO_END = {
    "embed_tokens.weight", "input_ids", "inputs_embeds", "keep_indices", "order", "pixel_values",
    "projected_features", "projector.bias", "projector.weight", "vision_features",
}  # fmt: skip


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    tensors: dict[str, Tensor] = file.tensors
    vision = {k: v for k, v in tensors.items() if k.startswith("vision.")}
    keys = tensors.keys() - vision.keys()
    if not vision:
        # Large files leave the distances out.
        assert keys | {"distance"} == _SELECTION, keys ^ _SELECTION
        return _check_selection(file, tensors["features"][None])
    assert keys == _END_TO_END, keys ^ _END_TO_END
    worst = _check_selection(file, tensors["projected_features"])
    return max(worst, _check_end_to_end(file, vision))


def _check_selection(file: Any, features: Tensor) -> float:
    tensors: dict[str, Tensor] = file.tensors
    count = budget(float(file.params["ratio"]), features.shape[1])
    distance = cosine_distance(features)
    valid = torch.ones(features.shape[:2], dtype=torch.bool)
    for faithful in (True,) if _repeats(tensors["order"]) else (False, True):
        order, rank = farthest(distance, count, valid, faithful)
        assert torch.equal(order[0], tensors["order"])
        assert torch.equal((rank[0] < count).nonzero()[:, 0], tensors["order"].unique())
    if "sorted" in tensors:
        assert torch.equal(tensors["order"].sort()[0], tensors["sorted"])
    if "distance" not in tensors:
        return 0.0
    torch.testing.assert_close(distance[0], tensors["distance"], rtol=1e-4, atol=1e-6)
    return float((distance[0] - tensors["distance"]).abs().max())


def _repeats(order: Tensor) -> bool:
    """Whether the authors' code picked a token again, which ours does only on request."""
    return len(order.unique()) < len(order)


def _check_end_to_end(file: Any, vision: dict[str, Tensor]) -> float:
    tensors: dict[str, Tensor] = file.tensors
    weight, bias = tensors["projector.weight"], tensors["projector.bias"]
    projector = nn.Linear(weight.shape[1], weight.shape[0])
    projector.load_state_dict({"weight": weight, "bias": bias})
    weights = {k.removeprefix("vision."): v for k, v in vision.items()}
    model = llava_of(file.params["vision_config"], weights, projector, weight.shape[0])
    pruner = pore.DivPrune(keep=float(file.params["ratio"]), faithful=True)
    got, run = visual_embeddings(model, pruner, tensors["pixel_values"])
    if not _repeats(tensors["order"]):
        plain = replace(pruner, faithful=False)
        assert torch.equal(got, visual_embeddings(model, plain, tensors["pixel_values"])[0])
    start = int((tensors["input_ids"][0] == file.params["image_token_id"]).nonzero()[0])
    (image,) = run.report.samples[0].images
    visual = tensors["keep_indices"]
    visual = visual[(visual >= start) & (visual < start + image.seen)]
    assert [start + i for i in image.kept] == visual.tolist()
    expected = tensors["inputs_embeds"][:, start : start + len(visual)]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    return float((got - expected).abs().max())
