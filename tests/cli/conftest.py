"""A tiny checkpoint folder, six questions and a P measured on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoint import save_checkpoint, save_samples
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
    return save_samples(tmp_path_factory.mktemp("data"), 6).parent


@pytest.fixture(scope="session")
def profile(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "p.json"
    samples = data / "samples.jsonl"
    printed = run(
        "calibrate", "-m", model, "-s", samples, "-o", out, "--figures", out.parent / "figures"
    )
    assert "PositionBias(exponential" in printed.output
    return out
