"""From an image or a video and a question to the inputs of a model, the same way everywhere.

Calibration, evaluation and generation all build their prompts here, so that a bias is measured
under the template and the image processing under which tokens are pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from pore._compat.videos import video_arguments
from pore._videos import Video, stacked
from pore.data.samples import Sample
from pore.errors import InputError

if TYPE_CHECKING:
    import PIL.Image
    from transformers import BatchFeature


class Resize(NamedTuple):
    """How pictures are made smaller before they become inputs.

    Attributes:
        picture: What is done to every picture, or None.
        settings: Arguments of the processor for all of them.
    """

    picture: Callable[[PIL.Image.Image], PIL.Image.Image] | None
    settings: Mapping[str, Any]


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


def render(
    processor: Any, question: str, *, shown: Literal["image", "video"] | None = "image"
) -> str:
    """The prompt of one question in the model's own chat template.

    Args:
        processor: The model's processor.
        question: What the user asks.
        shown: What goes with it; None for a question alone.

    Returns:
        The text up to where the answer begins, with the placeholder of the image or video.

    Raises:
        InputError: The processor has no chat template, or the question holds the placeholder.
    """
    content = [] if shown is None else [{"type": shown}]
    return render_messages(
        processor, [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    )


def render_messages(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of a conversation in the model's own chat template.

    Args:
        processor: The model's processor.
        messages: The conversation as chat templates take it: a `role` each, and as `content` a list
            of parts such as `{"type": "image"}` and `{"type": "text", "text": "..."}`.

    Returns:
        The text up to where the answer begins, with a placeholder for every image.

    Raises:
        InputError: The processor has no chat template, or a text holds the placeholder.
    """
    for text in [part.get("text", "") for message in messages for part in message["content"]]:
        for what, one in (("image", "an image"), ("video", "a video")):
            placeholder = getattr(processor, f"{what}_token", None)
            if placeholder and placeholder in text:
                raise InputError(
                    f"The question {text!r} holds {placeholder}, which stands for {one}; leave "
                    f"it out, the chat template places the {what}."
                )
    if getattr(processor, "chat_template", None) is None:
        raise InputError(
            f"{type(processor).__name__} has no chat template, so the prompt is unknown; load the "
            "processor of an instruction-tuned checkpoint, or set processor.chat_template."
        )
    prompt: str = processor.apply_chat_template(list(messages), add_generation_prompt=True)
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
    resize: Resize | None = None,
) -> BatchFeature:
    """The inputs of a model for a batch of samples, padded on the left.

    Args:
        processor: The model's processor, with a chat template.
        samples: One or more samples; samples without an image give text-only prompts.
        device: Where the tensors go.
        dtype: Floating dtype of the pixels, that of the model; None leaves float32.
        resize: As in `prompt_inputs`.

    Returns:
        `input_ids` and `attention_mask`, both (B, L), and `pixel_values` of the samples' images in
        order, or of their videos `pixel_values_videos`; ready for `model(**inputs)` and
        `model.generate(**inputs)`.

    Raises:
        InputError: An image cannot be read, or the processor refuses the samples; for a batch of
            several, ask for one at a time to learn which.
    """
    return prompt_inputs(
        processor, [_prompt(processor, sample) for sample in samples], device, dtype, resize
    )


def _prompt(processor: Any, sample: Sample) -> Prompt:
    """The prompt of a sample."""
    seen = sample.load()
    if seen is None:
        return Prompt(sample.id, render(processor, sample.question, shown=None), ())
    if not isinstance(seen, Video):
        return Prompt(sample.id, render(processor, sample.question), (seen,))
    check_takes_videos(processor)
    return Prompt(sample.id, render(processor, sample.question, shown="video"), (), (seen,))


def check_takes_videos(processor: Any) -> None:
    """Refuse a processor that takes no videos.

    Raises:
        InputError: Says why, and what to do.
    """
    name = type(processor).__name__
    if not hasattr(processor, "video_processor"):
        raise InputError(
            f"{name} takes no videos; ask about an image, or ask a model of videos, such as "
            "LLaVA-NeXT-Video, LLaVA-OneVision or Qwen-VL."
        )
    if processor.video_processor is None:
        raise InputError(
            f"The videos of {name} need torchvision: pip install 'pore-vlm[video]', then load the "
            "processor again."
        )


def adds_start(processor: Any, text: str) -> bool:
    """Whether the tokenizer is to add its start token to a prompt.

    A template that writes it itself must not get a second one.

    Args:
        processor: The model's processor.
        text: The prompt in its chat template.
    """
    start = getattr(processor.tokenizer, "bos_token", None)
    return not (start and text.startswith(start))


class Prompt(NamedTuple):
    """A prompt as a processor takes it.

    Attributes:
        id: Names it in messages.
        text: The whole text, in the model's chat template, with a placeholder for every image.
        images: Its images, in the order of their placeholders.
        videos: Its videos, likewise.
    """

    id: str
    text: str
    images: Sequence[PIL.Image.Image]
    videos: Sequence[Video] = ()


def prompt_inputs(
    processor: Any,
    prompts: Sequence[Prompt],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    resize: Resize | None = None,
) -> BatchFeature:
    """The inputs of a model for a batch of prompts, padded on the left.

    Args:
        processor: The model's processor.
        prompts: One or more prompts.
        device: Where the tensors go.
        dtype: Floating dtype of the pixels, that of the model; None leaves float32.
        resize: How images are made smaller, as by a method that `resizes`.

    Returns:
        As `build_inputs`.

    Raises:
        InputError: The processor refuses the prompts.
    """
    if resize is not None and resize.picture is not None:
        smaller = resize.picture
        prompts = [each._replace(images=list(map(smaller, each.images))) for each in prompts]
    images: list[Any] = [image for prompt in prompts for image in prompt.images]
    if all(prompt.images for prompt in prompts):
        # Of a flat list some processors, such as Gemma 3's, take all for images of one prompt.
        images = [list(prompt.images) for prompt in prompts]
    videos = [video for prompt in prompts for video in prompt.videos]
    seen: dict[str, Any] = {"images": images or None, **(resize.settings if resize else {})}
    if videos:
        numbers, rates = [v.numbers for v in videos], [v.rate for v in videos]
        seen |= video_arguments(stacked(videos), numbers, rates)
    try:
        inputs = processor(
            **seen,
            text=[prompt.text for prompt in prompts],
            padding=True,
            padding_side="left",
            add_special_tokens=adds_start(processor, prompts[0].text),
            return_tensors="pt",
        )
    except Exception as error:  # processors raise whatever their parts raise
        raise InputError(
            f"The processor refuses {', '.join(prompt.id for prompt in prompts)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    inputs.pop("labels", None)  # PaliGemma's are for training
    found: BatchFeature = inputs.to(device=device, dtype=dtype)
    return found
