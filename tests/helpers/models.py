"""Tiny random models, made in the tests from transformers' own config classes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

IMAGE = 90  # the placeholder token
PAD = 0
SIDE = 4  # an image is SIDE * SIDE visual tokens
N = SIDE * SIDE


def tiny_llava(
    *,
    layers: int = 5,
    tower_layers: int = 2,
    side: int = SIDE,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    seed: int = 0,
    **text: Any,
) -> LlavaForConditionalGeneration:
    """A random LLaVA: `side`² visual tokens, 4 heads in groups of 2, sharp attention."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=1024,
            initializer_range=0.3,
            pad_token_id=PAD,
            **text,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=tower_layers,
            num_attention_heads=2,
            image_size=8 * side,
            patch_size=8,
            projection_dim=16,
            initializer_range=0.3,
        ),
        image_token_index=IMAGE,
        image_seq_length=side * side,
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    if dtype == torch.float64:
        in_float64(model)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def tiny_siglip_llava(
    *, layers: int = 5, read: int = -2, head: bool = True, dtype: torch.dtype = torch.float64
) -> LlavaForConditionalGeneration:
    """The same with a SigLIP tower of 4 layers, which has no CLS token.

    Args:
        layers: Decoder layers.
        read: Which of the tower's hidden states the projector reads.
        head: Whether the tower has a pooling head.
        dtype: Type of the weights.
    """
    model = tiny_llava(layers=layers, dtype=dtype)
    config = copy.deepcopy(model.config)
    config.vision_config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8 * SIDE,
        patch_size=8,
        vision_use_head=head,
    )
    config.vision_feature_layer = read
    config.vision_feature_select_strategy = "full"
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    for name, weight in made.model.vision_tower.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            torch.nn.init.normal_(weight, std=0.6)  # sharp attention
    made.generation_config = model.generation_config
    return (in_float64(made) if dtype == torch.float64 else made).eval()


def in_float64(model: Any) -> Any:
    """Give a model norms and rotary tables that do not go through float32."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(_norm, module)  # type: ignore[method-assign]
        if isinstance(module, LlamaRotaryEmbedding):
            module.forward = partial(_rope, module)  # type: ignore[method-assign]
    return model


def _norm(norm: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    """RMS norm in the type of its input; transformers' own goes through float32."""
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (hidden * scale)


def _rope(rotary: LlamaRotaryEmbedding, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """Rotary tables in the type of the states; transformers' own are in float32."""
    freqs = position_ids[..., None].to(x.dtype) * rotary.inv_freq.to(x.dtype)
    table = torch.cat((freqs, freqs), dim=-1)
    return table.cos(), table.sin()


def prompt(before: int, images: int, after: int, seed: int = 0) -> list[int]:
    """Token ids: text, images with two text tokens between them, text."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def text(count: int) -> list[int]:
        return torch.randint(3, 80, (count,), generator=generator).tolist()

    ids = text(before)
    for number in range(images):
        ids += [IMAGE] * N + (text(2) if number < images - 1 else [])
    return ids + text(after)


def batch(
    prompts: list[list[int]], side: str = "left", dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Model inputs of several prompts, padded on a side."""
    width = max(len(ids) for ids in prompts)
    ids, mask = [], []
    for one in prompts:
        fill = width - len(one)
        left, right = (fill, 0) if side == "left" else (0, fill)
        ids.append([PAD] * left + one + [PAD] * right)
        mask.append([0] * left + [1] * len(one) + [0] * right)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    count = sum(one.count(IMAGE) // N for one in prompts)
    if count:
        generator = torch.Generator().manual_seed(2000 + seed)
        pixels = torch.randn(count, 3, 8 * SIDE, 8 * SIDE, generator=generator, dtype=torch.float64)
        inputs["pixel_values"] = pixels.to(dtype)
    return inputs
