"""P for images of any size on the embedded model: which form carries over to sizes not measured.

    python training/other_sizes.py --out runs/other-sizes.json

The tower's position embeddings are interpolated for pictures of other sides, as for the real
language model (`real_language_model.tower_of`), and nothing is trained. Pictures have as many
objects per area (`canvas.py`). Every form of P is fitted to calibration pictures of 96 and 128
pixels, and tried on those of 160 and 192: how far it is off there, and which share of the asked
objects' patches FastV keeps by it on test pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from canvas import Asked, asked
from PIL import Image
from real_language_model import tower_of
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pore
from pore._files import write_atomic
from pore.bias.any_size import AnySizeBias
from pore.bias.where import Where
from pore.calibration.sums import Calibration
from pore.data.prompts import build_inputs
from pore.embedded import embedded_model
from pore.evaluation.running import evaluate
from pore.families.registry import images_of
from pore.layout import Layout

SIDES = (96, 128, 160, 192)
FITTED = (96, 128)
FORMS = {
    "distance, power": ("power", "distance"),
    "distance, spline": ("spline", "distance"),
    "raster, spline": ("spline", "raster"),
    "place, spline": ("spline", "place"),
}
LAYER, KEEP = 2, 0.25
FIRST = 3_000_000  # pictures that nothing else here has looked at


def model_of(side: int) -> tuple[Any, Any]:
    """The embedded model and its processor for pictures of another side."""
    model = LlavaForConditionalGeneration.from_pretrained(embedded_model()).eval()
    tower = tower_of(side)
    model.model.vision_tower = tower
    model.config.vision_config = tower.config
    model.config.image_seq_length = (side // tower.config.patch_size) ** 2
    processor = AutoProcessor.from_pretrained(embedded_model())
    sides = {"height": side, "width": side}
    processor.image_processor.size = processor.image_processor.crop_size = sides
    return model, processor


def samples_of(questions: list[Asked]) -> list[pore.Sample]:
    """The questions as samples."""
    return [
        pore.Sample(
            str(one.index),
            Image.fromarray(one.canvas.image),
            one.question.question,
            one.question.answer,
        )
        for one in questions
    ]


def kept(model: Any, processor: Any, questions: list[Asked], bias: Any) -> np.ndarray:
    """The share of the asked objects' patches that FastV keeps, for every question."""
    shares = []
    samples = samples_of(questions)
    with torch.inference_mode(), pore.FastV(keep=KEEP, layer=LAYER, reweight=bias)(model) as run:
        for first in range(0, len(samples), 10):
            model(**build_inputs(processor, samples[first : first + 10]), logits_to_keep=1)
    for one, sample in zip(questions, run.report, strict=True):
        mask = np.zeros(len(one.patches), bool)
        mask[list(sample.images[0].kept)] = True
        shares.append(mask[one.patches].mean())
    return np.array(shares)


def gain(shares: np.ndarray, plain: np.ndarray) -> list[float]:
    """The mean difference between paired shares, and 1.96 standard errors of it."""
    difference = shares - plain
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return [float(difference.mean()), float(1.96 * error)]


def off(bias: AnySizeBias, measured: Calibration, layout: Layout) -> float:
    """By what factor P is off at a size, as the standard deviation of ln(geometric mean / P)."""
    found = measured.mean_attention("geometric").log()
    return float((found - bias.at(Where(layout))[0].log()).std())


def together(measured: Mapping[int, Calibration]) -> Calibration:
    """The sums over pictures of all sizes, as if of one model: the decoder is the same."""
    first, *others = (replace(one, provenance=pore.Provenance()) for one in measured.values())
    for other in others:
        first = first.merge(other)
    return first


def main() -> None:
    """Measure, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=100)
    parser.add_argument("--test", type=int, default=105)
    given = parser.parse_args()
    models = {side: model_of(side) for side in SIDES}
    measured, tests, layouts, right = {}, {}, {}, {}
    for side, (model, processor) in models.items():
        some = samples_of(list(asked("calibration", FIRST, given.calibration, side)))
        measured[side] = pore.calibrate(model, processor, some, LAYER, progress=False)
        tests[side] = list(asked("test", FIRST, given.test, side))
        inputs = build_inputs(processor, some[:1])
        layouts[side] = Layout.of(images_of(model, inputs), inputs["attention_mask"].bool())
        found = evaluate(model, processor, samples_of(tests[side]), max_new_tokens=8)
        right[side] = found.accuracy
        print(f"{side} pixels: {len(measured[side])} tokens, {100 * right[side]:.1f} % right")
    both = together({side: measured[side] for side in FITTED})
    rows: dict[str, Any] = {"right": right}
    forms = {name: both.fit_any_size(kind, over) for name, (kind, over) in FORMS.items()}  # type: ignore[arg-type] # names of `FORMS`
    for side in SIDES:
        own = measured[side].fit("spline", mean="geometric").allowing("weights", "config", "model")
        plain = kept(*models[side], tests[side], None)
        row = {"none": [float(plain.mean()), 0.0]}
        row["its own, spline"] = gain(kept(*models[side], tests[side], own), plain)
        errors = {}
        for name, bias in forms.items():
            errors[name] = off(bias, measured[side], layouts[side])
            row[name] = gain(kept(*models[side], tests[side], bias), plain)
        flat = float(measured[side].mean_attention("geometric").log().std())
        rows[str(side)] = {"kept": row, "off": {"none": flat, **errors}}
        print(side, rows[str(side)], flush=True)
    write_atomic(given.out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
