"""Copies of a pruned model are plain models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

import pore
import pore.engine.calls
from cases import CASES
from cases.base import Case
from helpers.interrupting import whole_state
from helpers.lifetimes import KINDS, kinds, logits, model_of
from helpers.models import batch, prompt
from pore._compat.attention import attention_name
from pore._compat.modules import HOOKS
from pore.changes import changes_in
from pore.errors import BudgetError, ModelStateError, UnsupportedModelError


def parts(model: nn.Module) -> list[Any]:
    """What every module has by name, how many hooks of which kind, and the kernel of its config."""
    return [
        (
            name,
            type(module),
            sorted(vars(module)),
            {key: len(vars(module)[key]) for key in (*HOOKS, *sum(HOOKS.values(), ()))},
            attention_name(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    ]


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("attention", ["sdpa", "flash_test"])
@kinds
def test_a_copy_is_a_plain_model(pruner: Any, attention: str, how: Any) -> None:
    """In the block and after it; the model stays pruned, and the copy can be pruned by itself."""
    dense = logits(model_of(attention))
    # The hooks that transformers puts on at the first call can be copied, but not pickled.
    model = model_of(attention, called=how is copy.deepcopy)
    plain = parts(model)
    with pruner(model) as run:
        twin = how(model)
        assert parts(twin) == plain
        assert changes_in(twin) == []
        decoder = twin.model.language_model
        configs = [vars(part)["config"] for part in decoder.modules() if "config" in vars(part)]
        assert all(config is decoder.config for config in configs)
        pore.remove(twin)
        assert torch.equal(logits(twin), dense)
        pruned = logits(model)
        assert not torch.equal(pruned[:, -1], dense[:, -1])
        with pruner(twin):
            assert torch.equal(logits(twin), pruned)
            assert torch.equal(logits(model), pruned)
        assert torch.equal(logits(twin), dense)
        assert torch.equal(logits(model), pruned)
        assert len(run.report) == 3
    assert torch.equal(logits(model), dense)
    assert torch.equal(logits(twin), dense)


@kinds
def test_copies_of_parts(pruner: Any) -> None:
    """Of every module by itself; that of the inner model can be pruned."""
    model = model_of()
    dense, plain = logits(model), parts(model)
    with pruner(model):
        for name, module in model.named_modules():
            twin = copy.deepcopy(module)
            prefix = f"{name}." if name else ""
            expected = [
                ("" if one[0] == name else one[0].removeprefix(prefix), *one[1:])
                for one in plain
                if one[0] == name or one[0].startswith(prefix)
            ]
            assert parts(twin) == expected
        whole = copy.deepcopy(model.lm_head), copy.deepcopy(model.model)
        inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(whole[0](whole[1](**inputs).last_hidden_state), dense)
            with pruner(whole[1]) as run:
                whole[1](**inputs)
        assert len(run.report) == 1


@kinds
def test_a_shallow_copy(pruner: Any) -> None:
    """It shares the parts, so it is pruned as long as they are; and nothing of ours stays in it."""
    model = model_of()
    dense, plain = logits(model), parts(model)
    with pruner(model):
        pruned, twin = logits(model), copy.copy(model)
        assert parts(twin)[0] == plain[0]
        with pytest.raises(ModelStateError, match="already pruned"), pruner(twin):
            pass
        pore.remove(twin)
        assert torch.equal(logits(twin), pruned)
        assert torch.equal(logits(model), pruned)
    assert parts(twin) == parts(model) == plain
    assert torch.equal(logits(twin), dense)


@kinds
def test_a_model_is_saved_as_it_was(pruner: Any, tmp_path: Path) -> None:
    model = model_of()
    dense = logits(model)
    weights, config = list(model.state_dict()), model.config.to_dict()
    with pruner(model):
        assert list(model.state_dict()) == weights
        assert model.config.to_dict() == config
        model.save_pretrained(tmp_path)
    assert "pore" not in (tmp_path / "config.json").read_text()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), dense)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_copies_in_every_family(case: Case) -> None:
    """Of whatever an adapter has changed."""
    model = case.model()
    plain, state, entered = parts(model), whole_state(model), 0
    for pruner in KINDS:
        with suppress(UnsupportedModelError, BudgetError), pruner(model):
            entered += 1
            assert parts(model) != plain
            assert parts(copy.deepcopy(model)) == plain
        assert whole_state(model) == state
    assert entered > 1


def test_a_copy_of_a_run_has_not_been_entered() -> None:
    """As of a module that holds a model and its run, and is averaged or logged."""
    model = model_of()
    dense = logits(model)
    held = {"model": model, "run": pore.FastV(keep=4, layer=1).apply(model)}
    twins = copy.deepcopy(held)
    assert twins["run"].model is twins["model"]
    twins["run"].__exit__(None, None, None)
    assert torch.equal(logits(twins["model"]), dense)
    pruned = logits(model)
    assert not torch.equal(pruned[:, -1], dense[:, -1])
    with twins["run"]:
        assert torch.equal(logits(twins["model"]), pruned)
    pore.remove(model)
    assert torch.equal(logits(model), dense)
