"""Configs of real models, by their classes, and tiny models of the same classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from pore.checking.twin import build, twin_of


def stand_in(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A model of a config's classes, small enough to be built."""
    kind = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    return build(twin_of(config)[0], kind, dtype, config)
