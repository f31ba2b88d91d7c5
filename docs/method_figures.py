"""Draw what every method keeps of one image, for methods.md.

    python docs/method_figures.py [METHOD ...]

Writes `docs/images/methods/<method>.png`: the first test scene with ten objects, a quarter of the
tokens kept, by the embedded model; hosts of PoRe without and with P, fitted on 200 calibration
questions (an exponential, or a spline where that is refused at some stage).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pore
from pore import plotting
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.data.sources import load_samples
from pore.embedded import embedded_model, scenes
from pore.errors import PoreError
from pore.evaluation.examples import seen_image
from pore.families.registry import shape_of

KEEP = 36
FOLDER = Path(__file__).parent / "images" / "methods"


def main(names: list[str]) -> None:
    """Draw these methods, or all."""
    folder = embedded_model()
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    shape = shape_of(model.config)
    scene, question = next(
        pair for pair in scenes.questions("test", 200) if len(pair[0].things) == 10
    )
    sample = Sample("figure", Image.fromarray(scene.image), question.question, question.answer)
    inputs = build_inputs(processor, [sample], torch.device("cpu"), torch.float32)
    seen = seen_image(model, processor, sample.load_image())
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, kind in pore.methods().items():
        pruner = kind.usual(KEEP, shape) if name in names or not names else None
        if pruner is None:
            continue
        settings = {name: pruner}
        if kind.reweightable:
            samples = load_samples("embedded:calibration", limit=200)
            measured = pore.calibrate(model, processor, samples, host=pruner)
            try:
                biases = measured.fit()
            except PoreError:  # too steep for an exponential at some stage
                biases = measured.fit("spline")
            bias = biases[0] if len(biases) == 1 else biases
            settings[f"{name} + PoRe"] = replace(pruner, reweight=bias)  # type: ignore[call-arg]
        panels, grid = [], (12, 12)
        for caption, one in settings.items():
            with torch.no_grad(), one(model) as run:
                model(**inputs)
            (image,) = run.report.samples[0].images
            panels.append(plotting.Panel(caption, None, image.kept, image.extra))
        figure = plotting.kept_tokens(seen, panels, grid)
        plotting.save(figure, FOLDER / f"{name.lower().replace(' ', '-')}.png", dpi=90)


if __name__ == "__main__":
    main(sys.argv[1:])
