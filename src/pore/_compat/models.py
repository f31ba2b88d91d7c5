"""What pore uses from single model files, and what they and `generate` do between layers.

`modeling_*.py` promises to keep nothing but its classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

ENCODE_IMAGES, ENCODE_VIDEOS = "get_image_features", "get_video_features"
"""The functions of a multimodal model by which it, and `generate` for it, encodes what it sees."""

UNREAD = ("last_hidden_state", "hidden_states", "attentions")
"""What those functions give besides the features; the decoder does not read it."""

DEEPSTACK = "_deepstack_process"
"""The method of a Qwen3-VL decoder that adds features of lower tower layers to visual tokens.

It runs between two decoder layers, where no hook reaches."""

SPARED_ROWS = "_maybe_slice_kv_shared_inputs"
"""The method of a Gemma 4 decoder that drops all tokens whose logits are not asked for.

It does so before the layers that share keys, in which no token needs the states of others. It runs
between two decoder layers, where no hook reaches."""

PREFILL = "_prefill"
"""The method with which `generate` runs a prompt; its first arguments are token ids and config.

Only this method shows that a call of the model is for a piece of a prompt (chunked prefill)."""

_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm")
"""The norm between attention and MLP of a decoder layer; Gemma has one more of the second name."""


def before_mlp(layer: nn.Module) -> nn.Module | None:
    """What a decoder layer calls first after its attention was added to the states.

    The layer goes on with the same tensor that it calls this norm with, and adds to it what the MLP
    makes. None where attention and MLP are computed from the same states (Cohere).
    """
    found = (getattr(layer, name, None) for name in _BEFORE_MLP)
    return next((norm for norm in found if isinstance(norm, nn.Module)), None)


def loss_of(model: nn.Module) -> Callable[..., Any]:
    """The function with which a model computes its loss from logits, labels and vocab_size.

    Labels that are already shifted by one token go to it as `shift_labels`.
    """
    loss: Callable[..., Any] = model.loss_function  # type: ignore[assignment]
    return loss


def text_vocabulary(config: Any) -> int:
    """The number of different tokens that the language model knows."""
    size: int = config.get_text_config().vocab_size
    return size


def of_layers(config: Any, count: int) -> Any:
    """A copy of a config with the first `count` decoder layers, or all if there are fewer.

    A decoder builds `num_hidden_layers` layers; lists with an entry for each, such as
    `layer_types`, are as long.
    """
    found = copy.deepcopy(config)
    text = found.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:count])
    text.num_hidden_layers = min(count, layers)
    return found


def tiles_of(size: Any, pinpoints: Any, side: int) -> tuple[int, int]:
    """(rows, columns) of the tiles into which LLaVA-NeXT cuts an image of (height, width) pixels.

    `get_anyres_image_grid_shape` is a function of its model file.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape(size, pinpoints, side)
    return rows, columns


def window_order(config: Any, grids: Tensor) -> Tensor:
    """(T,) the visual tokens in the order in which Qwen2.5-VL's tower has them: window by window.

    The tower reorders its patches by `get_vision_window_index` of `vision_utils`.

    Args:
        config: The tower's config.
        grids: (I, 3) frames, height and width of every image in patches.
    """
    from transformers.vision_utils import get_vision_window_index

    order: Tensor = get_vision_window_index(
        grids,
        spatial_merge_size=config.spatial_merge_size,
        window_size=config.window_size,
        patch_size=config.patch_size,
    )[0]
    return order.to(grids.device)
