"""Sliding windows and tokens that see those after them, in prompts far longer than the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from cases.base import LAYERS, TEXT, since
from cases.gemma3 import Gemma3
from helpers.caches import as_argument
from helpers.families import check_masked_dense
from helpers.windows import Some
from pore.engine.pruner import Pruner
from pore.engine.readers import LastToken
from pore.engine.stages import Selection, Stage, View
from pore.errors import ModelStateError, ScoreError, UnsupportedModelError

WINDOW = 12


CLOSE = {"rtol": 2e-5, "atol": 2e-5}


FULL, SLIDING = "full_attention", "sliding_attention"


KINDS = {
    "sliding first": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "full first": [FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING],
    "sliding only": [SLIDING] * LAYERS,
}


PROMPTS = [[5, *range(20, 34), -1, *range(6, 24), -2, 7, 8, 9], [5, *range(30, 45), -3, 7, 8, 9]]


class Long(Gemma3):
    """Gemma 3 with a window shorter than an image."""

    def __init__(self, kinds: Sequence[str], attention: str = "sdpa", window: int = WINDOW) -> None:
        self.kinds, self.attention, self.window = kinds, attention, window

    def build(self) -> Any:
        made = super().build()
        decoder = made.model.language_model
        for layer, kind in enumerate(self.kinds):
            decoder.config.layer_types[layer] = kind
            decoder.layers[layer].self_attn.sliding_window = (
                self.window if kind == SLIDING else None
            )
        decoder.config.sliding_window = self.window
        decoder.config._attn_implementation_internal = self.attention
        return made


@cache
def long(kinds: str, attention: str = "sdpa", window: int = WINDOW) -> Long:
    return Long(KINDS[kinds], attention, window)


def forward(case: Long, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        logits: Tensor = case.model()(**inputs, position_ids=positions, **more).logits
    return logits


every_kind = pytest.mark.parametrize("kinds", KINDS)
can_go_on = pytest.mark.skipif(
    not since("5.20"),
    reason="transformers itself fails, unpruned, over static caches and in further turns, where "
    "some layers have a window and some have none",
)


mostly_slow = pytest.mark.parametrize(
    "kinds", ["sliding first", *(pytest.param(k, marks=pytest.mark.slow) for k in list(KINDS)[1:])]
)


ORIGINAL = [Some((0,)), Some((1,)), Some((3,)), Some((1, 4)), Some((0, 1)), Some((LAYERS,))]


DENSE = [Some((0,), "dense"), Some((2,), "dense"), Some((0, 1), "dense")]


@every_kind
@pytest.mark.parametrize("pruner", ORIGINAL, ids=lambda p: f"{p.layers}")
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_window_reaches_as_far_as_in_the_full_sequence(
    kinds: str, pruner: Some, side: str
) -> None:
    check_masked_dense(long(kinds), pruner, PROMPTS, side)


@every_kind
def test_on_the_embeddings_it_is_a_shorter_prompt(kinds: str) -> None:
    case = long(kinds)
    inputs = case.inputs(PROMPTS[:1])
    model = case.model()
    with Some((0,), "dense")(model), torch.no_grad():
        got = forward(case, inputs)
    embeds: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    forward(case, inputs)
    hook.remove()
    visual = case.visual(PROMPTS[:1])[0]
    raster = visual.cumsum(0) - 1
    kept = ~visual | torch.isin(raster % 16, torch.tensor(Some.kept[0]))
    with torch.no_grad():
        expected = model(
            inputs_embeds=embeds[0][:, kept],
            attention_mask=inputs["attention_mask"][:, kept],
            token_type_ids=inputs["token_type_ids"][:, kept],
        ).logits
    torch.testing.assert_close(got, expected, **CLOSE)


@can_go_on
@mostly_slow
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pruner", ORIGINAL + DENSE, ids=lambda p: f"{p.layers}-{p.positions}")
def test_decoding_far_after_the_prompt(kinds: str, pruner: Some, static: bool) -> None:
    case, count = long(kinds), WINDOW + 2
    inputs = case.inputs(PROMPTS)
    words = range(case.model().config.get_text_config().vocab_size)
    with torch.no_grad(), pruner(case.model()):
        out = case.model().generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            suppress_tokens=sorted(set(words) - set(TEXT)),
            output_logits=True,
            return_dict_in_generate=True,
            **({"cache_implementation": "static"} if static else {}),
        )
        ids = out.sequences[:, :-1]
        mask = nn.functional.pad(inputs["attention_mask"], (0, count - 1), value=1)
        full = {**inputs, "input_ids": ids, "attention_mask": mask, **case.extra(ids, mask)}
        logits = forward(case, full, use_cache=False)[:, -count:]
    torch.testing.assert_close(torch.stack(out.logits, 1), logits.float(), **CLOSE)


@can_go_on
@mostly_slow
@pytest.mark.parametrize("given", [True, False], ids=["positions", "none"])
@pytest.mark.parametrize("pruner", ORIGINAL + DENSE, ids=lambda p: f"{p.layers}-{p.positions}")
def test_a_conversation_with_a_second_image(kinds: str, pruner: Some, given: bool) -> None:
    """In chunks over one cache, as in one piece."""
    case = long(kinds)
    model = case.model()
    whole = case.inputs([PROMPTS[0]])
    start, end = PROMPTS[0].index(-2) + 17, whole["input_ids"].shape[1]
    cache = DynamicCache(config=model.config)
    chunks = [(slice(0, start), 0), (slice(start, end - 1), 1), (slice(end - 1, end), None)]
    logits = []
    with torch.no_grad(), pruner(model):
        expected = forward(case, whole)
        for part, image in chunks:
            inputs = {name: whole[name][:, : part.stop] for name in ("attention_mask",)}
            inputs["input_ids"] = whole["input_ids"][:, part]
            if image is not None:  # types are those of the whole sequence, as in `generate`
                inputs["token_type_ids"] = whole["token_type_ids"][:, : part.stop]
                inputs["pixel_values"] = whole["pixel_values"][image : image + 1]
            if given:
                logits.append(forward(case, inputs, **as_argument(cache)))
            else:
                logits.append(model(**inputs, **as_argument(cache)).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)


@dataclass(frozen=True)
class Reads(Pruner):
    """Drops at layer 1, and looks at the attention of layer 3."""

    ahead: bool
    seen: list[Tensor]

    def stages(self) -> list[Stage]:
        return [
            *Some((1,)).stages(),
            Stage(3 if self.ahead else 4, self._rule, LastToken(), ahead=self.ahead),
        ]

    def _rule(self, view: View) -> Selection:
        self.seen.append(view.attention)
        return Selection(view.layout.valid)


@can_go_on
@every_kind
@pytest.mark.parametrize("static", [False, True])
def test_looking_ahead_sees_what_the_layer_will(kinds: str, static: bool) -> None:
    """In the second turn too, whose image is in reach though the cache has let go of the first."""
    case = long(kinds)
    model, prompt = case.model(), [5, -1, *range(6, 40), -2, 7, 8]
    whole = case.inputs([prompt])
    start, end = prompt.index(-2) + 17, whole["input_ids"].shape[1]
    found = []
    for ahead in (True, False):
        cache: Any = DynamicCache(config=model.config)
        if static:
            cache = StaticCache(model.config, max_cache_len=100)
        pruner = Reads(ahead, [])
        with torch.no_grad(), pruner(model):
            for part, image in (
                (slice(0, 21), 0),
                (slice(21, start), None),
                (slice(start, end), 1),
            ):
                inputs = {"attention_mask": whole["attention_mask"][:, : part.stop]}
                inputs["input_ids"] = whole["input_ids"][:, part]
                if image is not None:
                    inputs["token_type_ids"] = whole["token_type_ids"][:, : part.stop]
                    inputs["pixel_values"] = whole["pixel_values"][image : image + 1]
                forward(case, inputs, **as_argument(cache))
        assert len(pruner.seen) == 2
        found.append(pruner.seen)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_eager_attention() -> None:
    inputs = long("sliding first").inputs(PROMPTS[:1])
    for pruner in (Some((1, 4)), Some((0,)), Some((0,), "dense")):
        with pruner(long("sliding first").model()):
            expected = forward(long("sliding first"), inputs)
        with pruner(long("sliding first", "eager").model()):
            got = forward(long("sliding first", "eager"), inputs)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_assisted_decoding_takes_rejected_tokens_back() -> None:
    case = long("sliding first")
    one = case.inputs(PROMPTS[1:])
    for pruner in (Some((1, 4)), Some((0,)), Some((0,), "dense")):
        with pruner(case.model()):
            settings = {"max_new_tokens": 16, "do_sample": False}
            expected = case.model().generate(**one, **settings)
            got = case.model().generate(**one, **settings, prompt_lookup_num_tokens=3)
        assert torch.equal(got, expected)


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """FlashAttention's contract: a 2-D mask or none, causal, a window counted over the keys."""
    assert mask is None or mask.dim() == 2
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, n = query.shape[2], key.shape[2]
    back = torch.arange(n - q, n)[:, None] - torch.arange(n)
    seen = (back >= 0) & (back < (kwargs["sliding_window"] or n))
    seen = seen if mask is None else seen & mask[:, None, None, :n].bool()
    logits = (query @ key.transpose(2, 3)) * kwargs["scaling"]
    weights = logits.masked_fill(~seen, -1e30).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


class TestFlashAttention:
    window = 40

    @pytest.fixture
    def flash(self) -> Long:
        ALL_ATTENTION_FUNCTIONS.register("flash_window_test", _flash)
        ALL_MASK_ATTENTION_FUNCTIONS.register("flash_window_test", flash_attention_mask)
        return long("sliding first", "flash_window_test", self.window)

    @pytest.mark.parametrize("pruner", [Some((1, 4)), Some((0,)), Some((0,), "dense")])
    def test_a_window_that_is_left_while_decoding(self, flash: Long, pruner: Some) -> None:
        sdpa = long("sliding first", "sdpa", self.window)
        prompts = [PROMPTS[1], PROMPTS[1][3:]]
        logits = []
        for case in (flash, sdpa):
            inputs = case.inputs(prompts)
            del inputs["token_type_ids"]  # FlashAttention is causal
            assert inputs["input_ids"].shape[1] <= self.window
            with torch.no_grad(), pruner(case.model()):
                out = case.model().generate(
                    **inputs,
                    max_new_tokens=12,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            logits.append(torch.stack(out.logits))
        torch.testing.assert_close(*logits, **CLOSE)

    @pytest.mark.parametrize("pruner", [Some((1,)), Some((0,))])
    def test_a_longer_prompt_is_refused(self, flash: Long, pruner: Some) -> None:
        refused = pytest.raises(UnsupportedModelError, match="40 tokens over the tokens kept")
        with refused, pruner(flash.model()):
            forward(flash, flash.inputs(PROMPTS[:1]))


def test_an_image_out_of_the_window_is_not_ranked_by_its_attention() -> None:
    case = long("sliding first")
    inputs = case.inputs(PROMPTS[:1])
    refused = pytest.raises(ScoreError, match="Image 0 of sample 0 lies farther back than the 12")
    with refused, pore.FastV(keep=6, layer=1)(case.model()):
        forward(case, inputs)
    with pore.FastV(keep=6, layer=3)(case.model()) as run:  # after full attention
        forward(case, inputs)
    assert [len(image.kept) for image in run.report.samples[0].images] == [6, 6]


@can_go_on
def test_a_prepared_mask_for_a_shortened_cache_is_refused() -> None:
    """`generate` prepares masks for static caches, and no longer says which tokens are padding."""
    case = long("sliding first")
    model, inputs = case.model(), case.inputs(PROMPTS[1:])
    with torch.no_grad(), Some((1,))(model):
        cache = StaticCache(model.config, max_cache_len=80)
        settings = {**as_argument(cache), "do_sample": False}
        answer = model.generate(**inputs, **settings, max_new_tokens=3)
        again = torch.cat([answer, torch.tensor([[7, 8]])], 1)
        with pytest.raises(ModelStateError, match="dynamic cache"):
            model.generate(input_ids=again, **settings, max_new_tokens=3)


@pytest.mark.parametrize("pruner", [Some((1,)), Some((2,)), pore.FastV(7, layer=2)], ids=repr)
def test_windows_that_come_after_the_pruned_layer(pruner: Pruner) -> None:
    """A batch whose padding is longer than what is left: the model's masks are of short layers.

    transformers makes them for the first layer with a window; but all of those are given ours.
    """
    case = Long([FULL, FULL, SLIDING, SLIDING, FULL, SLIDING], window=64)
    prompts = [[5, -1, 6, -2, 7, 8, 9], [5, 6, 7]]
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "suppress_tokens": [100, 101, 102],
    }
    with torch.no_grad(), pruner(case.model()):
        together = case.model().generate(**case.inputs(prompts), **settings)
        for row, prompt in enumerate(prompts):
            alone = case.model().generate(**case.inputs([prompt]), **settings)
            for got, expected in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(got[row], expected[0], **CLOSE)
