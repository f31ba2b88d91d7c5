"""Corrections find the bias that attention was given, and what is kept is counted rightly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import attention_rows
import kept_objects
import numpy as np
import offline_corrections as offline
import pytest
import torch
from canvas import asked
from transformers import LlavaForConditionalGeneration

import pore
from pore.embedded import embedded_model

N, HEADS = 36, 3


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(embedded_model()).eval()


def made_up(questions: int, seed: int) -> tuple[offline.LayerRows, np.ndarray, np.ndarray]:
    """Attention P · Â with a bias over two axes and a few patches that are 8 times as strong.

    Returns:
        The rows, the bias ``(N,)`` and the strong patches ``(questions, N)``.
    """
    rng = np.random.default_rng(seed)
    bias = np.outer(np.linspace(1, 6, 6), [3, 1, 1, 1, 1, 3]).reshape(-1)
    bias /= bias.mean()
    asked_about = np.argsort(rng.random((questions, N)))[:, :4]
    patches = np.zeros((questions, N), bool)
    np.put_along_axis(patches, asked_about, True, 1)
    worth = np.exp(0.2 * rng.standard_normal((questions, N))) * np.where(patches, 8, 1)
    attention = (bias * worth)[:, None] * np.ones((1, HEADS, 1))
    flat = np.broadcast_to(bias, (questions, N))
    return (
        offline.LayerRows(attention, np.log(worth)[:, None], flat, attention.mean(1)),
        bias,
        patches,
    )


CALIBRATION, BIAS, _ = made_up(400, 0)
TEST, _, PATCHES = made_up(200, 1)


@pytest.mark.parametrize(
    "name",
    [
        "empirical",
        "rows x columns",
        "geometric mean",
        "median",
        "empirical by head",
        "geometric mean by head",
        "without RoPE",
        "null token, P/Q",
    ],
)
def test_what_is_asked_about_is_found_under_the_bias(name: str) -> None:
    def share(correction: offline.Correction) -> float:
        scores = correction(CALIBRATION)(TEST)
        return float(kept_objects.shares(scores, PATCHES, 4).mean())

    assert share(offline.nothing) < 0.9
    assert share(offline.FIXED[name]) > 0.97


def test_every_correction_gives_a_score_to_every_token() -> None:
    options = [*offline.FIXED.values()]
    options += [one for named in offline.CHOSEN.values() for one in named.values()]
    for correction in options:
        scores = correction(CALIBRATION)(TEST)
        assert scores.shape == PATCHES.shape
        assert np.isfinite(scores).all()


def test_an_error_is_a_factor_that_differs_from_place_to_place() -> None:
    assert offline.log_error(BIAS * 7, BIAS) == pytest.approx(0)
    off = np.where(np.arange(N) % 2, 2.0, 0.5)
    assert offline.log_error(BIAS * off, BIAS) == pytest.approx(np.log(2))


def test_the_curve_with_the_least_held_out_error_is_chosen() -> None:
    assert offline.best_curve(CALIBRATION) == "empirical"
    few = replace(CALIBRATION[:4], attention=np.exp(np.linspace(0, 1, N)) * np.ones((4, 1, N)))
    rng = np.random.default_rng(0)
    noisy = replace(few, attention=few.attention * np.exp(rng.standard_normal((4, 1, N))))
    assert offline.best_curve(noisy).startswith("exponential")


def test_a_strength_is_chosen_on_the_other_half() -> None:
    def judge(scores: np.ndarray, questions: np.ndarray) -> float:
        return -float(np.log(scores.mean(0)).std())

    chosen = offline.best_strength(CALIBRATION, offline.CHOSEN["geometric mean, strength"], judge)
    assert chosen == 1.0


def test_ties_go_to_the_first() -> None:
    scores = np.array([[1.0, 2.0, 1.0, 1.0]])
    assert kept_objects.kept(scores, 2).tolist() == [[True, True, False, False]]


def test_shares_are_of_the_patches_asked_about() -> None:
    scores = np.arange(9.0)[None]
    patches = np.zeros((1, 9), bool)
    patches[0, [0, 1, 8]] = True
    assert kept_objects.shares(scores, patches, 3).tolist() == [1 / 3]
    thirds = kept_objects.in_thirds(patches)
    assert {name: int(part.sum()) for name, part in thirds.items()} == {
        "top": 2,
        "middle": 0,
        "bottom": 1,
    }
    assert kept_objects.budgets(144) == (72, 36, 14)


def test_a_difference_is_paired() -> None:
    theirs = np.array([0.0, 50.0, 100.0, 20.0])
    found = kept_objects.Difference.between(theirs - [10, 12, 8, 10], theirs)
    assert found.mean == pytest.approx(-10)
    assert found.half_width == pytest.approx(1.96 * np.std([10, 12, 8, 10], ddof=1) / 2)
    assert found.is_harm


def test_position_explains_what_it_was_given_to_explain() -> None:
    flat = replace(CALIBRATION, attention=CALIBRATION.attention / BIAS)
    assert offline.explained_by_position(flat) < 0.02
    assert offline.explained_by_position(CALIBRATION) > 0.3
    assert offline.spread_follows_mean(CALIBRATION) == pytest.approx(1, abs=0.2)


LAYERS = (1, 4)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[attention_rows.Rows, list[Any]]:
    """Rows of the embedded model about four questions, and what the model is given for them."""
    recorder = attention_rows.Recorder(embedded_model(), LAYERS)
    stream = list(asked("train", 0, 4, 96))
    folder = tmp_path_factory.mktemp("rows")
    for i, one in enumerate(stream):
        np.savez(folder / f"{i}.npz", **vars(recorder(one)))
    return attention_rows.load(folder), [
        attention_rows.inputs_of(recorder.processor, one) for one in stream
    ]


def in_the_library(name: str, rows: offline.LayerRows) -> Any:
    """The library's correction of a name in `offline.FIXED`, fitted to the same rows."""
    if name.endswith(" by head"):
        kind = name.removesuffix(" by head")
        means = rows.attention.astype(np.float64).mean(0)
        return pore.corrections.HeadBiases(tuple(pore.PositionBias.fit(m, kind) for m in means))
    if name.startswith("null token"):
        by = "ratio" if name.endswith("P/Q") else "log ratio"
        return pore.corrections.NullTokenPrior(by=by)
    if name == "without RoPE":
        return pore.corrections.WithoutRoPE()
    return None if name == "none" else pore.PositionBias.fit(rows.mean, name)


@pytest.mark.parametrize(
    "name",
    [
        "none",
        "exponential",
        "empirical",
        "empirical by head",
        "without RoPE",
        "null token, P ln(P/Q)",
        "null token, P/Q",
    ],
)
def test_recorded_rows_keep_what_the_library_keeps(
    name: str,
    recorded: tuple[attention_rows.Rows, list[Any]],
    model: LlavaForConditionalGeneration,
) -> None:
    rows, inputs = recorded
    for i, layer in enumerate(LAYERS):
        here = offline.LayerRows(
            rows.attention[:, i], rows.plain[:, i], rows.null[:, i], rows.text[:, i]
        )
        wanted = kept_objects.kept(offline.FIXED[name](here)(here), 36)
        pruner = pore.FastV(
            keep=36,
            layer=layer + 1,
            reweight=in_the_library(name, here),
            normalize="visual" if name == "without RoPE" else "prompt",
        )
        with torch.inference_mode(), pruner(model) as run:
            for one in inputs:
                model(**one)
        for sample, keep in zip(run.report, wanted, strict=True):
            assert list(sample.images[0].kept) == np.flatnonzero(keep).tolist()


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no records"):
        attention_rows.load(tmp_path)
