"""Features of images and videos, made once for several settings, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from cases import CASES
from cases.base import Case
from helpers.families import PROMPTS
from pore.evaluation.features import Memory, encoding_once

# transformers 5.24 asks Llama 4 for pixels even where `generate` encoded them, and the made prompts
# with images and videos are not those of GLM-4V.
TAKEN = [
    pytest.param(case, name, id=f"{case.name} {name}")
    for case in CASES
    for name in ("several", "videos", "mixed")
    if (name == "several" or case.videos)
    and case.name != "Llama 4"
    and (case.name, name) != ("GLM-4V", "mixed")
]


@pytest.mark.at_once(4)
@pytest.mark.parametrize(("case", "name"), TAKEN)
def test_the_tower_runs_once_and_nothing_else_changes(case: Case, name: str) -> None:
    model: Any = case.model()
    inputs = case.inputs(PROMPTS[name])
    pruner = pore.FastV(keep=4, layer=2)

    def asked() -> list[Any]:
        with torch.inference_mode():
            given: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
            free = model.generate(**inputs, **given)
            with pruner(model) as run:
                pruned = model.generate(**inputs, **given)
        return [free, pruned, str(run.report)]

    plain, memory = asked(), Memory()
    names = set(vars(model.base_model))
    with encoding_once(model, memory):
        first, left = asked(), memory.left
        second = asked()
    assert memory.left == left < Memory().left
    assert set(vars(model.base_model)) == names
    for one in (first, second):
        assert all(torch.equal(x, y) for x, y in zip(one[:2], plain[:2], strict=True))
        assert one[2] == plain[2]


def test_what_is_remembered_is_the_whole_call() -> None:
    case = next(case for case in CASES if case.name == "Qwen2.5-VL")
    model: Any = case.model()
    prompts = PROMPTS["several"]
    one, other = case.inputs(prompts), case.inputs([prompts[1], prompts[0]])
    memory = Memory()
    with torch.inference_mode():
        expected = [model(**inputs).logits for inputs in (one, other)]
        with encoding_once(model, memory):
            found = [model(**inputs).logits for inputs in (one, other, one)]
    for found_one, expected_one in zip(found, [*expected, expected[0]], strict=True):
        assert torch.equal(found_one, expected_one)
    assert len(memory._held) == 2


def test_a_failed_block_leaves_the_model_as_it_was() -> None:
    model: Any = CASES[0].model()
    before = dict(vars(model.base_model))
    with pytest.raises(RuntimeError, match="Stop"), encoding_once(model, Memory()):
        raise RuntimeError("Stop.")
    assert vars(model.base_model) == before


def test_memory_is_bounded() -> None:
    memory, row = Memory(40), torch.zeros(4)  # 16 bytes
    for name in "abc":
        assert memory.hold(name, {"x": [row]}) == {"x": [row]}
    assert [memory.get(name) is None for name in "abc"] == [False, False, True]
    memory.drop("a")
    memory.drop("nothing")
    memory.hold("c", row)
    assert memory.get("c") is row
    memory.clear()
    memory.hold("d", torch.zeros(10))
    assert memory.get("d") is not None
