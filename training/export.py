"""Write a checkpoint folder that the package ships, from the state of the last stage.

python training/export.py --state STATE/count.pt --tokenizer STATE/tokenizer.json
python training/export.py --state STATE/videos.pt --tokenizer STATE/tokenizer.json --videos
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpus import BOS, EOS, IMAGE, PAD, VOCABULARY
from model import MEAN, STD, build
from moving import VISUAL
from tokenizers import AddedToken, Tokenizer
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from pore.embedded import embedded_model, embedded_video_model

VIDEO = "<video>"
"""The placeholder of videos, in a row that is added to the embeddings."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The template of llava-hf/llava-1.5-7b-hf."""

VIDEO_TEMPLATE = CHAT_TEMPLATE.replace(
    "{# Render all text next #}",
    "{# Render all videos next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\n' }}{% endfor %}"
    "{# Render all text finally #}",
)
"""The same with videos."""

SPECIAL: dict[str, Any] = {
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "unk_token": "<unk>",
    "model_max_length": 1024,
}


def own_processor(tokenizer: Tokenizer) -> LlavaProcessor:
    """The processor of the embedded model."""
    return processor(tokenizer, 96, CHAT_TEMPLATE, IMAGE, **SPECIAL)


def processor(
    tokenizer: Tokenizer, side: int, template: str, image: str, **settings: Any
) -> LlavaProcessor:
    """A stock processor: any image is resized to the square.

    Args:
        tokenizer: The tokenizer.
        side: Pixels of a side of the square.
        template: The chat template.
        image: The token that stands for an image.
        **settings: Of `PreTrainedTokenizerFast`: the other special tokens, and the longest prompt.
    """
    square = {"height": side, "width": side}
    images = CLIPImageProcessorPil(
        size=square, do_center_crop=False, crop_size=square, image_mean=MEAN, image_std=STD
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={"image_token": image},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **settings,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=wrapped,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token=image,
        num_additional_image_tokens=1,
    )


def of_videos(model: LlavaForConditionalGeneration) -> LlavaNextVideoForConditionalGeneration:
    """The same weights as a model that averages the patches of frames two by two.

    The placeholder of videos gets a row among the embeddings, and one of the output that is the
    row of the placeholder of images: neither is ever read or written.
    """
    config: Any = model.config
    text = {**config.text_config.to_dict(), "vocab_size": VOCABULARY + 1}
    made = LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=text,
            image_token_index=config.image_token_index,
            video_token_index=VOCABULARY,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_grid_pinpoints=[[96, 96]],
            image_seq_length=config.image_seq_length,
            video_seq_length=VISUAL,
            bos_token_id=text["bos_token_id"],
            eos_token_id=text["eos_token_id"],
            pad_token_id=text["pad_token_id"],
        )
    )
    weights = model.state_dict()
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        row = weights[name][config.image_token_index]
        weights[name] = torch.cat([weights[name], row[None]])
    weights["model.image_newline"] = torch.zeros(text["hidden_size"])
    made.load_state_dict(weights)
    return made


def save_video_processor(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the processor of the embedded video model, of which any frame becomes the square.

    Its part for videos cannot be made without torchvision, so that the files are written apart.
    """
    tokenizer.add_special_tokens([AddedToken(VIDEO, special=True, normalized=False)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )
    wrapped.save_pretrained(folder)
    square = {"height": 96, "width": 96}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 96},
        crop_size=square,
        image_grid_pinpoints=[[96, 96]],
        image_mean=MEAN,
        image_std=STD,
    )
    frames = CLIPImageProcessorPil(
        size=square, do_center_crop=False, crop_size=square, image_mean=MEAN, image_std=STD
    )
    settings = {
        "processor_class": LlavaNextVideoProcessor.__name__,
        "image_processor": images.to_dict(),
        "video_processor": {
            **frames.to_dict(),
            "video_processor_type": "LlavaNextVideoVideoProcessor",
            "do_sample_frames": False,
        },
        "image_token": IMAGE,
        "video_token": VIDEO,
        "num_additional_image_tokens": 1,
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
    }
    settings["image_processor"]["image_processor_type"] = "LlavaNextImageProcessor"
    del settings["video_processor"]["image_processor_type"]
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(VIDEO_TEMPLATE)


def save(model: Any, save_processor: Callable[[Path], object], folder: Path) -> None:
    """Write weights in float16, a config that loads them in float32, and the processor."""
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )
    model.half().save_pretrained(folder)
    save_processor(folder)
    (folder / "model.safetensors").chmod(0o644)

    def load_in_float32(config: dict[str, Any]) -> None:
        for part in (config, config["text_config"], config["vision_config"]):
            part["dtype"] = "float32"

    def name_stock_tokenizer(config: dict[str, Any]) -> None:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"

    edit(folder / "config.json", load_in_float32)
    edit(folder / "tokenizer_config.json", name_stock_tokenizer)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="checkpoint of a stage")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="of the checkpoint; default: the package's")
    parser.add_argument("--videos", action="store_true", help="of the stage on videos")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    model = build(tokenizer)
    model.load_state_dict(torch.load(arguments.state, weights_only=True)["model"])
    folder = arguments.folder or Path(
        embedded_video_model() if arguments.videos else embedded_model()
    )
    if arguments.videos:
        save(of_videos(model), partial(save_video_processor, tokenizer), folder)
    else:
        save(model, own_processor(tokenizer).save_pretrained, folder)


if __name__ == "__main__":
    main()
