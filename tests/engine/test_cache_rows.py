"""What is done to a pruned cache is done to the record of what it lacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from cases import CASES
from cases.base import Case, since
from helpers.caches import as_argument
from helpers.conversations import positions
from helpers.engine import tolerance
from helpers.families import KEEP as FEW
from helpers.families import PROMPTS, refusal
from helpers.families import usual as usual_of
from helpers.methods import EVERY, KEEP, model_of, usual
from helpers.models import batch, prompt
from pore._compat.cache_owners import CACHE_METHODS
from pore.errors import ModelStateError
from pore.families.registry import family_of

CLOSE = tolerance("sdpa")
RAGGED = [prompt(3, 2, 5), prompt(7, 1, 2, 1), prompt(4, 0, 9, 2)]
NEW = torch.tensor([[11, 12, 13]])
METHODS = [name for name in EVERY if name != "Random"]

ROWS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select one": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "by marks": (
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        [0, 2],
    ),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
}


def begun(model: Any, inputs: Any, static: bool = False) -> Any:
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=90) if static else DynamicCache(config=config)
    model(**inputs, **as_argument(cache))
    return cache


def go_on(model: Any, mask: Tensor, cache: Any, ids: Tensor) -> Tensor:
    """A turn of several tokens, and two decoded ones."""
    found = []
    for part in (ids, ids[:, :1], ids[:, 1:2]):
        mask = nn.functional.pad(mask, (0, part.shape[1]), value=1)
        found.append(model(input_ids=part, attention_mask=mask, **as_argument(cache)).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("what", ROWS)
@pytest.mark.parametrize("name", METHODS)
def test_rows(name: str, what: str) -> None:
    model, inputs = model_of(), batch(RAGGED)
    change, rows = ROWS[what]
    with torch.no_grad(), usual(name, KEEP)(model):
        mask = inputs["attention_mask"]
        expected = go_on(model, mask, begun(model, inputs), NEW.expand(3, -1))
        cache = begun(model, inputs)
        change(cache)
        got = go_on(model, mask[rows], cache, NEW.expand(len(rows), -1))
    torch.testing.assert_close(got, expected[rows], **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_a_static_cache(name: str) -> None:
    model, inputs = model_of(), batch(RAGGED)
    with torch.no_grad(), usual(name, KEEP)(model):
        mask = inputs["attention_mask"]
        expected = go_on(model, mask, begun(model, inputs), NEW.expand(3, -1))
        cache = begun(model, inputs, static=True)
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        got = go_on(model, mask[[1, 2, 0]], cache, NEW.expand(3, -1))
    torch.testing.assert_close(got, expected[[1, 2, 0]], **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_copies_go_their_own_ways(name: str) -> None:
    model, inputs = model_of(), batch(RAGGED)
    with torch.no_grad(), usual(name, KEEP)(model):
        mask = inputs["attention_mask"]
        expected = go_on(model, mask, begun(model, inputs), NEW.expand(3, -1))
        cache = begun(model, inputs)
        deep = copy.deepcopy(cache)
        again = DynamicCache(config=model.config.text_config)  # made of the tensors by hand
        for i, layer in enumerate(cache.layers):
            again.update(layer.keys.clone(), layer.values.clone(), i)
        more = {"input_ids": NEW[:, :1].expand(3, -1), **as_argument(again)}
        model(**more, attention_mask=nn.functional.pad(mask, (0, 1), value=1))
        again.crop(-1)
        cache.batch_select_indices(torch.tensor([1]))
        for one in (deep, copy.copy(cache), again):
            rows = [1] if len(one.layers[0].keys) == 1 else [0, 1, 2]
            got = go_on(model, mask[rows], one, NEW.expand(len(rows), -1))
            torch.testing.assert_close(got, expected[rows], **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_cropped_text_was_never_there(name: str) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    mask = inputs["attention_mask"]
    with torch.no_grad(), usual(name, KEEP)(model):
        expected = go_on(model, mask, begun(model, inputs), NEW)
        cache = begun(model, inputs)
        go_on(model, mask, cache, NEW + 1)
        cache.crop(-5)
        torch.testing.assert_close(go_on(model, mask, cache, NEW), expected, **CLOSE)
        cache.crop(-5)
        cache.crop(-3)  # some of the question itself
        again = torch.cat([inputs["input_ids"][:, -3:], NEW], 1)
        got = model(input_ids=again, **as_argument(cache)).logits[:, -3:]
        torch.testing.assert_close(got, expected[:, :3], **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_cropping_into_the_image_loses_nothing(name: str) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    with torch.no_grad(), usual(name, KEEP)(model):
        expected = go_on(model, inputs["attention_mask"], begun(model, inputs), NEW)
        cache = begun(model, inputs)
        with pytest.raises(ModelStateError, match="no further back than the end of the image"):
            cache.crop(-(5 + KEEP))
        got = go_on(model, inputs["attention_mask"], cache, NEW)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_a_reset_cache_is_empty(name: str) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    for static in (False, True):
        with torch.no_grad(), usual(name, KEEP)(model):
            expected = go_on(model, inputs["attention_mask"], begun(model, inputs), NEW)
            cache = begun(model, batch([prompt(9, 1, 4, 3)], seed=1), static)
            cache.reset()
            if static:
                model(**inputs, **as_argument(cache))
                got = go_on(model, inputs["attention_mask"], cache, NEW)
                torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_the_unpruned_model_does_not_go_on_over_it(name: str) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    with torch.no_grad(), usual(name, KEEP)(model):
        cache = begun(model, inputs)
        expected = go_on(model, inputs["attention_mask"], copy.deepcopy(cache), NEW)
    for one in (cache, copy.deepcopy(cache)):
        with torch.no_grad(), pytest.raises(ModelStateError, match="the model is not pruned now"):
            model(input_ids=NEW, **as_argument(one))
        with torch.no_grad(), usual(name, KEEP)(model):  # nothing was lost
            got = go_on(model, inputs["attention_mask"], one, NEW)
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_without_images_leaves_an_ordinary_cache(name: str) -> None:
    model, inputs = model_of(), batch([prompt(9, 0, 3)])
    with torch.no_grad():
        expected = go_on(model, inputs["attention_mask"], begun(model, inputs), NEW)
        with usual(name, KEEP)(model):
            cache = begun(model, inputs)
        got = go_on(model, inputs["attention_mask"], cache, NEW)
    assert isinstance(cache, DynamicCache)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_forward_that_failed_halfway_is_noticed(name: str) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    layer = model.model.language_model.layers[-1]

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with torch.no_grad(), usual(name, KEEP)(model):
        cache, fresh = begun(model, inputs), DynamicCache(config=model.config.text_config)
        hook = layer.register_forward_pre_hook(fail)
        for one, given in ((cache, {"input_ids": NEW}), (fresh, inputs)):
            with pytest.raises(RuntimeError, match="out of memory"):
                model(**given, **as_argument(one))
        hook.remove()
        for one in (cache, fresh):
            with pytest.raises(ModelStateError, match="Begin again with a new cache"):
                model(input_ids=NEW, **as_argument(one))


@pytest.mark.parametrize("name", METHODS)
def test_rows_changed_layer_by_layer_are_noticed(name: str) -> None:
    model, inputs = model_of(), batch(RAGGED)
    with torch.no_grad(), usual(name, KEEP)(model):
        cache = begun(model, inputs)
        for layer in cache.layers:
            layer.batch_select_indices(torch.tensor([0]))
        with pytest.raises(ModelStateError, match="other than by its own methods"):
            model(input_ids=NEW, **as_argument(cache))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES
        for name in ("FastV", "DivPrune", "VisionZip")
        if refusal(case, name) is None
    ],
)
def test_several_answers_after_one_prefill_in_every_family(case: Case, name: str) -> None:
    """Repeated, answered token by token, and finished rows let go."""
    model, inputs = case.model(), case.inputs(PROMPTS["ragged"])
    if case.name == "Gemma 3" and name == "FastV" and not since("5.20"):
        pytest.skip("older ones make masks of a token with its type for the wrong layer")
    if case.name == "Qwen3.5":
        pytest.skip("transformers itself selects no rows of recurrent states")

    last = None
    if family_of(model).mrope:  # transformers' own count is of the batch that came last
        last = positions(case, {k: v for k, v in inputs.items() if k != "pixel_values"})[..., -1:]

    def answer(rows: list[int], change: Callable[[Any], None]) -> Tensor:
        cache = begun(model, inputs)
        change(cache)
        mask, found = inputs["attention_mask"][rows], []
        for step, token in enumerate((11, 12)):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            ids = torch.full((len(rows), 1), token)
            more = {k: v for k, v in case.extra(ids, mask).items() if k == "token_type_ids"}
            if last is not None:
                more["position_ids"] = last[:, rows] + 1 + step
            out = model(input_ids=ids, attention_mask=mask, **as_argument(cache), **more)
            found.append(out.logits)
        return torch.cat(found, 1)

    with torch.no_grad(), usual_of(name, FEW, case)(model):
        expected = answer([0, 1], lambda _: None)
        repeated = answer([0, 0, 1, 1], lambda cache: cache.batch_repeat_interleave(2))
        chosen = answer([1], lambda cache: cache.batch_select_indices(torch.tensor([1])))
    close = {"rtol": case.close, "atol": case.close}
    torch.testing.assert_close(repeated, expected[[0, 0, 1, 1]], **close)
    torch.testing.assert_close(chosen, expected[[1]], **close)


def test_all_that_changes_rows_is_known() -> None:
    """Every public method of a cache either changes nothing that the record says, or is known."""
    harmless = {
        *("prefetch", "offload", "get_seq_length", "get_max_length", "get_query_offset"),
        *("early_initialization", "has_previous_state", "is_recording_past"),
        *("activate_past_recording", "get_conv_state", "get_recurrent_state"),
        # Of layers without attention, after the masks were made; and of other models' layers.
        *("update_conv_state", "update_recurrent_state", "update_indexer"),
        *("get_max_cache_shape",),
    }
    methods = {
        name for name in dir(Cache) if not name.startswith("_") and callable(getattr(Cache, name))
    }
    assert methods - harmless == CACHE_METHODS
