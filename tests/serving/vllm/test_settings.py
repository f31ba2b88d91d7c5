"""What a server is asked to prune with, and what it refuses at its start."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pore
from cases import CASES
from helpers.models import tiny_llava
from pore.errors import InputError, PoreError, UnsupportedModelError
from pore.serving.vllm.plugin import check_settings
from pore.serving.vllm.settings import by_request, pruner_of, trial_side


def config(given: Any, case: str = "LLaVA-1.5") -> Any:
    """A model's config with settings."""
    found = next(one for one in CASES if one.name == case).model().config.to_dict()
    made = type(next(one for one in CASES if one.name == case).model().config).from_dict(found)
    made.pore = given
    return made


def test_a_method_by_its_settings(tmp_path: Path) -> None:
    given = {"method": "visionzip", "keep": 6, "contextual": 2}
    assert pruner_of(config(given)) == pore.VisionZip(keep=6, contextual=2)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(given))
    assert pruner_of(config(str(file))) == pore.VisionZip(keep=6, contextual=2)
    for keep in (0.25, "25%", "0.25"):
        assert pruner_of(config({"method": "DivPrune", "keep": keep})) == pore.DivPrune(keep=0.25)
    assert pruner_of(config({"method": "DivPrune", "keep": "4"})) == pore.DivPrune(keep=4)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, 'no "pore" with settings'),
        ([], 'no "pore" with settings'),
        ({"keep": 6}, "names no method"),
        ({"method": "FasterVLM"}, "has no budget"),
        ({"method": "FasterVLM", "keep": True}, "has no budget"),
        ({"method": "FasterVLM", "keep": [6]}, "has no budget"),
        ({"method": "FasterVLM", "keep": "many"}, "'many' is neither"),
        ({"method": "Nothing", "keep": 6}, "Nothing"),
        ({"method": "FasterVLM", "keep": 6, "layer": 2}, "no setting 'layer'"),
        ({"method": "VisionZip", "keep": 6, "contextual": "many"}, "contextual"),
        ({"method": "FasterVLM", "keep": 0}, "keep"),
        ({"by_request": True}, "takes no indices by request"),
    ],
)
def test_wrong_settings_are_refused(given: Any, reason: str) -> None:
    with pytest.raises(PoreError, match=reason):
        pruner_of(config(given))


@pytest.mark.parametrize(
    ("given", "case", "reason"),
    [
        ({"method": "FastV", "keep": 6}, "LLaVA-1.5", "looks into decoder layers"),
        ({"method": "PyramidDrop", "keep": 6}, "LLaVA-1.5", "VLLMClient"),
        ({"method": "TopV", "keep": 6}, "LLaVA-1.5", "looks into decoder layers"),
        ({"method": "G-Prune", "keep": 6}, "LLaVA-1.5", "leaves gaps"),
        ({"method": "HAWK", "keep": 6}, "Qwen2.5-VL", "looks into decoder layers"),
        ({"method": "ToMe", "keep": 6}, "Qwen2.5-VL", "cannot be used in Qwen2-VL"),
        ({"method": "EVS", "keep": 0.5}, "Qwen2.5-VL", "videos"),
    ],
)
def test_what_cannot_run_there_is_refused(given: Any, case: str, reason: str) -> None:
    with pytest.raises((UnsupportedModelError, InputError), match=reason):
        pruner_of(config(given, case))


def test_requests_choose_only_where_the_server_says_so() -> None:
    assert by_request(config({"by_request": True}, "Qwen2.5-VL"))
    assert not by_request(config({"method": "FasterVLM", "keep": 6}, "Qwen2.5-VL"))
    for wrong in ({"by_request": "yes"}, {"by_request": True, "keep": 6}, {"by_request": False}):
        with pytest.raises(InputError, match="and nothing else, or a method"):
            by_request(config(wrong, "Qwen2.5-VL"))


def test_the_front_end_says_why_in_one_error() -> None:
    """vLLM asks before it starts other processes."""
    check_settings(config({"by_request": True}, "Qwen2.5-VL"))
    check_settings(config({"method": "FasterVLM", "keep": 6}))
    for given, case, reason in (
        ({"by_request": True}, "LLaVA-1.5", "takes no indices by request"),
        ({"by_request": 1, "keep": 6}, "Qwen2.5-VL", "and nothing else"),
        ({"method": "FastV", "keep": 6}, "Qwen2.5-VL", "looks into decoder layers"),
        ("none.json", "LLaVA-1.5", "cannot be read"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            check_settings(config(given, case))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{nope")
    for path in (tmp_path / "none.json", tmp_path, broken):
        with pytest.raises(InputError, match=f'"pore" is .*{path.name}.*JSON file.*cannot be read'):
            pruner_of(config(str(path)))


@pytest.mark.parametrize("keep", [1, 0.9, 0.03, 0.002, 64, 576])
def test_the_picture_that_is_tried_out_leaves_something(keep: int | float) -> None:
    side = trial_side(keep)
    assert pore.FasterVLM(keep=keep).counts(side**2, 1)[-1] >= 1
    assert side <= 40


def test_the_picture_that_is_tried_out_is_not_huge() -> None:
    assert trial_side(1e-9) == 36
    assert trial_side(None) == 4


def test_settings_are_read_from_the_model_type_alone() -> None:
    """The config is all that the server's front end has of a model."""
    model = SimpleNamespace(config=tiny_llava().config)
    model.config.pore = {"method": "FasterVLM", "keep": 6}
    assert pruner_of(model.config).counts(16, 1) == [6]
