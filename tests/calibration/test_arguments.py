"""What calibration refuses to begin with, and what it shows while it goes on."""

from __future__ import annotations

from typing import Any

import pytest

import pore
from helpers.calibrations import LAYERS, make_processor, run
from helpers.models import tiny_llava
from pore.bench.measuring import measure, measure_calibration
from pore.data.samples import Sample
from pore.errors import BudgetError, InputError, ModelStateError, UnsupportedModelError


@pytest.mark.parametrize("layer", [0, LAYERS, -1, True, 1.5])
def test_layer_out_of_range(model: Any, processor: Any, samples: list[Sample], layer: Any) -> None:
    with pytest.raises(BudgetError, match="cannot be the first pruned layer"):
        run(model, processor, samples, layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"every": 0}, "every"),
        ({"limit": -1}, "limit"),
        ({"max_bad": float("nan")}, "max_bad"),
        ({"normalize": "row"}, "normalize"),
    ],
)
def test_arguments_out_of_range(
    model: Any, processor: Any, samples: list[Sample], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(pore.PoreError, match=message):
        run(model, processor, samples, **settings)


def test_options_that_there_are_not(model: Any, processor: Any) -> None:
    unknown: dict[str, Any] = {"batchsize": 4}
    for call in (
        lambda: pore.calibrate(model, processor, [], 2, **unknown),
        lambda: pore.calibrate_guide(model, processor, [], max_new_tokens=1, **unknown),
        lambda: measure(model, [], **unknown),
        lambda: measure_calibration(model, **unknown),
    ):
        with pytest.raises(TypeError, match=r"^(calib|meas).*'batchsize'; .*takes batch_size, "):
            call()


def test_pruned_model_is_refused(model: Any, processor: Any, samples: list[Sample]) -> None:
    with (
        pore.FastV(keep=4, layer=2)(model),
        pytest.raises(ModelStateError, match="already pruned by FastV"),
    ):
        run(model, processor, samples)


def test_text_only_model_is_refused(processor: Any, samples: list[Sample]) -> None:
    from transformers import LlamaForCausalLM

    config = tiny_llava().config.text_config
    with pytest.raises(UnsupportedModelError, match="no vision tower in its config"):
        run(LlamaForCausalLM(config), processor, samples)


def test_processor_without_template_is_refused(model: Any, samples: list[Sample]) -> None:
    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        run(model, processor, samples)


def test_progress_is_for_terminals(
    model: Any,
    processor: Any,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(model, processor, samples)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    run(model, processor, samples)
    shown = capsys.readouterr().err
    assert "calibrating" in shown
    assert "13/13" in shown
    assert "samples/s" in shown
    run(model, processor, samples, progress=False)
    assert capsys.readouterr() == ("", "")
