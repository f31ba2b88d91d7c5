"""Helpers of the tests of benchmarks."""

from __future__ import annotations

from typing import Any

import pore
from helpers.models import N

LAYERS, K, KEEP = 5, 2, 6
BEFORE, AFTER = 3, 4
PROMPT = BEFORE + N + AFTER
SHORT = BEFORE + KEEP + AFTER
FASTV = pore.FastV(keep=KEEP, layer=K)
QUICK: dict[str, Any] = {
    "text_before": BEFORE,
    "text_after": AFTER,
    "new_tokens": 3,
    "repeats": 2,
    "warmup": 1,
}


def untouched(model: Any) -> bool:
    """Whether no hook is left; transformers itself hooks the layers of the vision tower."""
    decoder = model.model.language_model
    attention = [layer.self_attn for layer in decoder.layers]
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in (model, model.model, decoder, *decoder.layers, *attention)
    )
