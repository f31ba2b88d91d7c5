"""A batch of a processor as the workload of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pore.bench.workload import Runs, Workload
from pore.errors import InputError
from pore.families.registry import images_of


def workload_of(
    model: nn.Module, inputs: Mapping[str, Any], **runs: Unpack[Runs]
) -> tuple[Workload, dict[str, Any]]:
    """The workload that a batch makes, and the batch with room in its mask for new tokens.

    Args:
        model: The model.
        inputs: What its processor made of prompts of one length with images of one size.
        **runs: How often it runs, and how many tokens are generated.

    Returns:
        The workload, and the inputs on the model's device.

    Raises:
        InputError: Prompts are padded, have no image, or differ in their numbers of tokens.
    """
    images = images_of(model, inputs)
    rows, length = inputs["input_ids"].shape
    visual, after = [0] * rows, [length] * rows
    for image in images:
        visual[image.row] += len(image.columns)
        after[image.row] = min(after[image.row], length - 1 - image.columns[-1])
    mask: Tensor = inputs["attention_mask"]
    if not bool(mask.all()) or len(set(zip(visual, after, strict=True))) != 1 or not visual[0]:
        raise InputError(
            "A benchmark runs prompts of one length without padding, each with as many visual "
            "tokens as the others; here some are padded, differ or have no image. Take the same "
            "picture and question for the whole batch."
        )
    work = Workload(
        batch_size=rows,
        text_before=length - visual[0] - after[0],
        visual=visual[0],
        text_after=after[0],
        **runs,
    )
    of_model: Any = model
    device, dtype = of_model.device, of_model.dtype  # not that of packed weights
    made = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
    made["attention_mask"] = torch.ones(
        rows, length + work.new_tokens, dtype=mask.dtype, device=device
    )
    return work, made
