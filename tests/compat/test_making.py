"""Models are made from a config alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from helpers.models import tiny_llava
from pore._compat.attention import attention_name
from pore._compat.making import experts_name, from_config, random_model, seeded


def test_models_are_built_without_initialising(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PreTrainedModel._from_config`, `transformers.initialization.no_init_weights`."""
    config = tiny_llava().config
    calls = []
    monkeypatch.setattr(nn.init, "normal_", lambda *args, **_: calls.append(args))
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda *args, **_: calls.append(args))
    made = random_model(LlavaForConditionalGeneration, config, torch.bfloat16, "eager")
    assert not calls
    assert made.dtype == torch.bfloat16
    assert attention_name(made.model.language_model.config) == "eager"


def test_models_are_built_from_a_config_in_parts() -> None:
    """`_from_config` takes a kernel for every part, and what multiplies experts."""
    config = tiny_llava().config
    kernels = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    made = from_config(LlavaForConditionalGeneration, config, torch.bfloat16, kernels, "eager")
    assert made.dtype == torch.bfloat16
    assert attention_name(made.config.text_config) == "eager"
    assert attention_name(made.config.vision_config) == "sdpa"
    assert experts_name(made.config) == "eager"


def test_chance_is_put_back() -> None:
    """`torch.default_generator` is what `torch.randn` draws from on a CPU."""
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded():
            drawn.append(torch.randn(3).tolist())
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), state)
