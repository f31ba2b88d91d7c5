"""Proportional attention: merged tokens count by their sizes, in the prefill and while decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CASES
from cases.base import Case
from helpers.engine import BATCHES, tolerance
from helpers.families import PROMPTS, check_cached_decode, forward
from helpers.methods import ends
from helpers.models import batch, prompt, tiny_llava
from helpers.recording import Recording, Seen
from pore.engine.pruner import Pruner
from pore.engine.stages import Selection, Stage, View
from pore.errors import ModelStateError, UnsupportedModelError
from pore.families.registry import family_of

LAYERS = (3, 4)  # after those that add features in Qwen3-VL
FAMILIES = {"LLaVA-1.5", "Gemma 3", "Llama 4", "Qwen2.5-VL", "Qwen3-VL", "InternVL"}
CHOSEN = [case for case in CASES if case.name in FAMILIES]


class Halved(Pruner):
    """Keeps every second token, with another state, and counts it a few times more."""

    def __init__(self, *layers: int) -> None:
        self.layers = layers

    @property
    def name(self) -> str:  # type: ignore[override] # no string, so that it is not registered
        return "Halved"

    def stages(self) -> list[Stage]:
        return [Stage(i, self._rule, merges=True, proportional=True) for i in self.layers]

    def _rule(self, view: View) -> Selection:
        valid = view.layout.valid
        places = torch.arange(valid.shape[1])
        before = torch.ones(valid.shape) if view.sizes is None else view.sizes
        sizes = before.double() + 1 + places % 3
        return Selection(valid & (places % 2 == 0), view.features * 1.5, sizes=sizes)


@contextmanager
def dense(case: Case, seen: list[Seen], tokens: Tensor) -> Iterator[Tensor]:
    """The unpruned model, which does by masks and states alone what the stages did.

    In the masks that it made itself, dropped tokens are hidden and the logarithm of its size is
    added for every key.

    Yields:
        (B, L) bool, True at what is left in the end.
    """
    left, sizes = tokens.clone(), torch.ones(tokens.shape, dtype=torch.float64)
    first = seen[0].view.layout
    found = []
    for one in seen:
        layout, keep = one.view.layout, one.selection.keep
        rows = layout.rows[:, None].expand_as(layout.columns)
        places = first.columns.gather(1, layout.raster)
        dropped = layout.valid & ~keep
        left, sizes = left.clone(), sizes.clone()
        left[rows[dropped], places[dropped]] = False
        kept = rows[keep], places[keep]
        sizes[kept] = one.selection.sizes[keep]
        found.append((left, sizes, kept, one.selection.features[keep]))
    layers = family_of(case.model()).layers(case.model())

    def hook(i: int) -> Any:
        stage = [number for number, layer in enumerate(LAYERS) if layer <= i][-1]
        left, sizes, kept, states = found[stage]

        def change(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if i == LAYERS[stage]:
                hidden = hidden.index_put(kept, states)
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(1, 1, *[hidden.shape[1]] * 2, dtype=torch.bool).tril()
            sees = mask if mask.dtype == torch.bool else mask == 0
            sees = (sees & left[:, None, None]) | torch.eye(hidden.shape[1], dtype=torch.bool)
            logs = sizes.log()[:, None, None].expand(sees.shape)
            mask = logs.masked_fill(~sees, -torch.inf)
            kwargs = {**kwargs, "attention_mask": mask.to(hidden)}
            return (
                ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})
            )

        return change

    hooks = [
        layers[i].register_forward_pre_hook(hook(i), with_kwargs=True)
        for i in range(LAYERS[0], len(layers))
    ]
    try:
        yield left
    finally:
        for one in hooks:
            one.remove()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("situation", ["several", "without"])
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_equals_a_dense_forward(case: Case, situation: str, side: str) -> None:
    """In the masks of the whole sequence, to the precision of the family's own arithmetic."""
    inputs = case.inputs(PROMPTS[situation], side)
    recording = Recording(Halved(*LAYERS))
    with recording(case.model()):
        short = forward(case, inputs)
    tokens = inputs["attention_mask"].bool()
    with dense(case, recording.seen, tokens) as left:
        whole = forward(case, inputs, use_cache=False)
    counts = left.sum(1).tolist()
    for row, got in enumerate(ends(short, tokens, counts)):
        torch.testing.assert_close(got, whole[row, left[row]], rtol=case.close, atol=case.close)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_decoding_sees_the_same_sizes(case: Case) -> None:
    """Step by step from the cache, and in one forward without one."""
    check_cached_decode(case, Halved(*LAYERS), PROMPTS["several"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kernels(models: Any, attention: str) -> None:
    inputs = batch(BATCHES["no image in one row"], "right")
    with torch.no_grad(), Halved(2, 3)(models["sdpa"]) as run:
        expected = models["sdpa"](**inputs).logits
    with torch.no_grad(), Halved(2, 3)(models[attention]):
        got = models[attention](**inputs).logits
    tokens = [sample.tokens[-1] for sample in run.report]
    mask = inputs["attention_mask"]
    for a, b in zip(ends(got, mask, tokens), ends(expected, mask, tokens), strict=True):
        torch.testing.assert_close(a, b, **tolerance(attention))


def test_sizes_of_one_change_nothing() -> None:
    model, inputs = tiny_llava(), batch(BATCHES["ragged text"])

    class Once(Halved):
        def _rule(self, view: View) -> Selection:
            chosen = super()._rule(view)
            assert chosen.sizes is not None
            return replace(chosen, sizes=torch.ones_like(chosen.sizes) if self.counts_ else None)

        counts_ = True

    with torch.no_grad(), Once(2)(model):
        counted = model(**inputs).logits
    Once.counts_ = False
    with torch.no_grad(), Once(2)(model):
        expected = model(**inputs).logits
    torch.testing.assert_close(counted, expected, **tolerance("sdpa"))


def test_kernels_that_cannot_are_refused(models: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'flash_test' takes no mask.*'sdpa'"):
        Halved(2)(models["flash_test"]).__enter__()


def test_on_the_embeddings_it_is_refused() -> None:
    with pytest.raises(ModelStateError, match="before layer 1 or later"):
        Halved(0)(tiny_llava()).__enter__()


def test_sizes_that_were_not_asked_for_are_refused() -> None:
    class Unasked(Halved):
        def stages(self) -> list[Stage]:
            return [replace(stage, proportional=False) for stage in super().stages()]

    with pytest.raises(ModelStateError, match="proportional=True"), Unasked(2)(tiny_llava()) as run:
        run.model(**batch([prompt(3, 1, 5)]))
