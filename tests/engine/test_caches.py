"""Caches that transformers offers: each gives the tokens of the plain one, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import Cache, QuantizedLayer

import pore
from cases import CASES
from cases.base import Case
from helpers.caches import as_argument, check_quantized
from helpers.families import KEEP, KINDS, PROMPTS, refusal, usual
from helpers.models import batch, prompt, tiny_llava
from pore._compat.caches import cache_in
from pore.errors import UnsupportedModelError

FAMILIES = {"LLaVA-1.5", "Qwen2.5-VL", "InternVL", "Gemma 3"}


CELLS = [
    pytest.param(
        *(case, name, beams),
        id=f"{case.name}-{name}-{beams}",
        # One family meets every method at every run, the others one method.
        marks=() if case.name == "LLaVA-1.5" or (name, beams) == ("FastV", 1) else pytest.mark.slow,
    )
    for case in CASES
    for name in sorted(KINDS)
    for beams in (1, 2)
    if case.name in FAMILIES and refusal(case, name) is None
]


LATEST = hasattr(cache_utils, "BaseQuantizedLayer")


"""Before, transformers cannot reorder quantised caches, and has no FP8."""


class Wrapped:
    """What a quantiser made of states: nothing that looks like a tensor."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class Lossless(QuantizedLayer):
    """Quantised by transformers' rules, a few tokens at a time, without loss."""

    step = 0.0

    def __init__(self, **_: Any) -> None:
        super().__init__(residual_length=3)

    def _quantize(self, tensor: Tensor, axis: int = 0) -> Any:
        return Wrapped(tensor.clone() if not self.step else (tensor / self.step).round())

    def _dequantize(self, q_tensor: Any) -> Tensor:
        return q_tensor.states * (self.step or 1)


class Coarse(Lossless):
    """The same with a loss."""

    step = 0.25


def quantized(config: Any, layer: type[Lossless] = Lossless) -> Cache:
    return Cache(layers=[layer() for _ in range(config.num_hidden_layers)])


@pytest.fixture
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloading as it runs on a GPU, but for the streams, which a CPU has none of."""
    if torch.cuda.is_available():
        return

    class Stream:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        def wait_stream(self, _: object) -> None: ...

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: Stream())


OTHERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "static": lambda _: {"cache_implementation": "static"},
    "offloaded": lambda _: {"cache_implementation": "offloaded"},
    "offloaded_static": lambda _: {"cache_implementation": "offloaded_static"},
    "of the caller, offloaded": lambda config: as_argument(
        DynamicCache(config=config, offloading=True)
    ),
    "of the caller, static": lambda config: as_argument(
        StaticCache(config=config, max_cache_len=90)
    ),
    "quantized": lambda config: as_argument(quantized(config)),
}


@pytest.mark.usefixtures("_streams")
@pytest.mark.parametrize("cache", OTHERS)
@pytest.mark.parametrize(("case", "name", "beams"), CELLS)
def test_tokens_are_those_of_the_plain_cache(case: Case, name: str, cache: str, beams: int) -> None:
    if cache == "quantized" and beams > 1 and not LATEST:
        pytest.skip("this transformers itself cannot reorder quantised caches")
    if "static" in cache and not case.static:
        pytest.skip("transformers itself cannot, and what would be wrong is refused")
    model, pruner = case.model(), usual(name, KEEP, case)
    inputs = case.inputs(PROMPTS["ragged"])
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": beams,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad(), pruner(model) as run:
        plain = model.generate(**inputs, **settings)
        options = OTHERS[cache](model.config.get_text_config())
        other = model.generate(**inputs, **settings, **options)
    assert torch.equal(plain.sequences, other.sequences)
    images = [sample.images for sample in run.report]
    assert images[: len(images) // 2] == images[len(images) // 2 :]
    got, expected = torch.stack(other.logits), torch.stack(plain.logits)
    torch.testing.assert_close(got, expected, rtol=case.close, atol=case.close)


def test_masks_for_the_wrong_layer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.16 makes them for Gemma 3 and a static cache."""
    from transformers.models.gemma3 import modeling_gemma3

    make = modeling_gemma3.create_masks_for_vision_model

    def wrong(*args: Any, **kwargs: Any) -> Any:
        masks = make(*args, **kwargs)
        return masks | {"sliding_attention": masks["full_attention"]}

    monkeypatch.setattr(modeling_gemma3, "create_masks_for_vision_model", wrong)
    case = next(case for case in CASES if case.name == "Gemma 3")
    model, inputs = case.model(), case.inputs(PROMPTS["ragged"])
    settings = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    refused = pytest.raises(UnsupportedModelError, match="use a dynamic cache")
    with torch.no_grad(), refused, pore.FastV(KEEP)(model):
        model.generate(**inputs, **settings)
    with torch.no_grad(), pore.DivPrune(KEEP)(model):  # all layers hold as much
        model.generate(**inputs, **settings)


@pytest.mark.usefixtures("_streams")
@pytest.mark.parametrize("cache", ["of the caller, offloaded", "quantized"])
@pytest.mark.parametrize(
    "pruner",
    [
        pore.FastV(keep=5),
        pore.PyramidDrop(keep=5, layers=(2, 3)),
        pore.DivPrune(keep=5),
    ],
    ids=lambda p: p.name,
)
def test_turns(pruner: Any, cache: str) -> None:
    """A second image over the same cache, by methods that look into it, or not."""
    model = tiny_llava(layers=5)
    config = model.config.text_config
    parts = [batch([prompt(3, 1, 5)]), batch([prompt(2, 1, 4, 1)], seed=1)]
    found = []
    for past in (DynamicCache(config=config), cache_in(OTHERS[cache](config))):
        logits = []
        with torch.no_grad(), pruner(model) as run:
            for part in parts:
                ids, pixels = part["input_ids"], part["pixel_values"]
                logits.append(model(input_ids=ids, pixel_values=pixels, **as_argument(past)).logits)
                for token in (7, 8, 9, 10):
                    new = torch.tensor([[token]])
                    logits.append(model(input_ids=new, **as_argument(past)).logits)
        found.append((torch.cat(logits, 1), [sample.images for sample in run.report]))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-9)


def test_what_is_left_is_quantized() -> None:
    """By a quantiser with a loss, whose tokens do not fill up its residue."""

    def make(config: Any) -> Cache:
        cache = quantized(config, Coarse)
        for held in cache.layers:
            held.residual_length = 8
        return cache

    check_quantized(make, torch.float64)


@pytest.mark.skipif(not LATEST, reason="this transformers has no FP8 caches")
def test_fp8() -> None:
    from transformers import QuantizedCache

    check_quantized(lambda config: QuantizedCache("fp8", config), torch.float32, again=False)
