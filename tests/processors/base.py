"""Processors made in code, and tiny models to go with them.

A tokenizer knows little more than its special tokens. Models are random and tiny, except in what
decides how many visual tokens there are: the sizes of images, patches and merging. Nothing in their
towers mixes patches, so that a visual token changes only where the picture changes that it shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from pore.families.registry import family_of


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, newlines and special tokens.

    Args:
        special: Further special tokens.
        named: Special tokens that it has as attributes, such as image_token.
    """
    tags = [f"<row_{i}_col_{j}>" for i in range(1, 12) for j in range(1, 12)]
    words = ["<unk>", "<pad>", "<bos>", "look", "\n", "\n\n", "\n\n\n", *tags]
    words += [word for word in (*special, *named.values()) if word not in words]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Split(Regex(r"\n+|[^\s]+"), "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        extra_special_tokens=named,
    )
    made.add_tokens([*special, *named.values(), *tags], special_tokens=True)
    return made


TEMPLATE = (
    "{%% for message in messages %%}{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%} {{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}{%% endfor %%}"
)


def processor(kind: Any, image_processor: Any, tokens: Any, image: str, **more: Any) -> Any:
    """A processor of a class of transformers, or of one of that name.

    Those with a video processor are made without one, which needs torchvision.
    """
    check = ProcessorMixin.check_argument_for_proper_class
    ProcessorMixin.check_argument_for_proper_class = lambda *_: None  # type: ignore[method-assign,assignment,misc]
    try:
        parts = {"image_processor": image_processor, "tokenizer": tokens, **more}
        made = getattr(transformers, kind) if isinstance(kind, str) else kind
        return made(**parts, chat_template=TEMPLATE % image)
    finally:
        ProcessorMixin.check_argument_for_proper_class = check  # type: ignore[method-assign]


TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16384,
    "pad_token_id": 1,
}


TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@dataclass(frozen=True, eq=False)
class Kind:
    """A family with its processor.

    Attributes:
        name: The family.
        checkpoint: Whose settings it has.
        processor: Makes the processor.
        model: Makes the model; it is given the tokenizer.
        kwargs: Further arguments of every call of the processor.
        refuses: Names of the `SIZES` that the processor itself refuses, with what it says.
        breaks: Names of those that the model itself fails on, with the reason.
    """

    name: str
    checkpoint: str
    processor: Callable[[], Any]
    model: Callable[[Any], Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    refuses: dict[str, str] = field(default_factory=dict)
    breaks: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


MIXES = {"out_proj", "o_proj", "projection_layer"}
"""Names of the layers through which attention in towers gives what it has found."""


NEED_TORCHVISION = ("Llama 4", "Gemma 4")
"""Families whose processor does, Gemma 4 in older versions of transformers."""


def parts_or_skip(kind: Kind) -> tuple[Any, Any]:
    """The processor and the model of a family; the test is skipped if torchvision is missing."""
    try:
        return parts(kind)
    except ImportError:
        if kind.name not in NEED_TORCHVISION or is_torchvision_available():
            raise
        pytest.skip("the processor needs torchvision")


@cache
def parts(kind: Kind) -> tuple[Any, Any]:
    """The processor and the model of a family."""
    made = kind.processor()
    torch.manual_seed(0)
    model = kind.model(made.tokenizer).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)  # no layer of zeros
        if "language_model" not in name and not MIXES.isdisjoint(name.split(".")):
            nn.init.zeros_(weight)  # attention adds nothing
    return made, model


def made(kind: str, config: Any) -> Any:
    return getattr(transformers, kind)._from_config(config, dtype=torch.float32)


def config_of(kind: str, text: str, sizes: dict[str, Any] | None = None, **more: Any) -> Any:
    language = getattr(transformers, text)(**TEXT | (sizes or {}))
    return getattr(transformers, kind)(text_config=language.to_dict(), **more)


def token_id(tokens: Any, name: str) -> int:
    found = tokens.convert_tokens_to_ids(name)
    assert isinstance(found, int)
    assert found != tokens.unk_token_id
    return found


def clip(side: int = 336, patch: int = 14) -> dict[str, Any]:
    sizes = {"image_size": side, "patch_size": patch, "projection_dim": 16}
    return {"model_type": "clip_vision_model", **TOWER, **sizes}


def siglip(side: int = 384, patch: int = 14) -> dict[str, Any]:
    sizes = {"image_size": side, "patch_size": patch, "vision_use_head": False}
    return {"model_type": "siglip_vision_model", **TOWER, **sizes}


def llava_tokens() -> Any:
    return tokenizer(image_token="<image>", video_token="<video>")


def features(model: Any, inputs: Any) -> Tensor:
    """(n, D) the features that the model puts at the placeholders of its images."""
    wanted = {
        name: value.float() if value.is_floating_point() else value
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    }
    encode = family_of(model).base(model).get_image_features
    old, new = "pixel_values_images", "pixel_values"  # of Video-LLaVA, by version of transformers
    if old in wanted and old not in inspect.signature(encode).parameters:
        wanted[new] = wanted.pop(old)
    with torch.no_grad():
        found = encode(**wanted)
    if not isinstance(found, (Tensor, list, tuple)):  # Llama 4's are not projected yet
        pooled = found.pooler_output
        found = found.last_hidden_state if pooled is None else pooled
    if isinstance(found, (list, tuple)):
        found = torch.cat([one.flatten(0, -2) for one in found])
    return found.flatten(0, -2)
