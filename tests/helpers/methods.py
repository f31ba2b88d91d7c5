"""The methods that tests go through, and prompts for them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from helpers.engine import _flash
from helpers.models import IMAGE, tiny_llava
from pore._compat.attention import ADDING
from pore.engine.pruner import Pruner
from pore.engine.stages import Stage
from pore.families.registry import shape_of

KEEP = 6


LAYERS = 8


@cache
def model_of(attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """One model under every attention implementation."""
    model = tiny_llava(layers=LAYERS, tower_layers=4)
    if attention == "flash_test":
        ALL_ATTENTION_FUNCTIONS.register("flash_test", _flash)
        ALL_MASK_ATTENTION_FUNCTIONS.register("flash_test", flash_attention_mask)
    model.model.language_model.config._attn_implementation_internal = attention
    return model


def usual(name: str, keep: int | float) -> Pruner:
    made = pore.methods()[name].usual(keep, shape_of(model_of().config))
    assert made is not None
    return made


def under(attention: str, pruner: Pruner) -> Pruner:
    """A method as a kernel takes it: only SDPA and eager attention count tokens by their sizes."""
    counts = any(isinstance(stage, Stage) and stage.proportional for stage in pruner.stages())
    if counts and attention not in ADDING:
        return replace(pruner, proportional=False)  # type: ignore[type-var,call-arg]
    return pruner


# Only the built-in ones: other tests register their own methods.
EVERY = [
    name
    for name, kind in sorted(pore.methods().items())
    if kind.__module__.startswith("pore.")
    and not kind.resizes
    and kind.usual(KEEP, shape_of(model_of().config)) is not None
]


DRAWING = {name for name in EVERY if pore.methods()[name].draws}


# Methods that give kept tokens new states, on the embeddings or in the decoder.
MERGING = {
    name
    for name in EVERY
    if any(isinstance(stage, Stage) and stage.merges for stage in usual(name, KEEP).stages())
}


def asked(name: str, prompts: list[list[int]]) -> list[list[int]]:
    """The prompts of a test for a method. If a single token follows the image, PriorTR gets one
    more, because it compares the question with a token before it."""
    if name != "PriorTR":
        return prompts
    return [[*ids[:-1], 5, ids[-1]] if ids[-2] == IMAGE else ids for ids in prompts]


def in_decoder(pruner: Pruner) -> bool:
    """Whether a method only drops tokens, which keep their positions."""
    return all(
        isinstance(stage, Stage) and not stage.dense and not stage.merges
        for stage in pruner.stages()
    )


def ends(logits: Tensor, mask: Tensor, tokens: list[int]) -> list[Tensor]:
    """The logits of the last tokens of every sample, whatever the side of the padding."""
    right = not bool(mask[:, -1].all())
    rows = zip(logits, tokens, strict=True)
    return [row[:n] if right else row[len(row) - n :] for row, n in rows]
