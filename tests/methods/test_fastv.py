"""FastV as its authors' scripts run it: a window that lies one token too far."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from cases import CASES
from helpers.engine import tolerance
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.reference import masked_from
from pore.errors import BudgetError, InputError


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava()


@pytest.mark.parametrize("keep", [1, 5, N - 1, N])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_window_lies_one_token_too_far(model: Any, keep: int, side: str) -> None:
    """The first patch stays, and the token after the image competes with the others."""
    prompts = [prompt(3, 1, 5, seed) for seed in range(4)] + [prompt(7, 1, 2, 9)]
    inputs = batch(prompts, side)
    tokens = inputs["attention_mask"].bool()
    eager = tiny_llava(attention="eager")
    dropped = torch.zeros_like(tokens)
    after = 0
    with torch.no_grad(), pore.FastV(keep=keep, faithful=True)(model) as run:
        short = model(**inputs).logits
    for row, ids in enumerate(prompts):
        with torch.no_grad():
            attention = eager(
                input_ids=torch.tensor([ids]),
                pixel_values=inputs["pixel_values"][row : row + 1],
                output_attentions=True,
            ).attentions[1][0, :, -1]
        start = ids.index(IMAGE) + 1
        window = attention.mean(0)[start : start + N]
        gone = set(range(N)) - set(window.topk(keep).indices.tolist())
        first = int((inputs["input_ids"][row] == IMAGE).nonzero()[0]) + 1
        dropped[row, [first + j for j in gone]] = True
        kept = tuple(i for i in range(N) if i == 0 or i - 1 not in gone)
        assert run.report.samples[row].images[0].kept == kept
        assert run.report.samples[row].tokens[-1] == len(ids) - N + keep
        after += N - 1 in gone
    assert after > 0 or keep > 5  # the token after the image was dropped somewhere
    with torch.no_grad(), masked_from(model.model.language_model.layers, [(2, dropped)], tokens):
        dense = model(**inputs, use_cache=False).logits
    for row, stays in enumerate(tokens & ~dropped):
        n = int(stays.sum())
        got = short[row, :n] if side == "right" else short[row, -n:]
        torch.testing.assert_close(got, dense[row, stays], **tolerance("sdpa"))


def test_generate_goes_on(model: Any) -> None:
    inputs = batch([prompt(3, 1, 5), prompt(7, 1, 2, 1)])
    with torch.no_grad(), pore.FastV(keep=4, faithful=True)(model):
        out = model.generate(
            **inputs,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        first = model(**inputs).logits[:, -1]
    torch.testing.assert_close(out.logits[0], first.float())


def test_tiles_and_padding_are_refused() -> None:
    case = next(case for case in CASES if case.name == "LLaVA-NeXT")
    with pytest.raises(InputError, match="one run"), pore.FastV(4, faithful=True)(case.model()):
        case.model()(**case.inputs([[5, -1, 7, 8]]))
    with pytest.raises(BudgetError, match="does not suppress padding"):
        pore.FastV(4, suppress_padding=0.5, faithful=True)
