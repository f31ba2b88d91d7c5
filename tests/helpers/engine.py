"""Prompts, kernels and comparisons for tests of the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from helpers.models import IMAGE, N, prompt

BATCHES = {
    "single": [prompt(3, 1, 5)],
    "ragged text": [prompt(3, 1, 5), prompt(7, 1, 2, 1)],
    "several images": [prompt(3, 1, 5), prompt(2, 3, 4, 1)],
    "no image in one row": [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 1, 2)],
}


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """A CPU kernel like FlashAttention: a 2-D mask or none, causal, aligned at the end."""
    assert mask is None or mask.dim() == 2
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, n = query.shape[2], key.shape[2]
    seen = torch.ones(q, n, dtype=torch.bool).tril(n - q)[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None, :n].bool()
    logits = (query @ key.transpose(2, 3)) * kwargs["scaling"]
    weights = logits.masked_fill(~seen, -1e30).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def tolerance(attention: str, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Tolerances: eager attention takes its softmax in float32, everything else is in `dtype`."""
    error = 2e-5 if attention == "eager" else 1e-9 if dtype == torch.float64 else 2e-6
    return {"rtol": error, "atol": error}


def is_of_transformers(hook: Any) -> bool:
    """Whether a hook is one that transformers itself adds at a model's first call."""
    return str(hook.__module__).startswith("transformers.")


def fingerprint(model: torch.nn.Module) -> tuple[Any, ...]:
    """Everything in a model in which a hook could leave something."""
    modules = [
        (
            name,
            type(module),
            sorted(k for k, v in vars(module).items() if not k.startswith("_") or callable(v)),
            len(module._forward_pre_hooks),
            sum(not is_of_transformers(hook) for hook in module._forward_hooks.values()),
            len(module._forward_hooks_always_called),
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    ]
    return (
        modules,
        model.config.to_json_string(),
        sorted(ALL_ATTENTION_FUNCTIONS.keys()),
        sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys()),
    )


def _forward_text(model: Any, inputs: dict[str, Tensor], prompt_width: int) -> Tensor:
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    where = ids == IMAGE
    where[:, prompt_width:] = False
    embeds[where] = features
    return model(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
        use_cache=False,
    ).logits


K = 2


P = pore.PositionBias.exponential(0.1, N)


METHODS = [
    pytest.param(pore.FastV(keep=5, layer=K), id="fastv"),
    pytest.param(pore.FastV(keep=5, layer=K, normalize="visual"), id="fastv-visual"),
    pytest.param(pore.FastV(keep=0.25, layer=K, reweight=P), id="pore"),
    pytest.param(pore.FastV(keep=3, layer=1), id="fastv-k1"),
    pytest.param(pore.Random(keep=5, layer=K, seed=3), id="random"),
]


def logits_at_end(logits: Tensor, mask: Tensor, tokens: list[int]) -> list[Tensor]:
    """For each sample, the logits of its last tokens, whatever the padding side."""
    right = not bool(mask[:, -1].all())
    return [
        row[:n] if right else row[len(row) - n :] for row, n in zip(logits, tokens, strict=True)
    ]


# Methods whose decoder never sees what they drop, so that positions are numbered anew.
WITHOUT_DROPPED = [
    pore.Downsample(keep=4),
    pore.DivPrune(keep=5),
    pore.FasterVLM(keep=5),
    pore.VTCCLS(keep=5, start_layer=0),
]
