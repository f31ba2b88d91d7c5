"""Golden files of VTC-CLS."""

from __future__ import annotations

from typing import Any

import pore
from methods.golden_fastervlm import check_end_to_end, check_selection

_SELECTION = {
    "cls_attention_heads", "cls_attn_sum", "image_features", "kept_indices", "topk_indices",
    "visual_features",
}  # fmt: skip
_END_TO_END = (_SELECTION - {"cls_attention_heads", "image_features"}) | {"pixel_values"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    tensors, params = file.tensors, file.params
    start = params["start_layer"] or 0  # the authors' None is all layers
    pruner = pore.VTCCLS(keep=params["token_num"], start_layer=start)
    weights = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    if weights:
        assert tensors.keys() - weights.keys() == _END_TO_END
        return check_end_to_end(file, pruner, weights)
    assert tensors.keys() == _SELECTION, tensors.keys() ^ _SELECTION
    # Layers of the file: all of the tower. The last is after the one that the projector reads.
    attention = tensors["cls_attention_heads"][start:-1, None]
    return check_selection(pruner, tensors, attention)
