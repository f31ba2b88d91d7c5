"""A tiny model with its processor, seven samples, and the model as a checkpoint folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.calibrations import make_processor, make_samples
from helpers.checkpoint import save_checkpoint
from helpers.models import tiny_llava
from helpers.survey import run_survey, some_methods
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.evaluation import running
from pore.evaluation.results import SurveyResult


@pytest.fixture(scope="session", autouse=True)
def _quick_timing() -> Iterator[None]:
    """Every method is timed once after it ran once; how long it takes tells nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_ROUNDS", 1)
        yield


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_llava(dtype=torch.float32)


@pytest.fixture(scope="session")
def processor() -> Any:
    return make_processor(do_center_crop=False)


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    kinds, thirds = ("color", "shape"), ("top", "middle", "bottom")
    return [
        replace(sample, kind=kinds[i % 2], third=thirds[i % 3] if i % 2 else None)
        for i, sample in enumerate(make_samples(7))
    ]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some methods are there."""
    monkeypatch.setattr(Pruner, "registry", some_methods())


@pytest.fixture(scope="session")
def surveyed(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SurveyResult, list[tuple[str, float]]]:
    """What came of a survey of some methods, and what was told of its progress."""
    told: list[tuple[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pruner, "registry", some_methods())
        out = tmp_path_factory.mktemp("survey")
        return run_survey(checkpoint, out, progress=lambda *now: told.append(now)), told
