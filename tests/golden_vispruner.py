"""Golden files of VisPruner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from golden_models import tower_view
from golden_prompts import embeddings, prompted_llava
from pore.methods.vispruner import dissimilar
from pore.tower import TowerSelection, TowerView

_CHOSEN = {"diverse", "important", "index_mask", "sorted"}
_SELECTION = _CHOSEN | {"attention_mean", "attentions", "features"}
_END_TO_END = _CHOSEN | {
    "cls_attentions", "embed_tokens.weight", "input_ids", "inputs_embeds", "pixel_values",
    "projector.bias", "projector.weight", "vision_features",
}  # fmt: skip
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class _Spy(pore.VisPruner):
    """VisPruner that remembers what it saw and chose."""

    def _select(self, view: TowerView) -> TowerSelection:
        selection = super()._select(view)
        seen.append((view, selection))
        return selection


seen: list[tuple[TowerView, TowerSelection]] = []


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    tensors: dict[str, Tensor] = file.tensors
    vision = {k: v for k, v in tensors.items() if k.startswith("vision.")}
    keys = tensors.keys() - vision.keys()
    if vision:
        assert keys == _END_TO_END, keys ^ _END_TO_END
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
    others = order[:, important.shape[1] :]
    rounds = -(-(others.shape[1] - diverse.shape[1]) // 8)
    assert params.get("iterations", rounds) == rounds
    for faithful in (False, True):
        chosen = dissimilar(view.features, others, diverse.shape[1], faithful)
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
    model, inputs = prompted_llava(file, weights)
    pruner = _Spy(keep=params["visual_token_num"], important_ratio=params["important_ratio"])
    seen.clear()
    got, run = embeddings(model, pruner, inputs)
    ((view, _),) = seen
    _check_choice(file, view)
    torch.testing.assert_close(view.features, tensors["vision_features"], **_CLOSE)
    torch.testing.assert_close(view.cls_attention[0], tensors["cls_attentions"], **_CLOSE)
    (image,) = run.report.samples[0].images
    assert list(image.kept) == tensors["sorted"][0].tolist()
    torch.testing.assert_close(got, tensors["inputs_embeds"], **_CLOSE)
    return float((got - tensors["inputs_embeds"]).abs().max())
