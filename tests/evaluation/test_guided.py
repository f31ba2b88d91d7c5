"""SGL in a survey, whose guide belongs to one batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pore
from helpers.calibrations import make_processor
from helpers.models import tiny_llava
from helpers.survey import SETTINGS, run_survey
from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.data.sources import load_samples
from pore.engine.pruner import Pruner
from pore.errors import InputError, UnsupportedModelError
from pore.evaluation import guided
from pore.evaluation.findings import footnotes
from pore.evaluation.guided import Guiding
from pore.evaluation.outcome import Outcome
from pore.evaluation.results import SurveyResult
from pore.evaluation.store import described
from pore.families.llava import Llava, llava_shape

pytestmark = pytest.mark.usefixtures("registry")


def explicit(
    guide: tuple[Any, Any], model: Any, processor: Any, keep: int, bias: Any
) -> list[tuple[str, Any]]:
    """Answers and what was kept for them, batch by batch, by hand."""
    samples, found = list(load_samples("embedded:test", limit=9)), []
    for first in range(0, 9, SETTINGS.batch_size):
        part = samples[first : first + SETTINGS.batch_size]
        seen, inputs = (
            build_inputs(one, part, torch.device("cpu"), torch.float32)
            for one in (guide[1], processor)
        )
        made = pore.guide(guide[0], seen, max_new_tokens=SETTINGS.max_new_tokens)
        with pore.SGL(keep, layer=2, guide=made, reweight=bias)(model) as run, torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        kept = [tuple(image.kept for image in sample.images) for sample in run.report]
        found += zip((text.strip() for text in texts), kept, strict=True)
    return found


def sgl(result: SurveyResult) -> list[Outcome]:
    return [outcome for outcome in result.outcomes if outcome.method == "SGL"]


def answered(outcome: Outcome) -> list[tuple[str, Any]]:
    return [(answer.given, answer.kept) for answer in outcome.answers]


def mean_importance(model: Any, processor: Any) -> torch.Tensor:
    samples = list(load_samples("embedded:calibration", limit=6))
    inputs = build_inputs(processor, samples, torch.device("cpu"), torch.float32)
    return pore.guide(model, inputs, max_new_tokens=3).importance.double().mean(0)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide") / "smaller"
    tiny_llava(layers=2, seed=3, dtype=torch.float32).save_pretrained(folder)
    make_processor(do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_sgl_equals_a_loop_over_guides(checkpoint: Path, surveyed: Any) -> None:
    result, _ = surveyed
    model, processor = load_model(str(checkpoint))
    (name,) = (name for name in result.biases if name.startswith("sgl"))
    (bias,) = result.biases[name]
    mean = mean_importance(model, processor)
    torch.testing.assert_close(bias.values, pore.PositionBias.fit(mean).values, rtol=1e-5, atol=0)
    plain, divided, *_ = outcomes = sgl(result)
    assert [(o.keep, o.reweight) for o in outcomes] == [
        *((8, None), (8, "exponential"), (4, None), (4, "exponential"))
    ]
    for outcome in outcomes:
        given = None if outcome.reweight is None else bias
        assert answered(outcome) == explicit(
            (model, processor), model, processor, outcome.keep, given
        )
    assert [a.kept for a in plain.answers] != [a.kept for a in divided.answers]
    record = plain.record()
    assert (record["guide"], record["layer"], record["acts_in"]) == ("itself", 2, "decoder")
    assert record["looks_at"] == [0, 1, 2, 3, 4]
    assert record["tokens_after"] == 8
    assert record["mean_tokens"] == pytest.approx((2 * 16 + 3 * 8) / 5)
    (line,) = (line for line in footnotes(result.records, result.taught) if line.startswith("§"))
    assert "Guided by the model itself" in line
    assert "saves nothing" in line


@pytest.mark.slow
def test_another_model_guides(
    checkpoint: Path, smaller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pruner, "registry", {"SGL": pore.SGL})
    made: list[Any] = []
    guide = guided.guide

    def counted(model: Any, *args: Any, **given: Any) -> pore.Guide:
        made.append(model)
        return guide(model, *args, **given)

    monkeypatch.setattr(guided, "guide", counted)
    other = load_model(str(smaller))
    settings = replace(SETTINGS, timing=False)
    result = run_survey(checkpoint, tmp_path, settings=settings, guide=other)
    assert made == [other[0]] * 3  # once a batch, whatever the budgets and P
    model, processor = load_model(str(checkpoint))
    ((bias,),) = result.biases.values()
    mean = mean_importance(*other)
    torch.testing.assert_close(bias.values, pore.PositionBias.fit(mean).values, rtol=1e-5, atol=0)
    assert (bias.provenance.host, bias.provenance.normalize) == ("SGL", "guide")
    assert bias.provenance.model == "smaller"
    for outcome in sgl(result):
        given = None if outcome.reweight is None else bias
        assert answered(outcome) == explicit(other, model, processor, outcome.keep, given)
    assert {(r["guide"], str(r["looks_at"])) for r in result.records[1:]} == {("smaller", "[]")}
    (line,) = footnotes(result.records, result.taught)
    assert line.startswith("§ Guided by smaller, which answers every question first")
    # The same again asks nothing; with another guide, SGL is asked anew.
    again = run_survey(checkpoint, tmp_path, settings=settings, guide=other)
    assert [o.answers for o in again.outcomes] == [o.answers for o in result.outcomes]
    assert len(made) == 3
    own = run_survey(checkpoint, tmp_path, settings=settings)
    assert len(made) == 6
    assert own.outcomes[0].answers == result.outcomes[0].answers
    assert [o.guide for o in sgl(own)] == ["itself"] * 4
    assert sorted(path.name[:4] for path in (tmp_path / "profiles").iterdir()) == ["sgl-"] * 2


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.slow
def test_a_guide_with_other_tokens_is_left_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setattr(Pruner, "registry", {"FastV": pore.FastV, "SGL": pore.SGL})
    side = {"height": 24, "width": 24}
    processor = make_processor(do_center_crop=False, size=side)
    guide = tiny_llava(side=3, dtype=torch.float32), processor
    if not known:  # the sizes of a model that only the first batch tells

        def refused(self: Llava, config: Any, decoder: DecoderShape) -> ModelShape:
            if config.vision_config.image_size == 24:
                raise UnsupportedModelError("no sizes")
            return llava_shape(config, decoder)

        monkeypatch.setattr(Llava, "shape", refused)
    settings = replace(SETTINGS, keeps=(8,), timing=False)
    result = run_survey(checkpoint, tmp_path, settings=settings, guide=guide)
    assert [record["method"] for record in result.records] == ["unpruned", "FastV", "FastV"]
    (one,) = result.left_out
    assert (one.method, one.keep) == ("SGL", 8)
    assert "cut" in one.reason
    assert "16" in one.reason
    assert "9" in one.reason
    assert "into the same tokens" in one.reason


def test_a_guided_method_prunes_nothing_itself(checkpoint: Path) -> None:
    model, processor = load_model(str(checkpoint))
    pruner = pore.SGL(4, layer=2, guide=Guiding(model, processor, max_new_tokens=3, itself=True))
    samples = list(load_samples("embedded:test", limit=2))
    inputs = build_inputs(processor, samples, torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match="belongs to one batch"), pruner(model):
        model(**inputs)
    assert described(pruner)["guide"]["model"] == "tiny"
