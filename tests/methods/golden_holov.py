"""Golden files of HoloV: choices among given tokens, and from pixels to the decoder's input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pore
from helpers.golden_models import Worst, llava_of, visual_embeddings
from helpers.recording import Recording
from pore.engine.stages import Selection, View
from pore.errors import BudgetError
from pore.layout import Image, Layout
from pore.methods._tower import tower_attention
from pore.methods.holov import allocated, crop_order, crop_scores, crops_of
from pore.tower.stages import Encoded

_SELECTION = {"allocated", "attention", "features", "kept_indices", "kept_order", "tokens"}
_IDS = {"input_ids", "new_input_ids", "new_position_ids", "position_ids"}
_END_TO_END = {"attention", "features", "kept_indices", "kept_order", "pixel_values", "tokens"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    tensors: dict[str, Tensor] = file.tensors
    model = {k: v for k, v in tensors.items() if k.startswith(("weights.", "projector."))}
    keys = tensors.keys() - model.keys()
    if model:
        assert keys == _END_TO_END, keys ^ _END_TO_END
        return _check_end_to_end(file)
    if file.params["keep"] > tensors["attention"].shape[1]:
        with pytest.raises(BudgetError, match="than there are"):  # theirs adds vectors of zeros
            _select(file, faithful=True)
        return 0.0
    qwen = file.params["variant"] == "qwen"
    expected = _SELECTION | (_IDS if qwen else set())
    assert keys == expected, keys ^ expected
    _check_shares(file)
    worst = _check_selection(file, _select(file, faithful=True))
    if qwen:
        _check_ids(tensors, file.params["start"])
    return worst


def _method(params: dict[str, Any], faithful: bool) -> pore.HoloV:
    return pore.HoloV(params["keep"], params["crops"], params["alpha"], faithful)


def _view(features: Tensor, attention: Tensor) -> View:
    """What the stage sees of images (I, N, D), each in a prompt of its own."""
    images, n = features.shape[:2]
    layout = Layout.of(
        [Image(i, 0, range(n)) for i in range(images)], torch.ones(images, n, dtype=torch.bool)
    )
    encoded = tuple(
        Encoded(states[None], states[None], {"cls": weights[None, None]})
        for states, weights in zip(features, attention, strict=True)
    )
    return View(layout, features, None, None, torch.Generator(), nn.Identity(), tower=encoded)


def _select(file: Any, faithful: bool) -> Selection:
    view = _view(file.tensors["features"], file.tensors["attention"])
    (stage,) = _method(file.params, faithful).stages()
    return stage.rule(view)


def _check_shares(file: Any) -> None:
    """How many each crop gets; the file leaves out crops that are empty."""
    tensors, params = file.tensors, file.params
    images, n = tensors["attention"].shape
    index, there = crops_of([n] * images, [params["crops"]] * images)
    scores = crop_scores(
        tensors["features"], tensors["attention"], index, there, params["alpha"], scale_all=False
    )
    counts = torch.full((images,), params["keep"])
    shares = allocated(scores, there.any(-1), counts)
    assert torch.equal(shares, tensors["allocated"])
    order = crop_order(tensors["attention"], index, there, shares, params["keep"])
    assert torch.equal(order, tensors["kept_order"])


def _check_selection(file: Any, selection: Selection) -> float:
    tensors, worst, keep = file.tensors, Worst(), file.params["keep"]
    assert selection.features is not None
    assert selection.raster is not None
    assert selection.keep.sum(1).tolist() == [keep] * len(selection.keep)
    assert torch.equal(selection.raster[:, :keep], tensors["kept_order"])
    worst.compare(selection.features[:, :keep], tensors["tokens"])
    plain = _select(file, faithful=False).keep
    longer = plain.shape[1] // file.params["crops"] > 1  # no crop of one, which theirs weighs less
    for got, order, kept in zip(
        plain, tensors["kept_order"].tolist(), tensors["kept_indices"].tolist(), strict=True
    ):
        real = sorted(i for i in order if i >= 0)
        assert [i for i in kept if i >= 0] == real
        chosen = got.nonzero()[:, 0].tolist()
        assert len(chosen) == keep
        if longer:
            assert set(real) <= set(chosen)
    return worst.value


def _check_ids(tensors: dict[str, Tensor], start: int) -> None:
    """The rest of the prompt: a vector of zeros has the position of the last token of the cut."""
    order, n = tensors["kept_order"][0], tensors["attention"].shape[1]
    before, after = torch.arange(start), torch.arange(start + n, tensors["input_ids"].shape[1])
    index = torch.cat([before, start + order.where(order >= 0, torch.tensor(n - 1)), after])
    assert torch.equal(tensors["input_ids"][:, index], tensors["new_input_ids"])
    assert torch.equal(tensors["position_ids"][:, :, index], tensors["new_position_ids"])


def _check_end_to_end(file: Any) -> float:
    tensors, params, worst = file.tensors, file.params, Worst()
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    }
    first, last = tensors["projector.0.weight"], tensors["projector.2.weight"]
    projector = nn.Sequential(nn.Linear(*first.T.shape), nn.GELU(), nn.Linear(*last.T.shape))
    projector.load_state_dict(
        {k.removeprefix("projector."): v for k, v in tensors.items() if k.startswith("projector.")}
    )
    model = llava_of(params["config"], weights, projector, len(last))
    recording = Recording(_method(params, faithful=True))
    got, run = visual_embeddings(model, recording, tensors["pixel_values"])
    ((_, view, selection),) = recording.seen
    worst.compare(view.features, tensors["features"])
    worst.compare(tower_attention(view, "cls"), tensors["attention"])
    _check_selection(file, selection)
    worst.compare(got, tensors["tokens"])
    for sample, order in zip(run.report, tensors["kept_order"].tolist(), strict=True):
        assert list(sample.images[0].kept) == [i for i in order if i >= 0]
    return worst.value
