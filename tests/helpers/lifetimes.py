"""Methods of every kind, and a tiny model to copy, share and delete."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
import pore.engine.calls
from helpers.engine import _flash
from helpers.models import batch, prompt, tiny_llava
from pore.engine.pruner import Pruner

# On the embeddings, in the decoder, looking ahead, in several layers, in the tower, merging in it.
KINDS: list[Pruner] = [
    pore.DivPrune(keep=4),
    pore.FastV(keep=4, layer=1),
    pore.DART(keep=4, layer=1),
    pore.PyramidDrop(keep=4, layers=(1, 2)),
    pore.VisionZip(keep=4),
    pore.ToMe(keep=4),
]


kinds = pytest.mark.parametrize("pruner", KINDS, ids=[pruner.name for pruner in KINDS])


def model_of(attention: str = "sdpa", called: bool = True) -> Any:
    """A model after its first call, at which transformers adds its own hooks."""
    made = tiny_llava(layers=3, tower_layers=3, dtype=torch.float32)
    if attention != "sdpa":
        ALL_ATTENTION_FUNCTIONS.register("flash_test", _flash)
        ALL_MASK_ATTENTION_FUNCTIONS.register("flash_test", flash_attention_mask)
        made.model.language_model.config._attn_implementation_internal = attention
    if called:
        logits(made)
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch([prompt(3, 1, 5)], dtype=torch.float32)).logits
    return found


def generated(model: Any, **settings: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        **batch([prompt(3, 1, 5)], dtype=torch.float32), max_new_tokens=8, **settings
    )
    return found
