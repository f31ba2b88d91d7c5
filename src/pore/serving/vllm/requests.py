"""What vLLM takes of an image: the embeddings of the visual tokens that are kept, or all and which.

The server is to be started with `--enable-mm-embeds`, the engine with `enable_mm_embeds=True`. It
gives an image as many placeholders as it has embeddings, and checks little: a tensor of the wrong
shape can end it. So all is checked here, before it leaves.

Where tokens have places on three axes, embeddings do not tell those. There the picture itself is
sent with the indices of what is kept (`pore.serving.vllm.indices`), as it was ranked: turned as a
viewer shows it, which vLLM does not do.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pore.errors import InputError
from pore.serving.reencoding import Choice

if TYPE_CHECKING:
    import PIL.Image


def image_part(embeddings: Tensor, width: int) -> dict[str, Any]:
    """An image's embeddings as a part of a message, for vLLM's server.

    Args:
        embeddings: (k, D) of the tokens that are kept.
        width: D of the served model.

    Returns:
        A content part of the type "image_embeds".

    Raises:
        InputError: The tensor is not of that form, or holds NaN or infinity.
    """
    rows = checked(embeddings, width)
    with io.BytesIO() as file:
        torch.save(rows, file)
        data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_embeds", "image_embeds": data}


def picture_part(image: PIL.Image.Image) -> dict[str, Any]:
    """A picture as a part of a message.

    Args:
        image: The picture.

    Returns:
        A content part of the type "image_url".
    """
    with io.BytesIO() as file:
        image.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def engine_prompt(choice: Choice, width: int) -> dict[str, Any]:
    """A pruned prompt for the engine, `vllm.LLM.generate`, with embeddings.

    Args:
        choice: What is kept of the prompt's images.
        width: D of the served model.

    Returns:
        The prompt as a dict.

    Raises:
        InputError: As in `image_part`.
    """
    made: dict[str, Any] = {"prompt_token_ids": list(choice.ids)}
    if choice.images:
        rows = [checked(image.embeddings, width) for image in choice.images]
        made["multi_modal_data"] = {"image": rows}
    return made


def checked(embeddings: Tensor, width: int) -> Tensor:
    """Embeddings that vLLM can take, in the CPU's memory.

    Args:
        embeddings: (k, D).
        width: D of the served model.

    Raises:
        InputError: The tensor is not of that form, or holds NaN or infinity.
    """
    shape = tuple(embeddings.shape)
    if len(shape) != 2 or not shape[0] or shape[1] != width:
        raise InputError(
            f"The embeddings of an image are (tokens, {width}) for this model, at least one token, "
            f"not {shape}; rank with the same checkpoint that is served."
        )
    if not embeddings.is_floating_point() or not bool(torch.isfinite(embeddings).all()):
        raise InputError(
            "The embeddings of an image hold NaN or infinity, or are not floating-point; look for "
            "overflow (fp16 where the model needs bf16?) or damaged weights."
        )
    return embeddings.detach().to("cpu").contiguous()
