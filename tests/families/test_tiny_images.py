"""Images of one token, of four and of nine: every budget that there is, in every method."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch

import pore
from helpers.methods import EVERY, LAYERS
from helpers.models import IMAGE, tiny_llava
from pore.engine.pruner import Pruner
from pore.errors import BudgetError
from pore.families.registry import shape_of

SHARES = [1.0, 0.75, 0.5, 0.1]


@cache
def world(side: int) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A model of `side` squared tokens an image, two prompts, and what it says unpruned."""
    model = tiny_llava(layers=LAYERS, tower_layers=4, side=side)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, 8 * side, 8 * side, generator=generator, dtype=torch.float64)
    image = [IMAGE] * side**2
    ids = torch.tensor([[3, 4, *image, 5, 6, 7], [8, 4, *image, 9, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": pixels}
    with torch.no_grad():
        return model, inputs, model(**inputs).logits


def usual(name: str, keep: int | float, side: int) -> Pruner:
    made = pore.methods()[name].usual(keep, shape_of(world(side)[0].config))
    assert made is not None
    return made


ROUNDED = {"PyramidDrop": int, "PriorTR": int, "HAWK": math.ceil}
"""How methods bring a share to whole tokens, those that do it as their authors' code."""


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.at_once(8)
def test_every_budget_is_met_or_refused(name: str, side: int) -> None:
    model, inputs, dense = world(side)
    n, met = side**2, 0
    for keep in [*range(1, n + 1), *SHARES]:
        try:
            with torch.no_grad(), usual(name, keep, side)(model) as run:
                logits = model(**inputs).logits
        except BudgetError:
            # A share of nothing; what makes no grid; more than can be merged.
            assert keep * n < 1 or name in ("Downsample", "ToMe")
            continue
        met += 1
        wanted = keep if isinstance(keep, int) else round(keep * n)
        if isinstance(keep, float) and name in ROUNDED:
            wanted = ROUNDED[name](keep * n)
        for sample in run.report:
            (image,) = sample.images
            assert len(image.kept) + image.extra == wanted
        assert bool(torch.isfinite(logits).all())
        if wanted == n:
            assert torch.equal(logits, dense)
    assert met >= 2


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize(
    "name", [name for name in EVERY if "faithful" in {f.name for f in fields(usual(name, 1, 2))}]
)
@pytest.mark.at_once(8)
def test_as_the_authors_have_it_or_refused(name: str, side: int) -> None:
    """What their code cannot do either is said so, and nothing else goes wrong."""
    model, inputs, _ = world(side)
    rules: list[dict[str, Any]] = [{}]
    if name == "PruMerge+":
        rules = [{"rule": "effivlm"}, {"rule": "prumerge"}]
    for rule in rules:
        for keep in [*range(1, side**2 + 1), *SHARES]:
            with torch.no_grad(), suppress(BudgetError):
                pruner = replace(usual(name, keep, side), faithful=True, **rule)  # type: ignore[call-arg]
                with pruner(model):
                    assert bool(torch.isfinite(model(**inputs).logits).all())
