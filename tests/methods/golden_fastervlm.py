"""Golden files of FasterVLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pore
from helpers.golden_models import llava_of, tower_view, visual_embeddings

_SELECTION = {
    "cls_attention_heads", "cls_attention_mean", "image_features", "kept_indices", "topk_indices",
    "visual_features",
}  # fmt: skip
_END_TO_END = (_SELECTION - {"cls_attention_heads"}) | {"pixel_values"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    tensors: dict[str, Tensor] = file.tensors
    pruner = pore.FasterVLM(keep=file.params["visual_token_num"])
    weights = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    if not weights:
        assert tensors.keys() == _SELECTION, tensors.keys() ^ _SELECTION
        return check_selection(pruner, tensors, tensors["cls_attention_heads"][None])
    assert tensors.keys() - weights.keys() == _END_TO_END
    return check_end_to_end(file, pruner, weights)


def check_selection(pruner: Any, tensors: dict[str, Tensor], attention: Tensor) -> float:
    """The rule on given attention (S, I, H, N)."""
    features = tensors["image_features"]
    selection = pruner._select(tower_view(features, attention))
    assert torch.equal(selection.raster, tensors["kept_indices"].view_as(selection.raster))
    torch.testing.assert_close(selection.features, tensors["visual_features"], rtol=1e-4, atol=1e-6)
    if "cls_attention_mean" in tensors:
        mean = attention[0].mean(1)
        torch.testing.assert_close(mean, tensors["cls_attention_mean"], rtol=1e-4, atol=1e-6)
        order = mean.argsort(dim=-1, descending=True)[:, : selection.raster.shape[1]]
        assert torch.equal(order, tensors["topk_indices"])
    else:
        total = attention.mean(2).sum(0)[0]
        torch.testing.assert_close(total, tensors["cls_attn_sum"], rtol=1e-4, atol=1e-6)
        order = total.argsort(descending=True)[: selection.raster.shape[1]]
        assert torch.equal(order, tensors["topk_indices"])
    return float((selection.features - tensors["visual_features"]).abs().max())


def check_end_to_end(file: Any, pruner: Any, weights: dict[str, Tensor]) -> float:
    """The whole tower, from pixels to what the decoder gets."""
    tensors: dict[str, Tensor] = file.tensors
    weights = {k.removeprefix("weights."): v for k, v in weights.items()}
    config = file.config
    model = llava_of(config, weights, nn.Identity(), config["hidden_size"])
    got, run = visual_embeddings(model, pruner, tensors["pixel_values"])
    kept = [list(sample.images[0].kept) for sample in run.report]
    expected = tensors["kept_indices"].view(len(kept), -1)
    assert kept == expected.tolist()
    torch.testing.assert_close(got, tensors["visual_features"], rtol=1e-4, atol=1e-5)
    return float((got - tensors["visual_features"]).abs().max())
