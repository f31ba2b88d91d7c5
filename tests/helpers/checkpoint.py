"""A checkpoint folder of a tiny random LLaVA with its processor, as the command line loads it."""

from __future__ import annotations

from pathlib import Path

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
