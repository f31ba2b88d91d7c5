"""What the decoder gets of the prompt of a golden file, through the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pore
from golden_models import llava_of
from pore.pruner import Run


def projected_by(tensors: dict[str, Tensor]) -> nn.Linear:
    """The file's projector."""
    weight, bias = tensors["projector.weight"], tensors["projector.bias"]
    projector = nn.Linear(weight.shape[1], weight.shape[0])
    projector.load_state_dict({"weight": weight, "bias": bias})
    return projector


def prompted_llava(file: Any, weights: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A LLaVA-1.5 of the file's tower, projector and word embeddings, and its inputs.

    Args:
        file: The golden file; the one image of its prompt is the id `image_token_id`.
        weights: Weights of its tower.

    Returns:
        The model, and `input_ids` with a placeholder for every patch and `pixel_values`.
    """
    tensors: dict[str, Tensor] = file.tensors
    projector, words = projected_by(tensors), tensors["embed_tokens.weight"]
    model = llava_of(file.params["vision_config"], weights, projector, words.shape[1])
    # A word of its own for the placeholder, behind those of the file.
    words = torch.cat([words, torch.zeros(1, words.shape[1])])
    model.set_input_embeddings(nn.Embedding.from_pretrained(words))
    model.config.image_token_id = len(words) - 1
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    (ids,) = tensors["input_ids"].tolist()
    at = ids.index(file.params["image_token_id"])
    ids[at : at + 1] = [len(words) - 1] * patches
    return model, {"input_ids": torch.tensor([ids]), "pixel_values": tensors["pixel_values"]}


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
