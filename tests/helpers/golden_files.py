"""Golden files that are not at hand: other parameters, roundings and ends of the authors' code.

A test makes each by a reference of its own, token by token and in plain arithmetic, from what the
specifications say; the checker of the method then takes it as one of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Made:
    """What a golden file holds."""

    params: dict[str, Any]
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
