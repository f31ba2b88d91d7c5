"""The biases published with the paper, and those of several stages in one file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.biases import PROVENANCE, noisy
from pore.bias import profiles
from pore.bias.position_bias import PositionBias
from pore.bias.stages import load_biases, save_biases
from pore.errors import ProfileError, ProfileMismatchError


class TestPublished:
    def test_all_are_there(self) -> None:
        assert len(profiles.available()) == 40
        for host, benchmark in profiles.available():
            bias = profiles.published(host=host, benchmark=benchmark)
            assert len(bias) == 576
            assert bias.grid == (24, 24)
            assert 1.8 < bias.growth < 14.5
            bias.check(n=576, model="liuhaotian/llava-v1.5-7b")

    def test_one(self) -> None:
        bias = profiles.published(host="PyramidDrop", benchmark="GQA")
        assert bias.rate == pytest.approx(0.00399)
        assert bias.provenance.source is not None
        assert "2508.17807v2" in bias.provenance.source
        with pytest.raises(ProfileMismatchError, match="model"):
            bias.check(model="llava-hf/llava-1.5-13b-hf")

    def test_others_are_not_invented(self) -> None:
        with pytest.raises(ProfileError, match=r"2\.79.*calibrate"):
            profiles.published(host="fastv", benchmark="gqa")
        with pytest.raises(ProfileError, match="there are vqav2"):
            profiles.published(host="himap", benchmark="imagenet")


def test_repr_says_what_it_is() -> None:
    text = repr(PositionBias.fit(noisy(0.004, 576, 0.1), grid=(24, 24), provenance=PROVENANCE))
    for part in ("exponential", "576 positions (24×24)", "last/first", "R²", "layer 2", "gqa"):
        assert part in text


def test_values_must_be_positive() -> None:
    for values in ([1.0, 0.0], [1.0, math.nan], [1.0, math.inf], [], [[1.0]]):
        with pytest.raises(ProfileError):
            PositionBias(torch.tensor(values), "empirical")
    for rate in (math.nan, math.inf, 1e9):
        with pytest.raises(ProfileError):
            PositionBias.exponential(rate, 9)


class TestBiasesOfAHost:
    def test_several_in_one_file(self, tmp_path: Path) -> None:
        biases = tuple(PositionBias.exponential(rate, 4) for rate in (0.1, -0.2, 0.3))
        path = save_biases(tmp_path / "new" / "p.json", biases)
        assert load_biases(path) == load_biases(path.parent, filename="p.json") == biases
        with pytest.raises(ProfileError, match="several stages"):
            PositionBias.load(path)

    def test_one_is_a_position_bias(self, tmp_path: Path) -> None:
        bias = PositionBias.exponential(0.1, 4)
        path = save_biases(tmp_path / "p.json", [bias])
        assert PositionBias.load(path) == bias
        assert load_biases(path) == (bias,)

    def test_none_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match="1 to 1024 stages"):
            save_biases(tmp_path / "p.json", [])

    @pytest.mark.parametrize(
        "change",
        [
            {"stages": []},
            {"stages": {}},
            {"stages": [1]},
            {"stages": None},
            {"version": 2},
            {"surplus": 1},
            {"schema": "pore.calibration"},
        ],
        ids=str,
    )
    def test_damage_is_refused(self, tmp_path: Path, change: dict[str, Any]) -> None:
        path = save_biases(tmp_path / "p.json", [PositionBias.exponential(0.1, 4)] * 2)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ProfileError, match=r"p\.json is no position bias"):
            load_biases(path)
