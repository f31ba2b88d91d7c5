"""From an image and a question to the inputs of a model, the same way everywhere.

Calibration, evaluation and generation all build their prompts here, so that a bias is measured
under the template and the image processing under which tokens are pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pore.data.samples import Sample
from pore.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchFeature

# The settings of an image processor that decide what a visual token shows.
_SETTINGS = (
    "image_processor_type",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_pad",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "min_pixels",
    "max_pixels",
    "image_grid_pinpoints",
    "do_image_splitting",
    "max_image_size",
    "crop_to_patches",
    "min_patches",
    "max_patches",
    "do_pan_and_scan",
    "pan_and_scan_min_crop_size",
    "pan_and_scan_max_num_crops",
    "pan_and_scan_min_ratio_to_activate",
)


def render(processor: Any, question: str, *, image: bool = True) -> str:
    """The prompt of one question in the model's own chat template.

    Args:
        processor: The model's processor.
        question: What the user asks.
        image: Whether an image goes with it.

    Returns:
        The text up to where the answer begins, with the image's placeholder.

    Raises:
        InputError: The processor has no chat template, or the question holds the placeholder.
    """
    placeholder = getattr(processor, "image_token", None)
    if placeholder and placeholder in question:
        raise InputError(
            f"The question {question!r} holds {placeholder}, which stands for an image; leave it "
            "out, the chat template places the image."
        )
    content = [{"type": "image"}] if image else []
    conversation = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    if getattr(processor, "chat_template", None) is None:
        raise InputError(
            f"{type(processor).__name__} has no chat template, so the prompt is unknown; load the "
            "processor of an instruction-tuned checkpoint, or set processor.chat_template."
        )
    prompt: str = processor.apply_chat_template(conversation, add_generation_prompt=True)
    return prompt


def prompt_template(processor: Any) -> str:
    """The prompt with `{question}` in place of the question, by which profiles name a template.

    Raises:
        InputError: The processor has no chat template.
    """
    return render(processor, "{question}")


def processor_settings(processor: Any) -> dict[str, Any]:
    """The settings of the image processor that decide what a visual token shows.

    The class is named without its backend (PIL or torchvision).

    Args:
        processor: The model's processor.

    Returns:
        Plain values, as JSON holds them, without settings that the processor lacks.
    """
    found = processor.image_processor.to_dict()
    return {
        name: _plain(found[name]) for name in _SETTINGS if name in found and found[name] is not None
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def build_inputs(
    processor: Any,
    samples: Sequence[Sample],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> BatchFeature:
    """The inputs of a model for a batch of samples, padded on the left.

    Args:
        processor: The model's processor, with a chat template.
        samples: One or more samples; samples without an image give text-only prompts.
        device: Where the tensors go.
        dtype: Floating dtype of the pixels, that of the model; None leaves float32.

    Returns:
        `input_ids` and `attention_mask`, both (B, L), and `pixel_values` of the samples' images in
        order; ready for `model(**inputs)` and `model.generate(**inputs)`.

    Raises:
        InputError: An image cannot be read, or the processor refuses the samples; for a batch of
            several, ask for one at a time to learn which.
    """
    images: list[Any] = [sample.load_image() for sample in samples if sample.image is not None]
    if len(images) == len(samples):
        # Of a flat list some processors, such as Gemma 3's, take all for images of one prompt.
        images = [[image] for image in images]
    prompts = [render(processor, s.question, image=s.image is not None) for s in samples]
    start = getattr(processor.tokenizer, "bos_token", None)
    try:
        inputs = processor(
            images=images or None,
            text=prompts,
            padding=True,
            padding_side="left",
            # A template that writes the start token itself must not get a second one.
            add_special_tokens=not (start and prompts[0].startswith(start)),
            return_tensors="pt",
        )
    except Exception as error:  # processors raise whatever their parts raise
        raise InputError(
            f"The processor refuses {', '.join(sample.id for sample in samples)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    found: BatchFeature = inputs.to(device=device, dtype=dtype)
    return found
