"""Every saved correction says its form and the sizes it was measured on, and is held to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.sums import GRID, attention_of, layout_of, measured
from pore.bias.any_size import AnySizeBias
from pore.bias.coordinates import OVER
from pore.bias.position_bias import PositionBias
from pore.bias.where import Where
from pore.corrections import HeadBiases, load_corrections, save_corrections
from pore.errors import ProfileError, ProfileMismatchError

MEAN = attention_of(torch.linspace(1, 2, GRID[0] * GRID[1]).numpy(), 20).mean(0).tolist()
KINDS: Any = ("exponential", "exponential+offset", "spline", "empirical")
OF_ONE_SIZE = {
    **{kind: PositionBias.fit(MEAN, kind, grid=GRID) for kind in KINDS},
    "rope": PositionBias.rope(144, head_dim=8, text_tokens=3, grid=GRID),
    "spline, half strength": PositionBias.fit(MEAN, "spline", grid=GRID).with_strength(0.5),
    "per head": HeadBiases(tuple(PositionBias.fit(MEAN, kind, grid=GRID) for kind in KINDS[1:3])),
}


def of_any_size() -> dict[str, AnySizeBias]:
    found = {f"spline over {over}": measured(over).fit_any_size("spline", over) for over in OVER}
    found["power"] = measured("distance").fit_any_size("power")
    found["half strength"] = found["power"].with_strength(0.5)
    return found


@pytest.mark.parametrize("name", OF_ONE_SIZE)
def test_a_p_of_one_size_is_refused_at_others(name: str, tmp_path: Path) -> None:
    (saved,) = load_corrections(save_corrections(tmp_path / "p.json", [OF_ONE_SIZE[name]]))
    first = saved.biases[0] if isinstance(saved, HeadBiases) else saved
    assert isinstance(first, PositionBias)
    assert f"{first.kind}" in repr(saved)
    assert "144 positions (12×12)" in repr(saved)
    for grid, fits in ((GRID, True), ((12, 13), False)):
        where = Where(layout_of(grid, 5))
        tokens = grid[0] * grid[1]
        if isinstance(saved, HeadBiases):
            act = (saved.heads, torch.ones(1, len(saved.biases), 1, tokens), where)
        else:
            act = (saved.correct, torch.ones(1, tokens), where)
        if fits:
            act[0](*act[1:])
            continue
        with pytest.raises(ProfileMismatchError, match="144, here are 156"):
            act[0](*act[1:])


@pytest.mark.parametrize("name", of_any_size())
def test_a_p_of_any_size_warns_outside(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (saved,) = load_corrections(save_corrections(tmp_path / "p.json", [of_any_size()[name]]))
    assert isinstance(saved, AnySizeBias)
    assert f"{saved.kind} over the {saved.over}" in repr(saved)
    assert "images of 36 to 576 tokens" in repr(saved)
    saved.correct(torch.ones(1, 324), Where(layout_of((18, 18), 5)))  # in between
    assert not recwarn
    for grid in ((5, 7), (25, 25)):
        tokens = grid[0] * grid[1]
        with pytest.warns(
            UserWarning, match=f"36 to 576 visual tokens, and here is one of {tokens}"
        ):
            saved.correct(torch.ones(1, tokens), Where(layout_of(grid, 5)))


def test_a_file_of_another_form_says_how_it_is_read(tmp_path: Path) -> None:
    files = {
        PositionBias: OF_ONE_SIZE["spline"].save(tmp_path / "positions.json"),
        AnySizeBias: of_any_size()["power"].save(tmp_path / "any.json"),
        HeadBiases: OF_ONE_SIZE["per head"].save(tmp_path / "heads.json"),
    }
    readers: Any = (PositionBias, AnySizeBias, HeadBiases)
    for reader in readers:
        for kind, path in files.items():
            if kind is reader:
                assert isinstance(reader.load(path), kind)
            elif PositionBias in (kind, reader):
                with pytest.raises(ProfileError, match=r"pore\.corrections\.load_corrections"):
                    reader.load(path)
