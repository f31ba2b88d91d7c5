"""Golden files of HiRED: the authors' fork of transformers, from attention to logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.image_processing_utils import select_best_resolution

import pore
from helpers.golden_models import tower_view
from helpers.golden_prompts import inputs_of, load_tower
from helpers.recording import Recording
from pore.layout import Tiling
from pore.tower.stages import TowerSelection

_PLAIN = {"cls_attention_heads", "kept_indices", "mask"}
_TILES = {
    "bottom_cls_attention_heads", "image_sizes", "mask", "num_patches", "tokens_per_patch",
    "top_cls_attention_heads",
}  # fmt: skip
_END_TO_END = {"attention_mask", "input_ids", "logits", "mask", "pixel_values"}
_END_TO_END_PLAIN = _END_TO_END | {"cls_attention_sum", "kept_indices"}
_END_TO_END_TILES = _END_TO_END | {
    "bottom_cls_attention_sum", "image_sizes", "num_visual_tokens", "tokens_per_patch",
    "top_cls_attention_sum",
}  # fmt: skip
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    tensors, params = file.tensors, file.params
    weights = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    keys, tiled = tensors.keys() - weights.keys(), "tokens_per_patch" in tensors
    rate, alpha = float(params["token_budget_rate"]), params.get("alpha", 0.5)
    pruner = pore.HiRED(keep=rate, alpha=alpha, faithful=True)
    if weights:
        expected = _END_TO_END_TILES if tiled else _END_TO_END_PLAIN
        assert keys == expected, keys ^ expected
        return _check_end_to_end(file, pruner, weights)
    assert keys == (_TILES if tiled else _PLAIN), keys
    if tiled:
        heads = [tensors[f"{name}_cls_attention_heads"] for name in ("top", "bottom")]
        tilings = tuple(_tiling(params, size) for size in tensors["image_sizes"].tolist())
        assert [t.tiles for t in tilings] == tensors["num_patches"].tolist()
        assert params["image_sizes"] == tensors["image_sizes"].tolist()
    else:
        heads, tilings = [tensors["cls_attention_heads"][None]] * 2, None
    attention = torch.stack(heads)
    assert attention.shape[2:] == (params["heads"], params["num_vision_tokens"])
    features = torch.randn(*attention[0, :, 0].shape, 2)
    selection = pruner._select(tower_view(features, attention, tilings=tilings))
    _check_choice(tensors, selection)
    return 0.0


def _check_choice(tensors: dict[str, Tensor], selection: TowerSelection) -> None:
    valid = selection.valid
    if valid is None:
        valid = torch.ones_like(selection.raster, dtype=torch.bool)
    mask = tensors["mask"].view(len(valid), -1)
    got = torch.zeros_like(mask, dtype=torch.bool)
    for row, raster, stays in zip(got, selection.raster, valid, strict=True):
        row[raster[stays]] = True
    assert torch.equal(got, mask.bool())
    if "tokens_per_patch" in tensors:
        assert valid.sum(1).tolist() == tensors["tokens_per_patch"].tolist()
        assert not selection.structure
    else:
        assert torch.equal(selection.raster[0], tensors["kept_indices"])


def _tiling(params: dict[str, Any], size: list[int]) -> Tiling:
    """An image's tiles, padding and all."""
    best = select_best_resolution(size, params["image_grid_pinpoints"])
    rows, columns = (side // params["image_size"] for side in best)
    tiles, patches = rows * columns + 1, params["num_vision_tokens"]
    return Tiling(tiles, (rows, columns), patches, tuple(range(tiles * patches)))


def _check_end_to_end(file: Any, pruner: pore.HiRED, weights: dict[str, Tensor]) -> float:
    tensors = file.tensors
    model = _model(file.config, weights)
    size = None
    if "image_sizes" in tensors:
        (size,) = tensors["image_sizes"].tolist()
        assert size == file.params["image_size"]
    inputs = inputs_of(model, tensors, file.config["image_token_index"], size)
    assert tensors["attention_mask"].all()
    recording = Recording(pruner)
    with torch.no_grad(), recording(model) as run:
        logits = model(**inputs).logits
    ((_, view, selection),) = recording.seen
    _check_choice(tensors, selection)
    sums = view.cls_attention.sum(2)
    if size is None:
        torch.testing.assert_close(sums[1, 0], tensors["cls_attention_sum"], **_CLOSE)
    else:
        torch.testing.assert_close(sums[0], tensors["top_cls_attention_sum"], **_CLOSE)
        torch.testing.assert_close(sums[1], tensors["bottom_cls_attention_sum"], **_CLOSE)
        (image,) = run.report.samples[0].images
        assert len(image.kept) == int(tensors["num_visual_tokens"])
    torch.testing.assert_close(logits, tensors["logits"], **_CLOSE)
    return float((logits - tensors["logits"]).abs().max())


def _model(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The file's model; weights go by the names of checkpoints on the hub."""
    common = {
        "text_config": LlamaConfig(**config["text"]),
        "vision_config": CLIPVisionConfig(**config["vision"]),
        "image_token_index": config["image_token_index"],
        "projector_hidden_act": config["projector_hidden_act"],
        "vision_feature_layer": config["vision_feature_layer"],
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    if config["image_grid_pinpoints"] is None:
        kind: Any = LlavaForConditionalGeneration
        model = kind._from_config(LlavaConfig(**common), dtype=torch.float32)
    else:
        kind = LlavaNextForConditionalGeneration
        pinpoints = {"image_grid_pinpoints": config["image_grid_pinpoints"]}
        model = kind._from_config(LlavaNextConfig(**common, **pinpoints), dtype=torch.float32)

    def part(prefix: str) -> dict[str, Tensor]:
        prefix = f"weights.{prefix}."
        return {k.removeprefix(prefix): weights.pop(k) for k in [*weights] if k.startswith(prefix)}

    load_tower(model, part("vision_tower"))
    model.model.multi_modal_projector.load_state_dict(part("multi_modal_projector"))
    model.lm_head.load_state_dict(part("language_model.lm_head"))
    model.model.language_model.load_state_dict(part("language_model.model"))
    if "weights.image_newline" in weights:
        model.model.image_newline.data = weights.pop("weights.image_newline")
    assert not weights, sorted(weights)
    return model.eval()
