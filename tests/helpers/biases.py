"""Helpers of tests of the position bias."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from pore.bias.provenance import Provenance

quick = settings(max_examples=40)

fitted_kinds = st.sampled_from(["exponential", "exponential+offset", "spline", "empirical"])

PROVENANCE = Provenance(
    model="llava-hf/llava-1.5-7b-hf",
    revision="8c85e9a",
    layer=2,
    normalize="prompt",
    processor={"do_pad": False, "size": (336, 336)},
    template="USER: <image>\n{question} ASSISTANT:",
    samples=1000,
    date="2026-01-31",
    host="fastv",
    source="gqa",
)


def noisy(rate: float, n: int, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """An exponential with a mean attention of about 1e-3 and relative noise."""
    curve = 1e-3 * torch.exp(rate * torch.arange(n, dtype=torch.float64))
    wobble = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return curve * (1 + noise * wobble).clamp(0.1)
