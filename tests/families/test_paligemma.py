"""PaliGemma beyond what every family is asked: capped logits, later tokens seen, positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from cases import CASES
from cases.base import Case
from helpers.families import KEEP, PROMPTS, forward, usual
from helpers.weights import under, weights
from pore.engine.pruner import Pruner

(FIRST,) = (case for case in CASES if case.name == "PaliGemma")


(SECOND,) = (case for case in CASES if case.name == "PaliGemma 2")


def flash() -> Case:
    ALL_ATTENTION_FUNCTIONS.register("flash_prefix", _flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_prefix", flash_attention_mask)
    return under(FIRST, "flash_prefix")


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """FlashAttention's contract on a CPU: a 2-D mask or none, and the module says if causal."""
    assert mask is None or mask.dim() == 2
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, n = query.shape[2], key.shape[2]
    seen = torch.ones(q, n, dtype=torch.bool)[None, None]
    if module.is_causal:
        seen = seen.tril(n - q)
    if mask is not None:
        seen = seen & mask[:, None, None, :n].bool()
    logits = (query @ key.transpose(2, 3)) * kwargs["scaling"]
    weights = logits.masked_fill(~seen, -1e30).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("ahead", [False, True], ids=["as it runs", "ahead"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("case", [FIRST, SECOND], ids=lambda case: case.name)
def test_attention_is_that_of_eager(case: Case, layer: int, side: str, ahead: bool) -> None:
    """Every row of it: capped, scaled by the model's own factor, of tokens that see later ones."""
    case = under(case, "eager")
    decoder = case.model().model.language_model
    if case.name == "PaliGemma 2":
        attention = decoder.layers[layer].self_attn
        assert attention.attn_logit_softcapping == 2.0
        assert attention.scaling == 0.5 != attention.head_dim**-0.5
        assert [decoder.layers[i].self_attn.sliding_window for i in (1, 2)] == [None, 16]
    inputs = case.inputs(PROMPTS["ragged"], side)
    got, tokens = weights(case, inputs, layer, ahead), inputs["attention_mask"].bool()
    shown: list[Tensor] = []
    with decoder.layers[layer].self_attn.register_forward_hook(
        lambda _, __, output: shown.append(output[1])
    ):
        forward(case, inputs)
    for row, real in enumerate(tokens):
        # Eager attention takes its softmax in float32.
        expected = shown[0][row][:, real].to(got)
        torch.testing.assert_close(got[row][:, real], expected, rtol=1e-6, atol=1e-7)
        first, last = real.nonzero().flatten()[[0, -1]].tolist()
        assert bool((got[row, :, first, last] > 0).all())


@pytest.mark.parametrize("name", ["FastV", "SparseVLM", "PyramidDrop", "DivPrune", "VisionZip"])
def test_flash_attention_equals_sdpa(name: str) -> None:
    """Its masks say nothing of a prefix; the module says that its kernel is not causal."""
    inputs, pruner = FIRST.inputs(PROMPTS["ragged"]), usual(name, KEEP, FIRST)
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = []
    for case in (FIRST, flash()):
        with torch.no_grad(), pruner(case.model()) as run:
            out = case.model().generate(**inputs, **options)
        found.append((torch.stack(out.logits), [sample.images for sample in run.report]))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-5, atol=2e-5)


def test_rows_of_a_kernel_that_is_not_causal() -> None:
    inputs = FIRST.inputs(PROMPTS["single"])
    torch.testing.assert_close(weights(flash(), inputs, 1), weights(FIRST, inputs, 1))


@pytest.mark.parametrize(
    ("pruner", "first", "last"),
    [
        (pore.DivPrune(KEEP), range(1, KEEP + 4), range(1, KEEP + 4)),
        (pore.PyramidDrop(KEEP, layers=(3,)), range(1, 20), range(1, KEEP + 4)),
    ],
    ids=["on the embeddings", "in the decoder"],
)
def test_numbering_anew_starts_at_one(pruner: Pruner, first: range, last: range) -> None:
    """As `generate` does."""
    model, inputs = FIRST.model(), FIRST.inputs([[5, -1, 6, 7]])
    seen: list[list[int]] = []

    def note(_: nn.Module, __: object, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"][0].tolist())

    layers = model.model.language_model.layers
    with torch.no_grad(), pruner(model):
        hooks = [layers[i].register_forward_pre_hook(note, with_kwargs=True) for i in (0, 5)]
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    for hook in hooks:
        hook.remove()
    assert seen[:2] == [[*first], [*last]]
    assert seen[2:] == [[first.stop], [last.stop]]
