"""Write the checkpoint folder that the package ships, from the state of the last stage.

python training/export.py --state STATE/tune.pt --tokenizer STATE/tokenizer.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corpus import BOS, EOS, IMAGE, PAD
from model import MEAN, STD, build
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pore.embedded import embedded_model

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


def own_processor(tokenizer: Tokenizer) -> LlavaProcessor:
    """The processor of the embedded model."""
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": "<unk>"}
    return processor(tokenizer, 96, CHAT_TEMPLATE, IMAGE, model_max_length=1024, **special)


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


def save(model: LlavaForConditionalGeneration, made: LlavaProcessor, folder: Path) -> None:
    """Write weights in float16, a config that loads them in float32, and the processor."""
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )
    model.half().save_pretrained(folder)
    made.save_pretrained(folder)
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
    parser.add_argument("--folder", type=Path, default=Path(embedded_model()))
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    model = build(tokenizer)
    model.load_state_dict(torch.load(arguments.state, weights_only=True)["model"])
    save(model, own_processor(tokenizer), arguments.folder)


if __name__ == "__main__":
    main()
