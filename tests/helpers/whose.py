"""Models and pictures for tests that ask whose results these are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pore
from helpers.calibrations import LAYERS, K, make_processor, make_samples
from helpers.models import tiny_llava
from pore.calibration.calibrating import calibrate, calibrate_guide
from pore.calibration.host import HostCalibration
from pore.calibration.sums import Calibration
from pore.data.loading import load_model
from pore.data.samples import Sample


@dataclass
class Call:
    """The inputs of a call; a test changes one of them between two calls."""

    model: Any
    processor: Any
    samples: list[Sample]
    folder: Path


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """A model from a folder named "tiny", and pictures in another folder."""
    folder = tmp_path / "first"
    (folder / "pictures").mkdir(parents=True)
    model = tiny_llava(layers=LAYERS, dtype=torch.float32)
    model.save_pretrained(folder / "tiny")
    make_processor(do_center_crop=False).save_pretrained(folder / "tiny")
    samples = []
    for i, sample in enumerate(make_samples(9)):
        path = folder / "pictures" / f"{i}.png"
        sample.load_image().save(path)
        samples.append(replace(sample, image=path))
    return Call(*load_model(str(folder / "tiny")), samples, folder)


def by_layer(call: Call, samples: Any, **given: Any) -> Calibration:
    return calibrate(call.model, call.processor, samples, K, **{"batch_size": 4, **given})


def by_host(call: Call, samples: Any, **given: Any) -> HostCalibration:
    host = pore.PyramidDrop(4, (1, 2, 4))
    return calibrate(call.model, call.processor, samples, host=host, **{"batch_size": 4, **given})


def by_guide(call: Call, samples: Any, **given: Any) -> Calibration:
    return calibrate_guide(
        call.model, call.processor, samples, max_new_tokens=1, **{"batch_size": 4, **given}
    )


ways = pytest.mark.parametrize("way", [by_layer, by_host, by_guide])
