"""Golden files of VisPruner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import pore
from helpers.golden_models import tower_view
from helpers.golden_prompts import embeddings, tower_prompt, with_rows, without_newlines
from helpers.recording import Recording
from pore.methods.vispruner import dissimilar
from pore.tower.stages import TowerView

_CHOSEN = {"diverse", "important", "index_mask", "sorted"}
_SELECTION = _CHOSEN | {"attention_mean", "attentions", "features"}
_END_TO_END = _CHOSEN | {
    "cls_attentions", "embed_tokens.weight", "image_newline", "input_ids", "inputs_embeds",
    "pixel_values", "projector.bias", "projector.weight", "vision_features",
}  # fmt: skip
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    tensors: dict[str, Tensor] = file.tensors
    vision = {k: v for k, v in tensors.items() if k.startswith("vision.")}
    keys = tensors.keys() - vision.keys()
    if vision:
        expected = _END_TO_END - (set() if file.params["anyres"] else {"image_newline"})
        assert keys == expected, keys ^ expected
        return _check_end_to_end(file, vision)
    assert keys == _SELECTION, keys ^ _SELECTION
    features, attentions = tensors["features"], tensors["attentions"]
    mean = attentions.mean(1)
    torch.testing.assert_close(mean, tensors["attention_mean"], rtol=1e-4, atol=1e-6)
    _check_choice(file, tower_view(features, attentions[None]))
    return float((mean - tensors["attention_mean"]).abs().max())


def _check_choice(file: Any, view: TowerView) -> None:
    tensors, params = file.tensors, file.params
    count, ratio = params["visual_token_num"], params["important_ratio"]
    important, diverse = tensors["important"], tensors["diverse"]
    order = view.cls_attention[0].mean(1).argsort(dim=-1, descending=True)
    assert torch.equal(order[:, : int(count * ratio)], important)
    others, wanted = order[:, important.shape[1] :], count - important.shape[1]
    exact = diverse.shape[1] == wanted  # where not, the authors' indexing went wrong
    rounds = -(-(others.shape[1] - wanted) // 8)
    assert params.get("iterations", rounds) == rounds
    for faithful in (False, True) if exact else (True,):
        chosen = dissimilar(view.features, others, wanted, faithful)
        assert torch.equal(chosen, diverse)
        pruner = pore.VisPruner(keep=count, important_ratio=ratio, faithful=faithful)
        selection = pruner._select(view)
        assert torch.equal(selection.raster, tensors["sorted"])
        mask = torch.zeros_like(tensors["index_mask"]).scatter(1, selection.raster, 1)
        assert torch.equal(mask, tensors["index_mask"])
        index = selection.raster[..., None].expand_as(selection.features)
        assert torch.equal(selection.features, view.features.gather(1, index))


def _check_end_to_end(file: Any, vision: dict[str, Tensor]) -> float:
    tensors, params = file.tensors, file.params
    weights = {k.removeprefix("vision."): v for k, v in vision.items()}
    model, inputs = tower_prompt(file, weights)
    crops, tiled = len(tensors["sorted"]), params["anyres"]
    # The authors choose among the padding of crops too, and keep the same number of each.
    ratio = params["important_ratio"]
    pruner = Recording(pore.VisPruner(params["visual_token_num"] * crops, ratio, faithful=tiled))
    got, run = embeddings(model, pruner, inputs)
    ((_, view, selection),) = pruner.seen
    assert torch.equal(selection.raster, tensors["sorted"])
    _check_choice(file, replace(view, tilings=None))
    torch.testing.assert_close(view.features, tensors["vision_features"], **_CLOSE)
    torch.testing.assert_close(view.cls_attention[0], tensors["cls_attentions"], **_CLOSE)
    (image,) = run.report.samples[0].images
    if tiled:
        first = torch.arange(crops)[:, None] * view.features.shape[1]
        kept = set((tensors["sorted"] + first).flatten().tolist())
        (tiling,) = view.tilings or ()
        assert [tiling.shown[i] for i in image.kept] == [i for i in tiling.shown if i in kept]
    else:
        assert list(image.kept) == tensors["sorted"][0].tolist()
    if tiled and not with_rows(tensors):
        got = without_newlines(got, model)
    torch.testing.assert_close(got, tensors["inputs_embeds"], **_CLOSE)
    return float((got - tensors["inputs_embeds"]).abs().max())
