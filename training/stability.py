"""How near the bootstrap of `Calibration.stability` comes to calibrating on other images.

    python training/stability.py

measures the embedded model on 1,000 questions in 20 parts, fits P to sets of 50 to 400 images that
have none in common, and prints what P of such a set does not share with P of all 1,000 of what is
kept, beside what the bootstrap says from the sums of such a set alone.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import get_args

import numpy as np
import torch

from pore.bias.curve import Kind
from pore.calibration.calibrating import calibrate
from pore.calibration.fits import Mean
from pore.calibration.sums import Calibration
from pore.calibration.typical import PARTS, Tokens, Typical
from pore.data.loading import load_model
from pore.data.sources import load_samples

IMAGES, PART, SETS, ASKED = 1000, 50, (1, 2, 4, 8), 4
KINDS: tuple[Kind, ...] = ("spline", "exponential", "empirical")


def parts() -> list[Calibration]:
    """Calibrations of the parts, K = 2."""
    model, processor = load_model("embedded", device="cpu")
    samples = list(load_samples("embedded:calibration", limit=IMAGES))
    return [calibrate(model, processor, samples[i : i + PART], 2) for i in range(0, IMAGES, PART)]


def merged(some: list[Calibration]) -> Calibration:
    """All of some calibrations."""
    return reduce(Calibration.merge, some)


def row(found: list[Calibration], size: int, kind: Kind, mean: Mean, keep: float) -> str:
    """A line of the table: one form of P, and sets of one size."""
    whole = merged(found)
    values = whole.mean_attention(mean)
    spread = whole.mean_of(whole.fit(kind, mean))[1].numpy() * math.sqrt(whole.count)
    third = np.arange(len(values)) * PARTS // len(values)
    typical = Typical(Tokens(values.numpy(), spread, third), keep)
    kept = typical.kept(whole.fit(kind, mean).values.numpy())
    sets = [merged(found[i : i + size]) for i in range(0, len(found) - size + 1, size)]
    apart = [typical.apart(typical.kept(one.fit(kind, mean).values.numpy()), kept) for one in sets]
    # A set is a part of all images, so that it is nearer to them than to others.
    real = float(np.mean(apart)) / math.sqrt(1 - size / len(found))
    said = [1 - one.stability(kind, keep, mean, times=[1.0]).here.usual for one in sets[:ASKED]]
    return (
        f"{mean:10} {kind:12} keep {keep:4.0%} {size * PART:4} images: "
        f"{real:6.2%} apart, the bootstrap says {np.mean(said):6.2%}"
    )


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    found = parts()
    for mean in get_args(Mean):
        for kind in KINDS:
            for keep in (0.25, 0.1):
                for size in SETS:
                    print(row(found, size, kind, mean, keep), flush=True)


if __name__ == "__main__":
    main()
