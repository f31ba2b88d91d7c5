"""A tiny checkpoint folder, six questions and a P measured on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from helpers.checkpoint import save_checkpoint
from helpers.command_line import run
from pore.bench.results import Rates
from pore.data import loading

_loaded: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads a model once, not by every command, and knows the device's rates without measuring."""
    load = loading.load_model

    def load_once(name: str, **how: Any) -> Any:
        key = (name, *how.items())
        if key not in _loaded:
            _loaded[key] = load(name, **how)
        return _loaded[key]

    monkeypatch.setattr(loading, "load_model", load_once)
    rates = Rates(flops=1e9, bandwidth=1e9)
    monkeypatch.setattr("pore.bench.measuring.device_rates", lambda *_: rates)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with questions, as a JSONL file."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "question": f"w{6 + i} w20", "answer": "w6", "kind": "k"}
        )
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="session")
def profile(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "p.json"
    samples = data / "samples.jsonl"
    printed = run(
        "calibrate", "-m", model, "-s", samples, "-o", out, "--figures", out.parent / "figures"
    )
    assert "PositionBias(exponential" in printed.output
    return out
