"""Text of users is shown in figures as it is."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from matplotlib.figure import Figure
from matplotlib.text import Text

import pore
from helpers.nasty import ANY, NASTY, obeyed
from pore import plotting
from pore._text import for_figure
from pore.bias.any_size_fitting import Levels, fit_any_size
from pore.data.coverage import Coverage

GRID, N = (4, 6), 24
MEAN = 1e-3 * np.exp(0.05 * np.arange(N)) * (1 + 0.1 * np.cos(np.arange(N)))
IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def result(text: str, **given: Any) -> dict[str, Any]:
    return {
        "method": text,
        "reweight": None,
        "keep": text,
        "flops": 1e9,
        "accuracy": 0.5,
        "ci": [0.4, 0.6],
        "acts_in": "tower",
        "looks_at": [1],
        "guide": text,
        "third": text,
        "difference": 0.1,
        "p": 0.5,
        **given,
    }


def biased(text: str) -> Any:
    bias = pore.PositionBias.fit(MEAN, grid=GRID)
    object.__setattr__(bias, "kind", text)  # which its own check would refuse
    return bias


def layout(text: str) -> Figure:
    boxes = torch.tensor([[0.0, 0, 48, 32]])
    coverage = Coverage((48, 32), boxes, torch.zeros(1, dtype=torch.long), boxes.double())
    return plotting.layout(IMAGE, [coverage], title=text)


def layouts(texts: Sequence[str]) -> Figure:
    boxes = torch.tensor([[0.0, 0, 48, 32]])
    coverage = Coverage((48, 32), boxes, torch.zeros(1, dtype=torch.long), boxes.double())
    return plotting.layouts([plotting.Seen(IMAGE, [coverage], None, text) for text in texts])


def attention(texts: Sequence[str]) -> Figure:
    boxes = torch.tensor([[0.0, 0, 48, 32]]).double()
    coverage = Coverage((48, 32), boxes, torch.zeros(1, dtype=torch.long), boxes)
    return plotting.attention([coverage], {text: [[1.0]] for text in texts}, unit=texts[0])


def any_size(text: str) -> Figure:
    tokens = np.ones((2, 4))
    sizes, mean = np.array([12, 14]), tokens * np.arange(1, 5)
    levels = Levels(np.arange(4), sizes, mean, tokens, 0.1 * tokens)
    bias = fit_any_size(levels, [], "raster", "exponential", (64, 200), pore.Provenance())
    object.__setattr__(bias, "kind", text)
    return plotting.any_size(levels, bias)


def many(texts: Sequence[str]) -> Figure:
    methods = [*texts, *(f"{text}{i}" for i in (1, 2) for text in texts)]
    return plotting.accuracy_over_flops([*map(result, methods), result("unpruned")])


DRAWN: dict[str, Callable[[Sequence[str]], Figure]] = {
    "figure1": lambda texts: plotting.figure1(MEAN, biased(texts[0])),
    "figure2": lambda texts: plotting.figure2(MEAN, biased(texts[0]), 0.1 * MEAN),
    "accuracy_over_flops": lambda texts: plotting.accuracy_over_flops([*map(result, texts)]),
    "accuracy_over_flops, many": many,
    "differences": lambda texts: plotting.differences(
        [*map(result, texts), *(result(text, third=None) for text in texts)]
    ),
    "corrections": lambda texts: plotting.corrections(
        [result(text, third=None, reweight=text) for text in texts]
    ),
    "kept_tokens": lambda texts: plotting.kept_tokens(
        IMAGE,
        [plotting.Panel(text, True, (0, 1)) for text in texts],
        GRID,
        title=" ".join(text[:20] for text in texts),
    ),
    "any_size": lambda texts: any_size(texts[0]),
    "stability": lambda _: plotting.stability([(50, 0.97, 0.95), (100, 0.98, 0.97)], 100, 0.98),
    "layout": lambda texts: layout(" ".join(text[:20] for text in texts)),
    "layouts": layouts,
    "attention": attention,
    "strip": lambda texts: plotting.strip(
        [plotting.Frame(IMAGE, GRID, (1,), "frame 1")] * 4, title=" ".join(t[:20] for t in texts)
    ),
}
CHUNKS = [NASTY[i : i + 4] for i in range(0, len(NASTY), 4)]


def test_every_function_that_draws_is_tried() -> None:
    public = {
        name
        for name, function in inspect.getmembers(plotting, inspect.isfunction)
        if inspect.signature(function).return_annotation == "Figure" and not name.startswith("_")
    }
    assert public == {name.split(",")[0] for name in DRAWN}


@pytest.mark.parametrize(
    ("name", "texts"),
    [  # every function twice and every text once at least, the other pairs less often
        pytest.param(name, texts, marks=() if (i + j) % 4 == 0 else pytest.mark.slow)
        for i, name in enumerate(DRAWN)
        for j, texts in enumerate(CHUNKS)
    ],
)
@pytest.mark.in_ci(20)
def test_figures_show_text_as_it_is(name: str, texts: Sequence[str]) -> None:
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": True}):
        warnings.simplefilter("error")
        figure = DRAWN[name](texts)
        content = plotting.to_png(figure, dpi=30)
        shown = [one for one in figure.findobj(Text) if one.get_text()]
        assert not any(one.get_parse_math() or one.get_usetex() for one in shown)
        assert not any(obeyed(one.get_text()) for one in shown)
    with PIL.Image.open(io.BytesIO(content)) as image:
        assert max(image.size) < 2000
    for text in texts if name.startswith(("accuracy", "corr", "diff", "kept")) else ():
        begin = for_figure(text, 20).strip()[:5].strip()
        assert any(begin in one.get_text() for one in shown)


def test_legends_leave_nothing_out() -> None:
    (axis,) = plotting.accuracy_over_flops([result("_m")]).axes
    assert [t.get_text() for t in axis.get_legend().get_texts()] == [" _m"]


@settings(deadline=None, max_examples=8)
@given(ANY)
@pytest.mark.slow
def test_any_question_can_be_drawn(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plotting.to_png(DRAWN["kept_tokens"]([text]), dpi=20)
