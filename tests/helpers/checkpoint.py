"""What the command line reads: a folder with a tiny random LLaVA and its processor, and samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from helpers.calibrations import make_processor
from helpers.models import tiny_llava


def save_checkpoint(folder: Path) -> Path:
    """Write the checkpoint.

    Args:
        folder: Where; made if missing.

    Returns:
        The folder.
    """
    tiny_llava(dtype=torch.float32).save_pretrained(folder)
    make_processor(do_center_crop=False).save_pretrained(folder)
    return folder


def save_samples(folder: Path, count: int) -> Path:
    """Write images with one question each, and a JSONL file that lists them.

    Args:
        folder: Where.
        count: How many, at most 14, because the tokenizer has few words.

    Returns:
        The JSONL file.
    """
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "question": f"w{6 + i} w20", "answer": "w6", "kind": "k"}
        )
    path = folder / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path
