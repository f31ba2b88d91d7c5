"""What the decoder gets for the prompt of a golden file, through the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import pore
from pore.engine.run import Run
from pore.families.registry import family_of


def tower_prompt(file: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A model with the file's tower, projector and word embeddings, and the file's prompt.

    It is a LLaVA-1.5, or a LLaVA-NeXT if the file's image comes in crops, with an arbitrary
    decoder.

    Args:
        file: The golden file; the one image of its prompt is the id `image_token_id`.
        weights: CLIP weights by their names in transformers, with or without `vision_model.`.

    Returns:
        The model and its inputs, with a placeholder for every visual token.
    """
    tensors, params = file.tensors, file.params
    words, weight = tensors["embed_tokens.weight"], tensors["projector.weight"]
    vision = CLIPVisionConfig(**params["vision_config"])
    size, grid, newline = None, None, None
    if params["anyres"]:
        newline = tensors["image_newline"]
        grid = params["grid"][::-1]  # the file has (width, height)
        assert tensors["pixel_values"].shape[1] == grid[0] * grid[1] + 1
        size = [side * vision.image_size for side in grid]
        if with_rows(tensors):
            size = params["image_size_wh"][::-1]
    model = model_around(vision, words, grid, params["select_layer"])
    load_tower(model, weights)
    model.model.multi_modal_projector = nn.Linear(*weight.T.shape)
    model.model.multi_modal_projector.load_state_dict(
        {"weight": weight, "bias": tensors["projector.bias"]}
    )
    if newline is not None:
        model.model.image_newline.data = newline
    return model, inputs_of(model, tensors, params["image_token_id"], size)


def with_rows(tensors: dict[str, Tensor]) -> bool:
    """Whether the file's image was packed as transformers does it ("spatial_unpad" in LLaVA).

    With LLaVA's "spatial" padding is not cut off and rows do not end with a newline.
    """
    return bool((tensors["inputs_embeds"] == tensors["image_newline"]).all(-1).any())


def without_newlines(states: Tensor, model: Any) -> Tensor:
    """(1, M, D) states without those that are the model's newline."""
    rows = (states[0] != model.model.image_newline.data).any(-1)
    return states[:, rows]


def model_around(
    vision: CLIPVisionConfig,
    words: Tensor,
    grid: list[int] | None = None,
    vision_feature_layer: int = -2,
) -> Any:
    """A LLaVA-1.5 with given word embeddings, or, for a grid of tiles, a LLaVA-NeXT.

    Args:
        vision: The tower.
        words: (V, D) the embeddings; the placeholder is a word after them.
        grid: (rows, columns) of tiles that every image is cut into.
        vision_feature_layer: Which hidden states of the tower the projector reads.
    """
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(words) + 1,
        hidden_size=words.shape[1],
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    common = {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": len(words),
        "vision_feature_layer": vision_feature_layer,
    }
    if grid is None:
        model: Any = LlavaForConditionalGeneration._from_config(
            LlavaConfig(**common), dtype=torch.float32
        )
    else:
        pinpoints = [[side * vision.image_size for side in grid]]
        config = LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=torch.float32)
    words = torch.cat([words, torch.zeros(1, words.shape[1])])
    model.set_input_embeddings(nn.Embedding.from_pretrained(words))
    return model.eval()


def load_tower(model: Any, weights: dict[str, Tensor]) -> None:
    """Load CLIP weights by their names in transformers, with or without `vision_model.`."""
    tower = model.model.vision_tower
    prefix = "vision_model." if hasattr(tower, "vision_model") else ""
    weights = {prefix + k.removeprefix("vision_model."): v for k, v in weights.items()}
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("position_ids") for name in missing), missing


def inputs_of(
    model: Any, tensors: dict[str, Tensor], image: int, size: list[int] | None
) -> dict[str, Tensor]:
    """The inputs of a model for a prompt in which one id stands for the image.

    Args:
        model: The model.
        tensors: The file's tensors; `input_ids` (1, L) and `pixel_values` are used.
        image: The id that stands for the image.
        size: (height, width) of the image in pixels, if it is cut into tiles.
    """
    inputs = {"pixel_values": tensors["pixel_values"]}
    if size is None:
        height, width = family_of(model).grid(model) or (0, 0)
        count = height * width
    else:
        inputs["image_sizes"] = torch.tensor([size])
        (tiling,) = family_of(model).tilings(model, inputs)
        count = len(tiling.slots)
    (ids,) = tensors["input_ids"].tolist()
    at = ids.index(image)
    ids[at : at + 1] = [model.config.image_token_id] * count
    return {"input_ids": torch.tensor([ids]), **inputs}


def embeddings(model: Any, pruner: pore.Pruner, inputs: dict[str, Tensor]) -> tuple[Tensor, Run]:
    """(B, M, D) what enters the first decoder layer, and the run."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    first = model.model.language_model.layers[0]
    with torch.no_grad(), pruner(model) as run:
        hook = first.register_forward_pre_hook(look, with_kwargs=True)
        model(**inputs)
        hook.remove()
    return seen[0], run
