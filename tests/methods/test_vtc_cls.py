"""VTC-CLS: the checker of golden files, on files made here."""

from __future__ import annotations

import pytest
import torch

from helpers.golden_files import Made, draw
from methods import golden_vtc_cls


def vtc_cls_file(layers: int, start: int | None, keep: int) -> Made:
    patches = 36
    heads, features = draw(layers, layers, 3, patches).softmax(-1), draw(1, 1, patches, 5)
    first = 0 if start is None else start if start >= 0 else layers + start
    total = sum(heads[layer].mean(0) for layer in range(first, layers - 1))
    order = sorted(range(patches), key=lambda t: -float(total[t]))[:keep]
    kept = sorted(order)
    return Made(
        {"token_num": keep, "start_layer": start, "num_layers": layers, "num_patches": patches},
        {
            "cls_attention_heads": heads,
            "cls_attn_sum": total,
            "image_features": features,
            "kept_indices": torch.tensor(kept),
            "topk_indices": torch.tensor(order),
            "visual_features": features[:, kept],
        },
    )


@pytest.mark.parametrize("start", [-6, -3, -2, 0, 4, None])
@pytest.mark.parametrize("keep", [2, 35])
def test_vtc_cls(start: int | None, keep: int) -> None:
    golden_vtc_cls.check(vtc_cls_file(6, start, keep))
