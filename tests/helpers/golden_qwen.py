"""Qwen2-VLs and Qwen2.5-VLs built around the text model of a golden file."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from helpers.caches import as_argument
from helpers.golden_models import llava_around, marked_inputs


def qwen_around(file: Any, kind: str) -> tuple[Any, dict[str, Tensor]]:
    """A model around the file's text model, with any vision tower, and what else the file holds.

    Args:
        file: The file; `text_config` and `image_token_id` are among its parameters.
        kind: "Qwen2VL" or "Qwen2_5_VL".
    """
    torch.manual_seed(0)
    text = dict(file.params["text_config"])
    rope = {k: v for k, v in text.pop("rope_scaling").items() if k != "type"}
    rope["rope_theta"] = text.pop("rope_theta")
    tower = {"depth": 1, "num_heads": 1, "patch_size": 4}
    wide = {"hidden_size": text["hidden_size"], "embed_dim": 8}
    if kind == "Qwen2_5_VL":
        wide = {"hidden_size": 8, "intermediate_size": 8, "out_hidden_size": text["hidden_size"]}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, "rope_parameters": rope},
        vision_config={**tower, **wide},
        image_token_id=file.params["image_token_id"],
        vision_end_token_id=file.params["vision_end_token_id"],
    )
    made = getattr(transformers, f"{kind}ForConditionalGeneration")
    model = made._from_config(config, dtype=torch.float32).eval()
    weights = {k: v for k, v in file.tensors.items() if k.startswith(("model.", "lm_head."))}
    model.model.language_model.load_state_dict(
        {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    )
    model.lm_head.load_state_dict({"weight": weights["lm_head.weight"]})
    return model, {k: v for k, v in file.tensors.items() if k not in weights}


def prompt_of(file: Any, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a model whose image features are those in the file's embeddings.

    Args:
        file: The file.
        model: From `qwen_around`; its `get_image_features` is replaced.
        tensors: What else the file holds.
    """
    ids = tensors["input_ids"]
    visual = ids == file.params["image_token_id"]
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    assert visual[0].nonzero()[:, 0].tolist() == list(range(start, start + count))
    features = tensors["inputs_embeds"][visual]
    words = model.get_input_embeddings()(ids)
    torch.testing.assert_close(words[~visual], tensors["inputs_embeds"][~visual])

    def get_image_features(pixel_values: Tensor, image_grid_thw: Tensor, **_: Any) -> Any:
        found = transformers.modeling_outputs.BaseModelOutputWithPooling()
        found.pooler_output = (features,)
        return found

    model.model.get_image_features = get_image_features
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": tensors["position_ids"],
        "pixel_values": torch.zeros(1, 1),
        "image_grid_thw": torch.tensor([file.params["grid_thw"]]),
        "mm_token_type_ids": visual.int(),
    }


_WORD = 1
"""The id that stands for every word of a prompt that a file has as embeddings alone."""


def text_model_around(file: Any) -> tuple[Any, dict[str, Tensor]]:
    """A Qwen2-VL around the file's text model, whose weights are named `text.`, and what is left.

    Args:
        file: The file; `text_config` and `mrope_section` are among its parameters. It has no head.
    """
    torch.manual_seed(0)
    text = dict(file.params["text_config"])
    rope = {
        "rope_type": "default",
        "mrope_section": file.params["mrope_section"],
        "rope_theta": text.pop("rope_theta"),
    }
    words = text["vocab_size"]
    config = transformers.Qwen2VLConfig(
        text_config={**text, "vocab_size": words + 1, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "num_heads": 1,
            "patch_size": 4,
            "embed_dim": 8,
            "hidden_size": text["hidden_size"],
        },
        image_token_id=words,
    )
    made = transformers.Qwen2VLForConditionalGeneration
    model: Any = made._from_config(config, dtype=torch.float32).eval()
    weights = {k: v for k, v in file.tensors.items() if k.startswith("text.")}
    held = {k.removeprefix("text."): v for k, v in weights.items()}
    embeddings = held.get("embed_tokens.weight", torch.zeros(words, text["hidden_size"]))
    held["embed_tokens.weight"] = torch.cat([embeddings, torch.zeros_like(embeddings[:1])])
    model.model.language_model.load_state_dict(held)
    return model, {k: v for k, v in file.tensors.items() if k not in weights}


def prompt_in_text_model(file: Any, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a model whose words and image features are the file's embeddings.

    Args:
        file: The file; `start`, `N` and `grid` are among its parameters.
        model: From `text_model_around`; its `get_image_features` and its embeddings are replaced.
        tensors: What else the file holds.
    """
    embeds, image = tensors["inputs_embeds"], model.config.image_token_id
    start, count = file.params["start"], file.params["N"]
    ids = torch.full(embeds.shape[:2], _WORD)
    ids[:, start : start + count] = image
    rows, columns = file.params["grid"]
    size = model.config.vision_config.spatial_merge_size

    def get_image_features(pixel_values: Tensor, image_grid_thw: Tensor, **_: Any) -> Any:
        found = transformers.modeling_outputs.BaseModelOutputWithPooling()
        found.pooler_output = (embeds[0, start : start + count],)
        return found

    model.model.get_image_features = get_image_features
    return {
        "inputs_embeds": embeds,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": tensors["position_ids"],
        "pixel_values": torch.zeros(1, 1),
        "image_grid_thw": torch.tensor([[1, rows * size, columns * size]]),
        "mm_token_type_ids": (ids == image).int(),
    }


@torch.no_grad()
def decoded_states(
    model: Any, cache: Any, tensors: dict[str, Tensor], positions: list[int]
) -> Tensor:
    """(n, D) last states of the file's `decode_embeds` (n, D), fed one by one at these positions.

    A position is the same on all axes.
    """
    steps = []
    for embeds, position in zip(tensors["decode_embeds"], positions, strict=True):
        step = model(
            inputs_embeds=embeds[None, None],
            **as_argument(cache),
            position_ids=torch.full((3, 1, 1), position),
            output_hidden_states=True,
        )
        steps.append(step.hidden_states[-1][0, -1])
    return torch.stack(steps)


class Around(NamedTuple):
    """A model around what a file holds, and its prompt.

    Attributes:
        qwen: Whether it is a Qwen2-VL, and no LLaVA.
        model: The model.
        tensors: What else the file holds.
        inputs: The prompt.
        visual: Which of its tokens are visual, if the model has to be told; else None.
    """

    qwen: bool
    model: Any
    tensors: dict[str, Tensor]
    inputs: dict[str, Tensor]
    visual: Tensor | None


def either_around(file: Any) -> Around:
    """The model and the prompt of a file of either variant: "qwen2vl", or a LLaMA in a LLaVA."""
    if file.params.get("variant") == "qwen2vl":
        model, tensors = text_model_around(file)
        return Around(True, model, tensors, prompt_in_text_model(file, model, tensors), None)
    model, tensors = llava_around(file, "llama_config", "llama.")
    mask = torch.ones(tensors["inputs_embeds"].shape[:2], dtype=torch.long)
    where = {"image_start": file.params["start"], "image_len": file.params["N"]}
    inputs, visual = marked_inputs({**tensors, **where, "attention_mask": mask})
    return Around(False, model, tensors, inputs, visual)
