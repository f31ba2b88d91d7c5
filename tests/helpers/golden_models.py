"""LLaVAs built around the vision tower or decoder of a golden file, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import pore
from helpers.caches import as_argument
from pore.engine.run import Run
from pore.tower.stages import TowerView

IMAGE = 7


def llava_of(
    vision: dict[str, Any], weights: dict[str, Tensor], projector: nn.Module, width: int
) -> LlavaForConditionalGeneration:
    """A model with the file's tower and projector, and any decoder.

    Args:
        vision: The file's CLIP configuration.
        weights: CLIP weights by their names in transformers, with or without `vision_model.`.
        projector: The module between tower and decoder.
        width: Hidden size of the decoder.
    """
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=16,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=IMAGE,
    )
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    tower = model.model.vision_tower
    prefix = "vision_model." if hasattr(tower, "vision_model") else ""
    weights = {prefix + k.removeprefix("vision_model."): v for k, v in weights.items()}
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") for name in missing), missing
    model.model.multi_modal_projector = projector
    return model


def visual_embeddings(
    model: LlavaForConditionalGeneration, pruner: pore.Pruner, pixels: Tensor
) -> tuple[Tensor, Run]:
    """What the decoder gets for every image, (B, k, D), and the run.

    Args:
        model: The model.
        pruner: The method.
        pixels: (B, 3, H, W) pixel values, one image for each of B prompts.
    """
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[1, *[IMAGE] * patches, 2, 3]] * len(pixels))
    seen: list[Tensor] = []

    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    first = model.model.language_model.layers[0]
    with torch.no_grad(), pruner(model) as run:
        hook = first.register_forward_pre_hook(look, with_kwargs=True)
        model(input_ids=ids, pixel_values=pixels)
        hook.remove()
    return seen[0][:, 1:-2], run


def tower_view(features: Tensor, attention: Tensor, **others: Any) -> TowerView:
    """The view of a tower rule, made from features (I, N, C) and attention (S, I, H, N)."""
    raster = torch.arange(features.shape[1]).expand(len(features), -1)
    parts = {"cls_feature": None, "queries": (), "keys": (), **others}
    return TowerView(features=features, cls_attention=attention, raster=raster, **parts)


class Worst:
    """The largest difference so far, relative to the largest expected value."""

    value = 0.0

    def compare(self, got: Tensor, expected: Tensor) -> None:
        """Assert that a tensor equals the one in the file."""
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        scale = expected.abs().max().item() if expected.numel() else 0.0
        if scale > 0:
            self.value = max(self.value, (got - expected).abs().max().item() / scale)


def llava_around(
    file: Any, settings: str = "config", prefix: str = "", kind: type[Any] = LlamaConfig
) -> tuple[LlavaForConditionalGeneration, dict[str, Tensor]]:
    """A LLaVA around the file's language model, and what else the file holds.

    Args:
        file: The file.
        settings: Which of its parameters is the configuration; its `config` where none is.
        prefix: Prefix of the weights' names, compared with transformers.
        kind: Class of the configuration.
    """
    llama = file.params.get(settings, file.config)
    config = LlavaConfig(
        text_config=kind(**llama),
        vision_config=CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=8,
            patch_size=8,
        ),
        image_token_index=llama["vocab_size"] - 1,
    )
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    body, head = f"{prefix}model.", f"{prefix}lm_head."
    weights = {k: v for k, v in file.tensors.items() if k.startswith((body, head))}
    model.model.language_model.load_state_dict(
        {k.removeprefix(body): v for k, v in weights.items() if k.startswith(body)}
    )
    model.lm_head.load_state_dict({"weight": weights[f"{head}weight"]})
    return model, {k: v for k, v in file.tensors.items() if k not in weights}


def marked_inputs(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the model around a decoder, and what `mark_visual` needs."""
    inputs = {name: tensors[name] for name in ("inputs_embeds", "attention_mask")}
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    visual = torch.zeros_like(tensors["attention_mask"], dtype=torch.bool)
    visual[:, start : start + count] = True
    return inputs, visual


@contextmanager
def layer_inputs(model: LlavaForConditionalGeneration) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The states and the rotary cosines that every decoder layer gets, in the order of the calls.

    Inside the block of a pruner, they have only the tokens that it left.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        seen.append((states, kwargs["position_embeddings"][0]))

    layers = model.model.language_model.layers
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def cut_cache(cache: Any, layers: range, index: Tensor) -> DynamicCache:
    """A cache whose early layers also hold only the tokens kept, as after some authors' prefill.

    In pore, layers before the pruned one keep their whole cache. The answer is then decoded with
    this cache by the plain model, without pore.

    Args:
        cache: The cache after the prefill.
        layers: The layers to cut.
        index: Positions of the tokens kept.
    """
    made = DynamicCache()
    for number, layer in enumerate(cache.layers):
        held = (layer.keys, layer.values)
        keys, values = (x[:, :, index] if number in layers else x for x in held)
        made.update(keys, values, number)
    return made


def check_decoding(
    model: LlavaForConditionalGeneration,
    cache: Any,
    seen: list[tuple[Tensor, Tensor]],
    expected: dict[str, Tensor],
    worst: Worst,
) -> None:
    """Assert that tokens decoded from a cache have the file's logits, and positions in each layer.

    Args:
        model: The model, in the block of a pruner and of `layer_inputs`.
        cache: What the prefill left.
        seen: What `layer_inputs` yields.
        expected: The file's `cache_decode_` tensors.
        worst: Collects the differences.
    """
    steps = zip(
        expected["cache_decode_tokens"],
        expected["cache_decode_logits"],
        expected["cache_decode_position_per_layer"],
        strict=True,
    )
    for token, logits, positions in steps:
        seen.clear()
        step = model(input_ids=token.view(1, 1), **as_argument(cache))
        worst.compare(step.logits[0, -1], logits)
        assert len(seen) == len(positions)
        for (_, cosines), position in zip(seen, positions, strict=True):
            check_positions(model, cosines, position[None])


def check_positions(model: LlavaForConditionalGeneration, got: Tensor, expected: Tensor) -> None:
    """Assert that rotary cosines are those of positions (m,)."""
    positions = expected[None].long()
    cosines = model.model.language_model.rotary_emb(got, positions)[0]
    torch.testing.assert_close(got, cosines, rtol=0, atol=0)


@torch.no_grad()
def decoded_logits(
    model: Any, cache: Any, tensors: dict[str, Tensor], positions: list[int]
) -> Tensor:
    """(B, n, V) logits of the file's `decode_tokens` (B, n), fed one by one at these positions."""
    steps = []
    for token, position in zip(tensors["decode_tokens"].T, positions, strict=True):
        where = torch.full((len(token), 1), position)
        step = model(input_ids=token[:, None], **as_argument(cache), position_ids=where)
        steps.append(step.logits[:, -1])
    return torch.stack(steps, 1)
