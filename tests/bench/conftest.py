"""A tiny model, and a device whose rates are known."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from helpers.bench import LAYERS
from helpers.models import tiny_llava
from pore.bench import measuring
from pore.bench.results import Rates


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava(layers=LAYERS, dtype=torch.float32)


@pytest.fixture
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the device takes seconds, and has a test of its own."""
    monkeypatch.setattr(measuring, "device_rates", lambda *_: Rates(flops=1e9, bandwidth=1e9))
