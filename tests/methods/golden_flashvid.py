"""Golden files of FlashVID: segments, chosen tokens and trees, and the step inside the decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import pore
from helpers.golden_models import Worst
from helpers.videos import decoder_view
from pore.methods._merging_videos import Frames
from pore.methods._segments import segments
from pore.methods.flashvid import diverse

_SELECTION = {
    "attention", "features", "kept_indices", "num_merged_per_frame", "num_selected_per_frame",
    "segment_lengths", "selected_indices", "tokens",
}  # fmt: skip
_PARAMS = {
    "T", "alpha", "channels", "complementary_segment", "do_segment", "expansion", "grid_h",
    "grid_w", "min_segment_num", "retention_ratio", "scenes", "seed", "segment_threshold",
    "temporal_threshold", "token_selection_method",
}  # fmt: skip
_INSIDE = {
    "channels", "heads", "kept", "llm_retention_ratio", "seed", "text_after", "visual_start",
    "visual_tokens",
}  # fmt: skip


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    inside = "llm_retention_ratio" in file.params
    return _check_inside(file) if inside else _check_selection(file)


def _check_selection(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    assert params.keys() == _PARAMS, params.keys() ^ _PARAMS
    assert tensors.keys() == _SELECTION, tensors.keys() ^ _SELECTION
    features, attention = tensors["features"], tensors["attention"]
    count = math.ceil(features.shape[1] * params["retention_ratio"] * params["expansion"])
    more = params["do_segment"] and params["complementary_segment"]
    method = pore.FlashVID(
        count,
        alpha=params["alpha"],
        selecting=params["token_selection_method"],
        merge_above=params["temporal_threshold"],
        cut_below=params["segment_threshold"] if params["do_segment"] else -2.0,
        segments=params["min_segment_num"] if more else 1,
        faithful=True,
    )
    parts = segments(features.mean(1), method.cut_below, method.segments)
    assert list(map(len, parts)) == [n for n in tensors["segment_lengths"].tolist() if n]
    as_is = math.ceil(count * method.alpha)
    assert as_is == int(tensors["num_selected_per_frame"])
    assert count - as_is == int(tensors["num_merged_per_frame"])
    chosen = []
    for part in parts:
        inside = slice(part.start, part.stop)
        video = Frames(features[inside], attention[inside])
        chosen += diverse(video, [as_is] * len(part), method.selecting, faithful=True)
    assert torch.equal(torch.stack(chosen), tensors["selected_indices"])
    made = method.merge(Frames(features, attention))
    assert torch.equal(made.index, tensors["kept_indices"])
    got, expected = (_in_order(made.index, x) for x in (made.tokens, tensors["tokens"]))
    worst.compare(got, expected)
    return worst.value


def _in_order(index: Tensor, tokens: Tensor) -> Tensor:
    """Tokens with those of equal index by their first channel: theirs is a sort that is not stable,
    and may give out one that stands for itself and a mean at its place either way."""
    order = tokens[:, 0].argsort(stable=True)
    return tokens[order[index[order].argsort(stable=True)]]


def _check_inside(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    assert params.keys() == _INSIDE, params.keys() ^ _INSIDE
    assert tensors.keys() == {
        "attention_last", "hidden_states", "keep_indices", "position_ids", "pruned_hidden_states",
    }  # fmt: skip
    start, count = params["visual_start"], params["visual_tokens"]
    method = pore.FlashVID(0.5, layer=1, inner=params["llm_retention_ratio"])
    assert method.left(count) == params["kept"]
    view = decoder_view(tensors["hidden_states"], tensors["attention_last"], start, count)
    made = method.stages()[1].rule(view)
    kept = view.layout.kept_tokens(made.keep)[0]
    assert torch.equal(kept.nonzero()[:, 0], tensors["keep_indices"])
    for axis in tensors["position_ids"]:  # gathered, as pore does
        assert torch.equal(axis[0], tensors["keep_indices"])
    worst.compare(tensors["hidden_states"][0, kept], tensors["pruned_hidden_states"][0])
    return worst.value
