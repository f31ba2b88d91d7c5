"""Stand-ins for golden files that we lack: other parameters, roundings and ends of their code.

A test computes each with its own reference, token by token and in plain arithmetic, from the
specification; the checker of the method then reads it like a file of the authors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Made:
    """The contents of a golden file."""

    params: dict[str, Any]
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
