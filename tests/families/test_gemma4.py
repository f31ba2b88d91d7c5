"""Gemma 4 beyond what every family is asked: layers that look at the keys of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Gemma4TextModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from cases import CASES
from cases.base import LAYERS
from cases.gemma4 import Gemma4
from helpers.caches import as_argument
from helpers.engine import _flash
from helpers.families import KEEP, PROMPTS, check_cached_decode, check_masked_dense, forward
from helpers.weights import under, weights
from helpers.windows import Some
from pore._compat.models import SPARED_ROWS
from pore.engine.pruner import Pruner
from pore.engine.readers import LayerAttention
from pore.engine.stages import Selection, Stage, View
from pore.families.registry import family_of

(CASE,) = (case for case in CASES if case.name == "Gemma 4")
FIRST = 4
"""The first layer that looks at another's keys; those of layers 2 and 3 are looked at."""


class Short(Gemma4):
    """With a window shorter than an image of 4 x 4."""

    grids = ((4, 4), (4, 4))
    patches = 64
    window = 12


SHORT = Short()
LONG = [[5, *range(20, 34), -1, *range(6, 24), -2, 7, 8, 9], [5, *range(30, 45), -2, 7, 8, 9]]
DROPPING = [
    *(Some((layer,)) for layer in range(1, LAYERS + 1)),
    Some((1, 3)),
    Some((3, 4)),
    Some((3, 5)),
    Some((0, 3)),
]
ANEW = [Some((1, 3), "dense"), Some((3, 4), "dense"), Some((0, 5), "dense")]


def settings(pruner: Some) -> str:
    return f"{pruner.layers}"


def test_which_layers_share() -> None:
    family, model = family_of(CASE.model()), CASE.model()
    assert [family.source(model, i) for i in range(LAYERS)] == [None, None, None, None, 2, 3]
    attentions = [family.attention(layer) for layer in family.layers(model)]
    assert [one.is_kv_shared_layer for one in attentions] == [False] * 4 + [True] * 2
    assert [one.store_full_length_kv for one in attentions[:4]] == [False, False, True, True]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_before_between_and_after_what_is_shared(layer: int, side: str) -> None:
    """Where keys of dropped tokens are there, they are not looked at."""
    check_masked_dense(CASE, pore.FastV(KEEP, layer=layer), PROMPTS["several"], side)


@pytest.mark.parametrize("pruner", DROPPING, ids=settings)
@pytest.mark.parametrize("side", ["left", "right"])
def test_in_windows(pruner: Some, side: str) -> None:
    check_masked_dense(SHORT, pruner, LONG, side)


@pytest.mark.parametrize("pruner", [*DROPPING, *ANEW], ids=settings)
def test_decoding_out_of_windows(pruner: Some) -> None:
    """The sliding layers let go of keys, and with them those that later layers dropped before."""
    check_cached_decode(SHORT, pruner, LONG, count=16)


@pytest.mark.parametrize("pruner", [Some((2,)), Some((3,)), Some((4,)), ANEW[0]], ids=settings)
def test_static_cache(pruner: Some) -> None:
    model, inputs = SHORT.model(), SHORT.inputs(LONG)
    options = {"max_new_tokens": 16, "do_sample": False}
    with torch.no_grad(), pruner(model):
        expected = model.generate(**inputs, **options)
        got = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("ahead", [False, True], ids=["as it runs", "ahead"])
@pytest.mark.parametrize("layer", [4, 5])
def test_attention_is_that_of_eager(layer: int, ahead: bool) -> None:
    case, inputs = under(CASE, "eager"), CASE.inputs(PROMPTS["single"])
    shown: list[Tensor] = []
    with (
        case.model()
        .model.language_model.layers[layer]
        .self_attn.register_forward_hook(lambda _, __, output: shown.append(output[1]))
    ):
        forward(case, inputs)
    got = weights(case, inputs, layer, ahead)
    torch.testing.assert_close(got, shown[0].to(got), rtol=1e-6, atol=1e-7)


@dataclass(frozen=True)
class Watch(Pruner):
    """Drops tokens, and later shows what the last token attends to."""

    seen: list[Tensor]
    ahead: bool
    layer: int = 4

    def stages(self) -> list[Stage]:
        layer = self.layer if self.ahead else self.layer + 1
        (first,) = Some((2,)).stages()
        return [first, Stage(layer, self._rule, self._attend, ahead=self.ahead)]

    def _attend(self, attention: LayerAttention) -> None:
        self.seen.append(attention.logits(attention.last)[-1, :, 0].softmax(-1))

    @staticmethod
    def _rule(view: View) -> Selection:
        return Selection(view.layout.valid)


@pytest.mark.parametrize("ahead", [False, True], ids=["as it runs", "ahead"])
def test_attention_to_what_is_left_of_an_earlier_turn(ahead: bool) -> None:
    turns = [[5, -1, 6, 7], [8, -2, 9, 10]]
    model, seen = CASE.model(), []
    with torch.no_grad(), Watch(seen, ahead)(model):
        forward(CASE, CASE.inputs([[token for turn in turns for token in turn]]))
        cache = DynamicCache(config=model.config.get_text_config())
        for turn in turns:
            inputs = CASE.inputs([turn])
            del inputs["attention_mask"]
            model(**inputs, **as_argument(cache))
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pruner", [Some((2,)), Some((3,)), Some((4,)), Some((1, 5))], ids=settings)
def test_flash_attention_equals_sdpa(pruner: Some) -> None:
    """Keys that a layer does not look at are not there, as no mask can hide them."""
    ALL_ATTENTION_FUNCTIONS.register("flash_test", _flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_test", flash_attention_mask)
    inputs = CASE.inputs(PROMPTS["ragged"])
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    found = []
    for case in (CASE, under(CASE, "flash_test")):
        with torch.no_grad(), pruner(case.model()):
            out = case.model().generate(**inputs, **options, output_logits=True)
        found.append(torch.stack(out.logits))
    torch.testing.assert_close(found[1], found[0], rtol=CASE.close, atol=CASE.close)


@pytest.mark.skipif(
    not hasattr(Gemma4TextModel, SPARED_ROWS), reason="an older transformers spares none"
)
@pytest.mark.parametrize(
    ("pruner", "spared"),
    [(pore.FastV(KEEP, layer=2), True), (pore.FastV(KEEP, layer=FIRST + 1), False)],
    ids=["early", "late"],
)
def test_tokens_that_no_logits_are_asked_for_are_spared(pruner: Pruner, spared: bool) -> None:
    """As the unpruned model spares them, unless a stage has still to choose among them."""
    model, inputs, rows = CASE.model(), CASE.inputs(PROMPTS["ragged"]), []

    def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        rows.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    with pruner(model) as run:
        hook = model.model.language_model.layers[FIRST].register_forward_pre_hook(
            note, with_kwargs=True
        )
        every = forward(CASE, inputs)
        one, two = (forward(CASE, inputs, logits_to_keep=count) for count in (1, 2))
    hook.remove()
    assert rows == ([rows[0], 1, rows[0]] if spared else [rows[0]] * 3)
    assert len(run.report.notes) == (not spared)
    torch.testing.assert_close(one, every[:, -1:])
    torch.testing.assert_close(two, every[:, -2:])
