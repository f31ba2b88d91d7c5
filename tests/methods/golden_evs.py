"""Golden files of EVS: choices, and the positions that kept tokens have in Qwen2.5-VL.

Positions are those that Qwen2.5-VL gives a whole video, written out here, and gathered as pore
gathers them. Those of text after the video (`mrope_offset`, `rope_delta`) are vLLM's alone: pore
keeps what transformers gave, which is more where a video is higher than wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from helpers.golden_models import Worst
from helpers.videos import video_view
from pore.methods.evs import dissimilarity

_SELECTION = {
    "count", "dissimilarity", "features", "kept_indices", "mrope", "mrope_offset", "per_frame",
    "retention_mask", "tokens",
}  # fmt: skip
_POSITIONS = {"features", "input_ids", "kept_indices", "position_ids", "rope_delta"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    tensors: dict[str, Tensor] = file.tensors
    params, worst = file.params, Worst()
    frames, height, width = params["T"], params["grid_h"], params["grid_w"]
    features = tensors["features"].view(frames, height * width, -1)
    method = pore.EVS(1 - params["q"], faithful=True)
    (stage,) = method.stages()
    kept = stage.rule(video_view([features])).keep[0].nonzero()[:, 0]
    assert torch.equal(kept, tensors["kept_indices"])
    exact = pore.EVS(len(kept)).stages()[0].rule(video_view([features])).keep[0].nonzero()[:, 0]
    assert torch.equal(exact, kept)
    # Positions in the video as Qwen2.5-VL gives them out; pore gathers those of kept tokens.
    seconds = params["tokens_per_second"] * int(params["second_per_grid"])
    at = torch.stack(
        [(kept // (height * width) * seconds).long(), kept // width % height, kept % width]
    )
    if tensors.keys() == _POSITIONS:
        visual = tensors["input_ids"] == params["video_token_id"]
        base = int((tensors["input_ids"] == params["vision_start"]).nonzero()[0]) + 1
        assert torch.equal(tensors["position_ids"][:, visual], base + at)
        return worst.value
    assert tensors.keys() == _SELECTION, tensors.keys() ^ _SELECTION
    assert len(kept) == int(tensors["count"])
    assert torch.equal(at.T, tensors["mrope"].long())
    flat = features.flatten(0, 1)
    assert torch.equal(flat[kept], tensors["tokens"])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[kept] = True
    assert torch.equal(mask, tensors["retention_mask"].bool())
    assert torch.equal(mask.view(frames, -1).sum(1), tensors["per_frame"])
    worst.compare(dissimilarity(features), tensors["dissimilarity"])
    return worst.value
