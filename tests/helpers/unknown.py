"""A model that transformers does not have and pore does not know, of the usual shape."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers.caches import as_argument
from pore._compat.caches import cache_in

PATCH = 4  # pixels


class MyVLMConfig(PretrainedConfig):
    """A decoder's config, and only the width of the vision tower."""

    model_type = "my_vlm"
    sub_configs: ClassVar = {"text_config": LlamaConfig}

    def __init__(self, text_config: Any = None, vision_config: Any = None, **kwargs: Any) -> None:
        text = text_config or {}
        self.text_config = LlamaConfig(**text) if isinstance(text, dict) else text
        self.vision_config = vision_config or {"width": 8}
        self.image_token_id = kwargs.pop("image_token_id", 100)
        super().__init__(**kwargs)


class MyVLMPreTrained(PreTrainedModel):
    config_class = MyVLMConfig
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules: ClassVar = ["LlamaDecoderLayer"]


class MyVLMModel(MyVLMPreTrained):
    """Patches are projected to the decoder's width; images of any size, in raster order."""

    def __init__(self, config: MyVLMConfig) -> None:
        super().__init__(config)
        width, hidden = config.vision_config["width"], config.text_config.hidden_size
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.projection = nn.Linear(width, hidden)
        self.language_model = LlamaModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.projection(self.patches(pixel_values).flatten(2).mT)
            where = (input_ids == self.config.image_token_id)[..., None]
            inputs_embeds = inputs_embeds.masked_scatter(where, features.to(inputs_embeds))
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class MyVLMForConditionalGeneration(MyVLMPreTrained, GenerationMixin):
    def __init__(self, config: MyVLMConfig) -> None:
        super().__init__(config)
        self.model = MyVLMModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        out = self.model(input_ids, pixel_values, attention_mask=attention_mask, **kwargs)
        states = out.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=self.lm_head(states), **as_argument(cache_in(out)))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        pixels = kwargs.pop("pixel_values", None)
        made = super().prepare_inputs_for_generation(*args, **kwargs)
        if kwargs.get("is_first_iteration", True):
            made["pixel_values"] = pixels
        return made


def my_vlm(text: LlamaConfig) -> MyVLMForConditionalGeneration:
    """The model with random weights in float64 and any decoder."""
    torch.manual_seed(0)
    config = MyVLMConfig(text_config=text)
    made = MyVLMForConditionalGeneration._from_config(config, dtype=torch.float64)
    return made.eval()
