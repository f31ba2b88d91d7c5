"""What cannot be drawn is refused, by `pore plot` and `pore.plotting`, before a file is written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from helpers.command_line import run
from pore import plotting
from pore.bias.position_bias import PositionBias
from pore.errors import InputError

RESULT = {
    "method": "FastV",
    "reweight": None,
    "keep": 0.5,
    "layer": 2,
    "accuracy": 0.5,
    "ci": [0.4, 0.6],
    "accuracy_by_kind": {},
    "accuracy_by_third": {},
    "n": 10,
    "tokens_after": 4.0,
    "mean_tokens": 4.0,
    "acts_in": "decoder",
    "looks_at": [1],
    "guide": None,
    "flops": 1e9,
    "prefill_ms": None,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("accuracy", None),
        ("accuracy", "0.5"),
        ("accuracy", 1e30),
        ("accuracy", True),
        ("ci", [0.1]),
        ("ci", None),
        ("ci", [0.1, "x"]),
        ("ci", {"low": 0}),
        ("flops", "many"),
        ("flops", -1),
        ("flops", [1]),
        ("flops", 10**400),
        ("method", None),
        ("method", ["FastV"]),
        ("reweight", 3),
        ("keep", [1]),
        ("acts_in", 3),
        ("looks_at", None),
        ("looks_at", ["x"]),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([RESULT, RESULT | {field: value}]))
    found = run("plot", path, "-o", tmp_path / "figures", code=1)
    assert field in found.stderr
    assert not (tmp_path / "figures").exists()
    with pytest.raises(InputError, match=f"Result 2 .* its '{field}'"):
        plotting.accuracy_over_flops([RESULT, RESULT | {field: value}])


@pytest.mark.parametrize("field", ["accuracy", "flops"])
def test_results_that_are_nan_are_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"its '{field}' is nan"):
        plotting.accuracy_over_flops([RESULT | {field: float("nan")}])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[1]", "[[]]", "[{}]", "{}", "null", "[", "\x00", "3", '"x"'],
    ids=lambda content: repr(content[:10]),
)
def test_what_are_no_results_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results[red].json"
    path.write_text(content)
    found = run("plot", path, "-o", tmp_path / "figures", code=1)
    assert "results[red].json" in found.stderr
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
def test_one_result_and_results_of_equal_cost_are_drawn() -> None:
    unpruned = RESULT | {"method": "unpruned"}
    many = [RESULT | {"method": f"M{i}"} for i in range(9)]
    for records in ([unpruned], [RESULT], [unpruned, RESULT], many, [unpruned, *many]):
        assert len(plotting.to_png(plotting.accuracy_over_flops(records), dpi=30)) > 1000
    reweighted = [one | {"reweight": "spline"} for one in many]
    with pytest.raises(InputError, match="All results are with P"):
        plotting.accuracy_over_flops(reweighted)


N = 6
FLAT = np.full(N, 0.1)


@pytest.mark.parametrize("draw", [plotting.figure1, plotting.figure2])
@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (np.full(N, np.nan), "NaN"),
        (np.r_[np.nan, FLAT[1:]], "NaN"),
        (np.r_[np.inf, FLAT[1:]], "finite"),
        (-FLAT, "not negative"),
        (0 * FLAT, "zero everywhere"),
        (FLAT[:0], "Expected 6 numbers"),
        (FLAT[None], "Expected 6 numbers"),
    ],
)
def test_means_that_are_none_of_attention_are_refused(draw: Any, mean: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(mean, _bias(N))


def _bias(n: int) -> PositionBias:
    return PositionBias.fit(np.exp(0.1 * np.arange(n)), "empirical", grid=(1, n))


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
def test_one_token_and_tokens_without_attention_are_drawn() -> None:
    one = _bias(1)
    some = np.r_[0.0, FLAT[1:]]
    for figure in (
        plotting.figure1([0.3], one),
        plotting.figure2([0.3], one, [0.1]),
        plotting.figure2(some, _bias(N), 0 * some),
        plotting.figure2(FLAT, _bias(N), np.r_[np.nan, FLAT[1:]]),
    ):
        plotting.to_png(figure, dpi=30)
    with pytest.raises(InputError, match="finite"):
        plotting.figure2(FLAT, _bias(N), np.full(N, np.inf))
    with pytest.raises(InputError, match="A grid of 6"):
        plotting.figure1(FLAT, _bias(N), (-2, -3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1), (32, 48)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_pictures_of_any_shape_and_mode_are_drawn(shape: tuple[int, int], mode: str) -> None:
    picture = PIL.Image.new("RGB", shape, (200, 0, 0)).convert(mode)
    figure = plotting.kept_tokens(picture, [plotting.Panel("a", None, (0,))], (1, 1))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(shown, np.asarray(picture.convert("RGB")))
    with PIL.Image.open(io.BytesIO(plotting.to_png(figure, dpi=30))) as image:
        assert max(image.size) < 1000


def test_pictures_that_are_none_are_refused() -> None:
    panels = [plotting.Panel("a", cells=(4, 4))]
    with pytest.raises(InputError, match="uint8"):
        plotting.kept_tokens(np.zeros((4, 4)), panels, (1, 1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="uint8"):
        plotting.kept_tokens(np.zeros((0, 4, 3), dtype=np.uint8), panels, (1, 1))
    with pytest.raises(InputError, match="no averages on a grid of 4×4"):
        plotting.kept_tokens(np.zeros((3, 3, 3), dtype=np.uint8), panels, (1, 1))
    with pytest.raises(InputError, match="grid of 0×3"):
        plotting.kept_tokens(np.zeros((3, 3, 3), dtype=np.uint8), panels, (0, 3))
    with pytest.raises(InputError, match="no coverage"):
        plotting.layout(PIL.Image.new("RGB", (3, 3)), [])


def test_a_figure_never_replaces_another_of_the_same_run(tmp_path: Path) -> None:
    """Two files of one kind would be drawn under the same names."""
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([RESULT]))
    found = run("plot", tmp_path / "a.json", tmp_path / "b.json", "-o", tmp_path / "f", code=1)
    assert "2 of these files hold results" in found.stderr
    assert "--out" in found.stderr
    assert not (tmp_path / "f").exists()


def test_a_file_of_another_kind_is_named_by_it(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"schema": "pore.sweep", "version": 1}')
    found = run("plot", tmp_path / "sweep.json", "-o", tmp_path / "f", code=1)
    assert "its \"schema\" is 'pore.sweep', not" in found.stderr
