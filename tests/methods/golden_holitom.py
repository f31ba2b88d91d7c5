"""Golden files of HoliTom: windows and merged tokens, and the merge inside the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from helpers.golden_models import Worst
from helpers.videos import decoder_view
from pore.methods._merging_videos import Frames
from pore.methods.holitom import place_similarity, still_windows

_SELECTION = {
    "attention", "features", "newline", "reduced", "retain_ratio_after", "similarity",
    "static_counts", "tokens", "windows",
}  # fmt: skip
_PARAMS = {
    "Beta", "D", "K", "T", "channels", "grid_h", "grid_w", "max_window_size", "newline_position",
    "no_beta", "retain_ratio", "scenes", "seed", "tau",
}  # fmt: skip
_INSIDE = {
    "HOLITOM_r", "channels", "heads", "image_start", "image_tokens", "kept", "seed", "text_after",
}  # fmt: skip


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    return _check_inside(file) if "HOLITOM_r" in file.params else _check_selection(file)


def _check_selection(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    assert params.keys() == _PARAMS, params.keys() ^ _PARAMS
    assert tensors.keys() == _SELECTION, tensors.keys() ^ _SELECTION
    assert params["D"] == 0, "their code cannot run with another"
    method = pore.HoliTom(
        params["retain_ratio"],
        tau=params["tau"],
        beta=None if params["no_beta"] else params["Beta"],
        neighbours=params["K"],
        longest=params["max_window_size"],
        faithful=True,
    )
    features = tensors["features"]
    similarity = place_similarity(features)
    worst.compare(similarity, tensors["similarity"])
    windows = still_windows(similarity > method.tau, method.longest)
    assert [[w[0], w[-1]] for w in windows.frames] == tensors["windows"].tolist()
    assert windows.still.sum(1).tolist() == tensors["static_counts"].tolist()
    repeats = torch.tensor([len(window) - 1 for window in windows.frames])
    reduced = int((windows.still.sum(1) * repeats).sum())
    assert reduced == float(tensors["reduced"])
    left = features.shape[0] * features.shape[1] - reduced
    share = min(params["retain_ratio"] / (left / features[..., 0].numel()), 1)
    worst.compare(torch.tensor(float(share)), tensors["retain_ratio_after"].float())
    made = method.merge(Frames(features, tensors["attention"]))
    tokens = made.tokens
    if params["newline_position"] == "grid":
        tokens = _in_rows(made.index, tokens, tensors["newline"], params["grid_w"])
    worst.compare(tokens, tensors["tokens"])
    return worst.value


def _in_rows(index: Tensor, tokens: Tensor, newline: Tensor, width: int) -> Tensor:
    """In raster order, with a newline after every row of which something is left."""
    row = index // width
    index = torch.cat([index + row, row.unique() * (width + 1) + width])
    tokens = torch.cat([tokens, newline.expand(len(index) - len(row), -1)])
    return tokens[index.argsort()]


def _check_inside(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    assert params.keys() == _INSIDE, params.keys() ^ _INSIDE
    assert tensors.keys() == {
        "attention_last", "hidden_states", "keep_indices", "merged_hidden_states", "position_ids",
    }  # fmt: skip
    start, count = params["image_start"], params["image_tokens"]
    method = pore.HoliTom(0.5, layer=1, inner=1 - params["HOLITOM_r"])
    assert method.left(count) == params["kept"]
    view = decoder_view(tensors["hidden_states"], tensors["attention_last"], start, count)
    made = method.stages()[1].rule(view)
    kept = view.layout.kept_tokens(made.keep)[0]
    assert torch.equal(kept.nonzero()[:, 0], tensors["keep_indices"])
    assert torch.equal(tensors["position_ids"][0], tensors["keep_indices"])  # as pore has them
    states = tensors["hidden_states"][0].clone()
    assert made.features is not None
    states[start : start + count] = made.features[0]
    worst.compare(states[kept], tensors["merged_hidden_states"][0])
    return worst.value
