"""Sizes of models: read from configs, and of names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    SiglipVisionConfig,
    ViTConfig,
)

import pore
from helpers.flops import (
    DECODERS,
    tiny_config,
)
from pore.cost.decoders import DecoderShape
from pore.cost.flops import (
    model_flops,
)
from pore.cost.named import SHAPES, llava_config, model_shape
from pore.cost.towers import TowerShape
from pore.errors import UnsupportedModelError
from pore.families.registry import shape_of

SEVEN_B = SHAPES["llava-1.5-7b"]


class TestConfigs:
    @pytest.mark.parametrize("config", [MixtralConfig(), GPT2Config(), object(), None])
    def test_unknown_decoder(self, config: object) -> None:
        with pytest.raises(UnsupportedModelError, match="known here: llama, mistral"):
            DecoderShape.from_config(config)

    def test_unknown_tower(self) -> None:
        with pytest.raises(UnsupportedModelError, match="known here: clip_vision_model"):
            TowerShape.from_config(ViTConfig())

    def test_tower_without_cls(self) -> None:
        config = SiglipVisionConfig(image_size=32, patch_size=8)
        assert TowerShape.from_config(config).tokens == 16

    def test_text_only_model(self) -> None:
        with pytest.raises(UnsupportedModelError, match="LlamaConfig has no text_config"):
            shape_of(LlamaConfig())

    def test_missing_part(self) -> None:
        config = tiny_config(DECODERS["mha"])
        config.vision_config = None
        with pytest.raises(UnsupportedModelError, match="has no vision_config"):
            shape_of(config)

    @pytest.mark.parametrize("value", [None, 0, "48", 1.5])
    def test_bad_size(self, value: Any) -> None:
        class Config:
            model_type = "llama"
            num_attention_heads = 4
            hidden_size = value

        with pytest.raises(UnsupportedModelError, match=r"Config\.hidden_size must be a whole"):
            DecoderShape.from_config(Config())


class TestShapes:
    @pytest.mark.parametrize(
        "name", [*SHAPES, "llava-1024x12", "llava-1024x12-vit-l", "llava-2048x8", "llava-64x1"]
    )
    def test_config_has_the_sizes(self, name: str) -> None:
        config = llava_config(name)
        assert shape_of(config) == model_shape(name)
        assert config.image_seq_length == 576
        assert config.image_token_id < config.text_config.vocab_size

    @pytest.mark.parametrize(
        ("name", "billions"), [("llava-1.5-7b", 7.063), ("llava-1.5-13b", 13.351)]
    )
    def test_parameters_of_published_models(self, name: str, billions: float) -> None:
        """Parameter counts of llava-hf/llava-1.5-7b-hf and -13b-hf."""
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(llava_config(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)

    def test_llama_sizes(self) -> None:
        assert SEVEN_B.decoder.intermediate == 11008
        assert SHAPES["llava-1.5-13b"].decoder.intermediate == 13824
        assert model_shape("llava-1024x12").decoder.head_dim == 64
        assert model_shape("llava-2048x12").decoder.head_dim == 128

    def test_the_small_tower_is_cheap_and_of_the_same_grid(self) -> None:
        small, large = model_shape("llava-1024x12"), model_shape("llava-1024x12-vit-l")
        assert large.tower == SEVEN_B.tower
        assert small.tower.patches == large.tower.patches == small.visual_tokens == 576
        tokens = [611] * 12
        assert model_flops(small, tokens).tower < 0.03 * model_flops(large, tokens).tower

    @pytest.mark.parametrize("name", ["", "llava", "llava-1000x12", "llava-0x12", "llava-1024x0"])
    def test_unknown_name(self, name: str) -> None:
        with pytest.raises(UnsupportedModelError, match=r"use one of llava-1\.5-7b"):
            model_shape(name)

    def test_needs_neither_torch_nor_transformers(self) -> None:
        """`pore` itself imports torch, so that these files are looked at without it."""
        code = (
            "import sys, types\n"
            "package = sys.modules['pore'] = types.ModuleType('pore')\n"
            f"package.__path__ = [{str(Path(pore.__file__).parent)!r}]\n"
            "import pore.cost.flops, pore.cost.named\n"
            "found = {m.split('.')[0] for m in sys.modules}\n"
            "assert found.isdisjoint({'torch', 'transformers', 'numpy'}), found\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
