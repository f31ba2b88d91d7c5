"""Golden files of FastVID: three codes of the authors, and what they read of two towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

import pore
from helpers.golden_models import Worst
from pore.families.tower_parts import pooled
from pore.methods._merging_videos import Frames
from pore.methods._segments import segments
from pore.tensors.attention import mean_attention

_PARAMS = {
    "DTM_beta", "DTM_p", "DySeg_c", "DySeg_ignore", "DySeg_tau", "STPrune_d", "T", "channels",
    "feature_dim", "grid_h", "grid_w", "retention_ratio", "scenes", "seed", "variant",
}  # fmt: skip
_SELECTION = {
    "features", "frame_attention", "frame_features", "kept_indices", "segment_sizes", "tokens",
}  # fmt: skip
_VARIANTS = {"ov": "onevision", "lv": "llava-video", "qw": "qwen"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    variant = file.params["variant"]
    if variant == "qw_attention":
        return _check_mean_query(file)
    if variant == "siglip_head":
        return _check_head(file)
    return _check_selection(file)


def _check_selection(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    assert params.keys() == _PARAMS, params.keys() ^ _PARAMS
    variant, size = params["variant"], params["grid_h"] * params["grid_w"]
    newlines = variant == "lv"
    assert tensors.keys() == _SELECTION | ({"newline"} if newlines else set())
    extra = {} if params["DySeg_ignore"] is None else {"still": params["DySeg_ignore"]}
    method = pore.FastVID(
        params["retention_ratio"],
        segments=params["DySeg_c"],
        tau=params["DySeg_tau"],
        context=params["STPrune_d"],
        spacing=params["DTM_p"],
        beta=params["DTM_beta"],
        variant=_VARIANTS[variant],
        faithful=True,
        **extra,
    )
    features = tensors["features"]
    assert features.shape == (params["T"], size, params["channels"])
    parts = segments(tensors["frame_features"], method.tau, method.segments)
    assert list(map(len, parts)) == tensors["segment_sizes"].tolist()
    made = method.merge(Frames(features, tensors["frame_attention"], tensors["frame_features"]))
    index, tokens = made.index, made.tokens
    if newlines:
        index, tokens = _with_newlines(index, tokens, tensors["newline"], params["grid_w"])
    assert torch.equal(index, tensors["kept_indices"])
    worst.compare(tokens, tensors["tokens"])
    return worst.value


def _with_newlines(
    index: Tensor, tokens: Tensor, newline: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """With the newline of every row of which something is kept, as LLaVA-Video has it."""
    row = index // width
    ends = row.unique() * (width + 1) + width
    index = torch.cat([row * (width + 1) + index % width, ends])
    tokens = torch.cat([tokens, newline.expand(len(ends), -1)])
    order = index.argsort()
    return index[order], tokens[order]


def _check_mean_query(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    known = {"T", "grid_h", "grid_w", "head_dim", "heads", "seed", "variant"}
    assert params.keys() == known, params.keys() ^ known
    assert tensors.keys() == {"frame_attention", "keys", "queries"}
    shape = (params["T"], -1, params["heads"], params["head_dim"])
    queries, keys = (tensors[name].view(shape).transpose(1, 2) for name in ("queries", "keys"))
    tokens = keys.unflatten(2, (-1, 4)).mean(3)
    attention = mean_attention(queries, tokens, params["head_dim"] ** -0.5).mean(1)
    worst.compare(attention, tensors["frame_attention"])
    return worst.value


def _check_head(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    known = {"T", "channels", "heads", "intermediate", "patches", "seed", "variant"}
    assert params.keys() == known, params.keys() ^ known
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if "weights." in k}
    expected = {"frame_attention", "frame_features", "hidden_states"}
    assert tensors.keys() - {f"weights.{name}" for name in weights} == expected
    config = SiglipVisionConfig(
        hidden_size=params["channels"],
        intermediate_size=params["intermediate"],
        num_attention_heads=params["heads"],
        num_hidden_layers=1,
    )
    tower = SiglipVisionModel(config).eval()
    tower = getattr(tower, "vision_model", tower)
    tower.load_state_dict({**tower.state_dict(), **weights})
    with torch.no_grad():
        found, attention = pooled(tower.post_layernorm, tower.head, tensors["hidden_states"])
    worst.compare(found, tensors["frame_features"])
    worst.compare(attention, tensors["frame_attention"])
    return worst.value
