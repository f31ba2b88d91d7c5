"""Helpers of tests: what several of them use."""

from __future__ import annotations

from typing import Any


def sdpa_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Scores and output over the full square, as PyTorch counts SDPA on other devices.

    `torch.utils.flop_counter` knows no formula for the fused kernel on CPUs and counts it as 0.
    """
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])
