"""The untrained model: sizes, and the forward pass that training uses."""

from __future__ import annotations

import numpy as np
import torch
from corpus import BOS, EOS, IMAGE, PAD, VISUAL_TOKENS, VOCABULARY
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build(tokenizer: Tokenizer) -> LlavaForConditionalGeneration:
    """A LLaVA of 5.3 million random weights.

    The initial standard deviation is scaled to the width: with the default of 0.02, attention in a
    decoder of width 192 starts out nearly flat.
    """
    ids = {t: tokenizer.token_to_id(t) for t in (BOS, EOS, PAD, IMAGE)}
    vision = CLIPVisionConfig(
        image_size=96,
        patch_size=8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.07,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        initializer_range=0.07,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    return LlavaForConditionalGeneration(config)


def pixels(images: np.ndarray) -> Tensor:
    """``(B, 96, 96, 3)`` uint8 to ``(B, 3, 96, 96)`` float, as the processor does it."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def visual_features(model: LlavaForConditionalGeneration, images: np.ndarray) -> Tensor:
    """Patch features of the frozen tower, ``(B, 144, 128)``."""
    with torch.no_grad():
        out = model.model.vision_tower(pixels(images), output_hidden_states=True)
    features: Tensor = out.hidden_states[-2][:, 1:]
    return features


def hidden(
    model: LlavaForConditionalGeneration,
    ids: Tensor,
    features: Tensor | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Last hidden states of the decoder.

    Args:
        model: The model.
        ids: ``(B, T)`` token ids; image tokens are replaced by the projected features.
        features: ``(B, 144, 128)`` from the tower, or None for text.
        mask: ``(B, 1, T, T)`` bool, True where attention is allowed; None for causal.
        positions: ``(B, T)`` position ids; None for 0, 1, 2, ...

    Returns:
        ``(B, T, 192)``.
    """
    embeds = model.get_input_embeddings()(ids)
    if features is not None:
        projected = model.model.multi_modal_projector(features).to(embeds.dtype)
        is_image = (ids == model.config.image_token_index).unsqueeze(-1)
        embeds = embeds.masked_scatter(is_image, projected)
    out = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    )
    states: Tensor = out.last_hidden_state
    return states
