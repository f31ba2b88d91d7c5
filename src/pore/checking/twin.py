"""A tiny random twin of a model, made only from its config."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from pore._compat.attention import attention_name
from pore._compat.making import experts_name, from_config, seeded
from pore.checking.shrinking import VOCABULARY, shrink
from pore.data.loading import check_dtype, choose_device, known_config, resolve
from pore.errors import InputError
from pore.families.base import Family
from pore.families.registry import family_of_config


def twin_of(config: Any) -> tuple[Any, Family]:
    """The config of a twin and its family; see `shrink`."""
    family = family_of_config(config, type(config).__name__)
    return shrink(config, family), family


def build(config: Any, kind: Any, dtype: torch.dtype, like: Any) -> Any:
    """A model with random weights, on the CPU; the states of torch's generators are left alone.

    Args:
        config: Its config, see `shrink`.
        kind: The class of the model.
        dtype: Type of its weights.
        like: The config of the full model, whose attention kernels it gets.

    Returns:
        The model, in evaluation mode.
    """
    parts = {"": like, **{name: getattr(like, name, None) for name in like.sub_configs}}
    kernels = {name: attention_name(part) for name, part in parts.items() if part is not None}
    with seeded(), torch.device("cpu"):
        # Grouped matrix products do not support float64.
        experts = "eager" if dtype == torch.float64 else experts_name(like)
        model = from_config(kind, config, dtype, {k: v for k, v in kernels.items() if v}, experts)
        for weight in model.parameters():
            if weight.dim() > 1:
                # Scaled by the number of inputs, whatever the initialiser, so that attention is
                # sharp and no table is zero.
                fan_in = weight[0].numel() if weight.dim() != 3 else weight.shape[1]
                embeds = weight.shape[0] == VOCABULARY
                nn.init.normal_(weight, std=1.0 if embeds else 1.5 / math.sqrt(fan_in))
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id = 0, None
    return model.eval()


def load_twin(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn: str | None = None,
    revision: str | None = None,
) -> Any:
    """A tiny random model with the classes of a checkpoint, of which only the config is read.

    Args:
        name: Hub id, folder or "embedded".
        device: As in `pore.data.loading.load_model`, and so are `dtype` and `attn`.
        dtype: One of `pore.data.loading.DTYPES`.
        attn: Attention implementation; None leaves the choice to transformers.
        revision: Branch, tag or commit on the hub.

    Returns:
        The model, in evaluation mode on the device.

    Raises:
        UnsupportedModelError: pore does not know the model's family, or can make no twin.
        InputError: There is no such device or number format, or transformers cannot make the model
            as asked.
        OSError: There is no such model.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig

    check_dtype(dtype)
    target = choose_device(device)
    config = known_config(name, revision)
    tiny, _ = twin_of(config)
    if dtype != "auto":
        kind = getattr(torch, dtype)
    else:
        kind = torch.float32 if target.type == "cpu" else config.dtype or torch.float32
    try:
        with seeded():
            model = AutoModelForImageTextToText.from_config(
                tiny, dtype=kind, attn_implementation=attn
            ).to(target)
    except (ImportError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"transformers cannot make {name!r} as asked: {error}") from error
    with suppress(OSError):  # a checkpoint need not say how to generate
        said = GenerationConfig.from_pretrained(resolve(name), revision=revision)
        model.generation_config.cache_implementation = said.cache_implementation
    return model.eval()
