"""A method from its name and settings: as its authors set it up, but for what is given."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

import pore
from helpers.methods import LAYERS, model_of
from helpers.models import N
from pore.cost.flops import model_flops, paper_flops
from pore.errors import InputError, UnsupportedModelError
from pore.families.registry import sizes_of
from pore.methods.making import make


@pytest.fixture
def model() -> Any:
    return model_of()


@pytest.fixture
def unknown() -> Any:
    """A model of no family."""
    return SimpleNamespace(config=SimpleNamespace(model_type="unheard-of"))


def test_the_usual_set_up_but_for_what_is_given(model: Any) -> None:
    assert make("pyramiddrop", model, 6) == pore.PyramidDrop(6, (2, 4, 6))
    assert make(pore.PyramidDrop, model, 6, layers=(1, 3)) == pore.PyramidDrop(6, (1, 3))
    assert make("FastV", model, 0.5, texts=["layer=3", "normalize=visual"]) == pore.FastV(
        0.5, 3, normalize="visual"
    )


def test_none_is_not_given(model: Any) -> None:
    assert make("HiPrune", model, 6, layer=None, alpha=0.2).alpha == 0.2  # type: ignore[attr-defined]


def test_the_mean_over_the_layers(model: Any) -> None:
    made = make("PyramidDrop", model, 10, average=True)
    assert sum(made.counts(N, LAYERS)) / LAYERS == pytest.approx(10, abs=0.5)
    with pytest.raises(InputError, match="leave --set keep="):
        make("FastV", model, 10, average=True, texts=["keep=3"])


def test_a_model_of_no_family(unknown: Any) -> None:
    assert make("FastV", unknown, 6) == pore.FastV(6)
    with pytest.raises(UnsupportedModelError):
        make("FastV", unknown, 6, average=True)
    with pytest.raises(InputError, match="needs more than a budget: --set start_layer="):
        make("VTC-CLS", unknown, 6)
    assert make("VTC-CLS", unknown, 6, texts=["start_layer=-2"]) == pore.VTCCLS(6, -2)


def test_the_same_set_up_where_flops_are_not_known(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PyramidDrop", "HiPrune", "VTC-CLS", "V2Drop", "HAWK")
    known = [make(name, model, 6) for name in names]
    average = make("PyramidDrop", model, 10, average=True)

    def unknown(_: object) -> None:
        raise UnsupportedModelError("a decoder of another type")

    monkeypatch.setattr("pore.cost.decoders.DecoderShape.from_config", unknown)
    assert [make(name, model, 6) for name in names] == known
    assert make("PyramidDrop", model, 10, average=True) == average
    shape = sizes_of(model)
    for count in (partial(model_flops, shape), partial(paper_flops, shape.decoder)):
        with pytest.raises(UnsupportedModelError, match="only the number of layers is known"):
            count([9] * LAYERS)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("FastW", {}, "no method 'FastW'"),
        ("FastV", {"texts": ["layr=2"]}, "no setting 'layr'"),
        ("FastV", {"layr": 2}, "no setting 'layr'"),
        ("FastV", {"texts": ["layer=2"], "layer": 3}, "layer is given twice"),
        ("SGL", {}, "SGL needs a guide: `pore generate`"),
        ("Scored", {}, "Scored needs a scorer: make it in Python"),
    ],
)
def test_what_cannot_be_made(model: Any, method: str, settings: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(method, model, 6, **settings)
