"""What the page of `pore ui` reads, and what it shows: without a browser and without HTTP."""

from __future__ import annotations

import io
import json
from typing import Any

import PIL.Image
import pytest
import torch

import pore
from helpers.calibrations import make_processor
from helpers.models import tiny_llava
from helpers.serving import encoded, picture, traces
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.errors import BudgetError, InputError, PoreError, UnsupportedModelError
from pore.serving.asked import Asked
from pore.serving.looking import NONE, Looking, Seen, Viewer
from pore.serving.measured import Measured
from pore.serving.requests import Limits, RequestError
from pore.serving.served import Gone, Served
from pore.tensors.selection import budget
from processors import KINDS
from processors.base import parts_or_skip

IMAGE = picture()
P = pore.PositionBias.fit(torch.linspace(1, 3, 16).exp(), kind="empirical")
FORM = {
    "image": "data:",
    "question": "w6 w20",
    "method": "FastV",
    "keep": "25%",
    "layer": "",
    "correction": "P",
}


@pytest.fixture(scope="module")
def viewer() -> Viewer:
    model = tiny_llava(layers=6, tower_layers=6, dtype=torch.float32).eval()
    limits = Limits(new_tokens=5)
    served = Served("tiny", model, make_processor(do_center_crop=False), limits=limits)
    served.try_out()
    scenes = [Sample(str(i), picture(seed=i), "w6") for i in range(3)]
    measured = Measured(model, served.processor, scenes)
    found = {"P": [P], "measured": measured, "at 2": measured.of(pore.FastV(keep=4, layer=2))}
    return Viewer(served, found, ["rope", "without-rope"])


def asked(**given: str) -> Asked:
    return Asked.read(json.dumps(FORM | given).encode(), Limits())


def see(viewer: Viewer, **given: str) -> Seen:
    return Looking(viewer, asked(**given), encoded(IMAGE)).see()


def expected(viewer: Viewer, pruner: pore.Pruner | None) -> tuple[str, Any]:
    """The answer and the report, without a page."""
    model, processor = viewer.served.model, viewer.served.processor
    inputs = build_inputs(processor, [Sample("one", IMAGE, "w6 w20")], dtype=torch.float32)
    how: Any = {**inputs, "max_new_tokens": 5, "do_sample": False}
    report = None
    if pruner is None:
        tokens = model.generate(**how)
    else:
        with pruner(model) as run:
            tokens = model.generate(**how)
        report = run.report.samples[0]
    length = inputs["input_ids"].shape[1]
    return processor.decode(tokens[0, length:], skip_special_tokens=True).strip(), report


def test_the_form_is_read() -> None:
    assert asked() == Asked("data:", "w6 w20", "FastV", 0.25, None, "P")
    other = asked(keep=" 36 ", layer="3", question=" w6 ")
    assert (other.keep, other.layer, other.question) == (36, 3, "w6")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (b"nothing", "cannot be read as JSON"),
        (b"[]", "A request is a JSON object with the texts image, question"),
        (json.dumps({**FORM, "more": "x"}).encode(), "with the texts"),
        (json.dumps({**FORM, "keep": 4}).encode(), "with the texts"),
        ({"image": ""}, "There is no picture"),
        ({"question": " "}, "There is no question"),
        ({"keep": "many"}, "Budget: "),
        ({"layer": "-1"}, "K is the number of a decoder layer"),
        ({"layer": "²"}, "K is the number of a decoder layer"),
    ],
)
def test_what_is_no_question_is_refused(given: Any, reason: str) -> None:
    data = given if isinstance(given, bytes) else json.dumps(FORM | given).encode()
    with pytest.raises(RequestError, match=reason):
        Asked.read(data, Limits())


@pytest.mark.parametrize("correction", ["P", "rope", NONE])
@pytest.mark.at_once(1)
def test_sides_are_what_generate_gives(viewer: Viewer, correction: str) -> None:
    clean = traces(viewer.served.model)
    found = see(viewer, correction=correction)
    assert traces(viewer.served.model) == clean
    pruners: list[Any] = [None, pore.FastV(keep=0.25, layer=2)]
    if correction != NONE:
        pruners += viewer.pruners(asked(correction=correction), IMAGE)[0][1:]
        assert pruners[2].reweight is not None
    assert len(found.sides) == len(pruners)
    whole = len(found.sides[0].tokens) * (found.sides[0].tokens[0],)
    for side, pruner in zip(found.sides, pruners, strict=True):
        answer, report = expected(viewer, pruner)
        assert side.answer == answer
        assert side.tokens == (whole if report is None else report.tokens)
        assert (side.seen, side.left) == (16, 16 if report is None else 4)
        if report is not None:
            assert side.flops == report.flops
        assert 0 < side.prefill_ms < side.whole_ms
        assert side.kept is not None
        with PIL.Image.open(io.BytesIO(side.kept)) as drawn:
            assert drawn.format == "PNG"
    assert [side.title for side in found.sides[:2]] == ["Unpruned", "FastV"]
    assert found.sides[0].flops > found.sides[1].flops  # type: ignore[operator]
    assert (found.layer, found.notes) == (1, ())
    assert found.attention is not None


@pytest.mark.slow
def test_every_method_shows_something_or_says_why(viewer: Viewer) -> None:
    """A method is refused in words, or shows its sides."""
    clean = traces(viewer.served.model)
    refused = {}
    for name in viewer.methods:
        try:
            found = see(viewer, method=name, correction=NONE)
        except PoreError as error:
            refused[name] = str(error)
        else:
            assert [len(side.tokens) for side in found.sides] == [6, 6]
            assert (found.attention is None) == any("no attention" in n for n in found.notes)
        assert traces(viewer.served.model) == clean
    assert {"FastV", "VisionZip", "DivPrune", "SGL"} <= set(viewer.methods) - set(refused)
    assert not {"EVS", "VisionTrim", "Scored"} & set(viewer.methods)  # for videos; needs more
    assert len(refused) < 5


def test_a_method_without_attention_says_so(viewer: Viewer) -> None:
    found = see(viewer, method="DivPrune", correction=NONE)
    assert found.attention is None
    assert any("DivPrune does not rank by text-visual attention" in note for note in found.notes)


@pytest.mark.parametrize("correction", ["P", "measured", "at 2", "rope", "without-rope"])
def test_a_method_that_a_correction_does_not_fit_is_shown_without(
    viewer: Viewer, correction: str
) -> None:
    found = see(viewer, method="DivPrune", correction=correction)
    assert [side.title for side in found.sides] == ["Unpruned", "DivPrune"]
    assert f"DivPrune has nothing to divide by {correction}: shown without." in found.notes
    assert not any("--" in note or "pore " in note for note in found.notes)


@pytest.mark.slow
def test_p_is_measured_for_the_layer_that_is_chosen(viewer: Viewer) -> None:
    """Or shown without it, where it comes from a file."""
    for layer in ("1", "3", ""):
        titles = [side.title for side in see(viewer, layer=layer, correction="measured").sides]
        assert titles == ["Unpruned", "FastV", "FastV + measured"]
    assert len(see(viewer, layer="2", correction="at 2").sides) == 3
    found = see(viewer, layer="3", correction="at 2")
    assert [side.title for side in found.sides] == ["Unpruned", "FastV"]
    assert any("at 2 was measured for another layer" in note for note in found.notes)
    assert not any("--" in note or "pore " in note for note in found.notes)
    assert len(see(viewer, method="D2Pruner", correction="measured").sides) == 2


@pytest.mark.slow
def test_no_method_is_refused_for_the_correction_that_the_page_begins_with(
    viewer: Viewer, recwarn: pytest.WarningsRecorder
) -> None:
    for name in viewer.methods:
        if name == "PixelBudget":  # nothing smaller becomes fewer tokens in this model
            continue
        for correction in ("measured", "at 2"):
            titles = [side.title for side in see(viewer, method=name, correction=correction).sides]
            assert titles[0] == "Unpruned"
            assert len(titles) in (2, 3)


def test_harm_that_was_measured_is_said(viewer: Viewer) -> None:
    with pytest.warns(UserWarning, match="worse where that was measured"):
        found = see(viewer, method="PyramidDrop")
    assert any("worse where that was measured" in note for note in found.notes)


@pytest.mark.parametrize(
    ("given", "kind", "reason"),
    [
        ({"method": "Other"}, InputError, "There is no method 'Other'"),
        ({"correction": "../file"}, InputError, "There is no correction '../file'"),
        ({"method": "PixelBudget", "correction": NONE}, UnsupportedModelError, "in LLaVA-1.5"),
        ({"method": "D2Pruner", "correction": NONE}, InputError, "choose a correction"),
        ({"method": "D2Pruner", "correction": "at 2", "layer": "3"}, InputError, "choose another"),
        ({"keep": "17"}, BudgetError, "asks for more visual tokens"),
        ({"keep": "0"}, BudgetError, "would keep no visual token"),
        ({"layer": "60"}, PoreError, "60"),
        ({"method": "VisionZip", "layer": "2"}, InputError, "VisionZip has no layer K to choose"),
        ({"question": "w6 " * 1100}, InputError, r"takes 1024 in all\. Shorten it\.$"),
        ({"question": "an <image>"}, InputError, "stands for an image"),
    ],
)
def test_settings_are_refused_in_words(
    viewer: Viewer, given: dict[str, str], kind: type[Exception], reason: str
) -> None:
    clean = traces(viewer.served.model)
    with pytest.raises(kind, match=reason):
        see(viewer, **given)
    assert traces(viewer.served.model) == clean
    assert see(viewer).sides


def test_nothing_is_asked_for_a_visitor_who_is_gone(viewer: Viewer) -> None:
    before = viewer.served.metrics.text()
    looking = Looking(viewer, asked(), encoded(IMAGE))
    looking.cancel()
    with pytest.raises(Gone):
        looking.see()
    assert viewer.served.metrics.text() == before


@pytest.mark.slow
def test_pictures_of_any_size_and_smaller_ones() -> None:
    """Qwen2.5-VL, whose tokens are as many as the picture is large; PixelBudget shrinks it."""
    kind = next(kind for kind in KINDS if kind.name == "Qwen2.5-VL")
    processor, model = parts_or_skip(kind)
    served = Served("qwen", model, processor, limits=Limits(new_tokens=2))
    viewer = Viewer(served, {}, ["without-rope"])
    form = {"question": "look", "correction": "without-rope", "layer": "1"}
    file = encoded(picture(150, 100))
    found = Looking(viewer, asked(**form), file).see()
    seen = found.sides[0].seen
    assert [side.left for side in found.sides] == [seen, *[budget(0.25, seen)] * 2]
    assert found.attention is not None
    form = {"question": "look", "correction": NONE, "method": "PixelBudget", "keep": "50%"}
    sides = Looking(viewer, asked(**form), file).see().sides
    assert (sides[0].seen, len(set(sides[0].tokens))) == (seen, 1)
    assert sides[1].left <= seen / 2
    assert all(side.kept is not None for side in (*found.sides, *sides))
