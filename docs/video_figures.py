"""Draw what the methods for videos keep of eight frames, for methods.md.

    python docs/video_figures.py

Writes `docs/images/moving.gif`, a video for the commands of the documents, and
`docs/images/methods/<method>.png`: a scene in which two objects move, 40 % of the tokens
kept, by the embedded model, which gets the frames as images. Frames lie in two rows of four, to be
read as text is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pore
from pore import plotting
from pore.embedded import embedded_model, scenes, videos
from pore.embedded.drawing import draw
from pore.engine.pruner import Pruner

FOLDER = Path(__file__).parent / "images" / "methods"
ROWS, COLUMNS, SIDE = 2, 4, 12
KEEP = 0.4


def frames() -> list[np.ndarray]:
    """A scene whose first object moves to the right, and whose last moves up."""
    scene, _ = next(pair for pair in scenes.questions("test", 200) if len(pair[0].things) == 6)
    first, *others, last = scene.things
    moved = []
    for step in range(ROWS * COLUMNS):
        right = replace(first, x=10 + 10 * step)
        up = replace(last, y=85 - 10 * step)
        moved.append(draw("test", 0, (right, *others, up)))
    return moved


def film() -> None:
    """Write a calibration video, in which a cross moves down, and a ring and a circle appear."""
    *_, video = videos.questions("calibration", 13)
    first, *others = map(Image.fromarray, video.frames)
    path = FOLDER.parent / "moving.gif"
    first.save(path, save_all=True, append_images=others, duration=250, loop=0)


def main() -> None:
    """Draw all."""
    film()
    folder = embedded_model()
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    video = frames()
    content = [{"type": "image"}] * len(video) + [{"type": "text", "text": "What moves?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    images = [Image.fromarray(frame) for frame in video]
    inputs = processor(images=images, text=text, return_tensors="pt")
    rows = [np.concatenate(video[i * COLUMNS : (i + 1) * COLUMNS], 1) for i in range(ROWS)]
    whole = np.concatenate(rows)
    methods = (pore.EVS, pore.VidCom2, pore.DyCoke, pore.FastVID, pore.HoliTom, pore.FlashVID)
    for kind in (pore.UniformFrames, *methods, pore.FrameFusion):
        pruner: Pruner = kind(KEEP, images_as_frames=True)
        with torch.no_grad(), pruner(model) as run:
            model(**inputs)
        places = [
            (frame // COLUMNS * SIDE + token // SIDE) * COLUMNS * SIDE
            + frame % COLUMNS * SIDE
            + token % SIDE
            for frame, image in enumerate(run.report.samples[0].images)
            for token in image.kept
        ]
        panel = plotting.Panel(pruner.name, None, places)
        figure = plotting.kept_tokens(whole, [panel], (ROWS * SIDE, COLUMNS * SIDE))
        figure.set_size_inches(9.5, 2.9)
        plotting.save(figure, FOLDER / f"{pruner.name.lower()}.png", dpi=90)


if __name__ == "__main__":
    main()
