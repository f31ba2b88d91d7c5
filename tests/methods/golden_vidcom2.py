"""Golden files of VidCom2: the repository's counts, and those of the version for vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from helpers.golden_models import Worst
from helpers.videos import video_view
from pore.methods.vidcom2 import calm_channels, frame_counts, frame_shares, redundancy

_SCORES = {"frame_score", "video_score"}
_KEYS = {"features", "kept_indices", "per_frame", "scales"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    tensors: dict[str, Tensor] = file.tensors
    params, worst = file.params, Worst()
    frames, height, width = params["T"], params["grid_h"], params["grid_w"]
    features = tensors["features"].view(frames, height * width, -1)
    exact = "q" in params
    extra = {"count", "per_frame_before"} | _SCORES if exact else {"tokens"}
    if not exact:
        newline = "newline" in tensors
        extra |= (
            {"kept_indices_with_newlines", "newline"} if newline else {"low_var_channels", *_SCORES}
        )
    assert tensors.keys() == _KEYS | extra, tensors.keys() ^ (_KEYS | extra)

    keep = 1 - params["q"] if exact else params["base_scale"]
    (stage,) = pore.VidCom2(keep, counted="vllm" if exact else "repository").stages()
    mask = stage.rule(video_view([features])).keep[0].view(frames, -1)
    kept = mask.flatten().nonzero()[:, 0]
    assert torch.equal(kept, tensors["kept_indices"])
    assert torch.equal(mask.sum(1), tensors["per_frame"])
    of_video, of_frame = redundancy(features)
    if "video_score" in tensors:
        worst.compare(of_video, tensors["video_score"])
        worst.compare(of_frame, tensors["frame_score"])
    worst.compare(frame_shares(of_video, keep), tensors["scales"])
    if exact:
        assert len(kept) == int(tensors["count"])
        assert torch.equal(frame_counts(of_video, keep), tensors["per_frame_before"])
    if "low_var_channels" in tensors:
        assert torch.equal(calm_channels(features), tensors["low_var_channels"])
    if "newline" in tensors:
        return _check_newlines(file, mask, worst)
    if "tokens" in tensors:
        assert torch.equal(features.flatten(0, 1)[kept], tensors["tokens"])
    return worst.value


def _check_newlines(file: Any, mask: Tensor, worst: Worst) -> float:
    """LLaVA-Video has a newline after every row; of a frame they all come after what is kept."""
    height, width = file.params["grid_h"], file.params["grid_w"]
    order = []
    for frame, row in enumerate(mask):
        places = row.nonzero()[:, 0]
        start = frame * height * (width + 1)
        order += [start + int(p) // width * (width + 1) + int(p) % width for p in places]
        order += [start + line * (width + 1) + width for line in range(height)]
    assert order == file.tensors["kept_indices_with_newlines"].tolist()
    features = file.tensors["features"].view(-1, width, file.params["channels"])
    rows = file.tensors["newline"].expand(len(features), 1, -1)
    assert torch.equal(torch.cat([features, rows], 1).flatten(0, 1)[order], file.tensors["tokens"])
    return worst.value
