"""HiMAP against a decoder gone through layer by layer: the rule, the states, the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from helpers.engine import tolerance
from helpers.models import N, batch, prompt, tiny_llava
from pore.calibration.reading import attention_stages
from pore.cost.named import model_shape
from pore.errors import BudgetError, ProfileMismatchError

P = pore.PositionBias.exponential(0.2, N)


def embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(1, L, D) what enters the decoder."""
    seen: list[Tensor] = []
    first = model.model.language_model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


@torch.no_grad()
def by_hand(
    model: Any, states: Tensor, start: int, pruner: pore.HiMAP, numbers: tuple[int, int]
) -> tuple[list[list[int]], Tensor]:
    """What each stage leaves of the one image of a prompt, and the logits.

    The decoder's eager layers are called one by one, and the sequence is cut before two of them.
    """
    decoder = model.model.language_model
    positions = torch.arange(states.shape[1])
    image = list(range(start, start + N))
    kept: list[list[int]] = []
    weights = torch.zeros(0)
    for number, layer in enumerate(decoder.layers):
        if number in pruner.layers:
            heads = weights[0].mean(0)
            here = [i for i, position in enumerate(positions.tolist()) if position in image]
            after = [i for i, position in enumerate(positions.tolist()) if position >= start + N]
            scores = heads[here if kept else after][:, here].sum(0)
            if not kept and pruner.reweight is not None:
                scores = scores / P.values
            best = scores.topk(numbers[len(kept)]).indices.tolist()
            image = [image[i] for i in sorted(best)]
            kept.append([position - start for position in image])
            text = [p for p in positions.tolist() if not start <= p < start + N]
            left = [i for i, p in enumerate(positions.tolist()) if p in text or p in image]
            states, positions = states[:, left], positions[left]
        length = states.shape[1]
        mask = torch.full((length, length), -torch.inf).double().triu(1)[None, None]
        tables = decoder.rotary_emb(states, positions[None])
        normed = layer.input_layernorm(states)
        _, weights = layer.self_attn(normed, position_embeddings=tables, attention_mask=mask)
        out = layer(states, position_embeddings=tables, attention_mask=mask)
        states = out[0] if isinstance(out, tuple) else out
    return kept, model.lm_head(decoder.norm(states))


@pytest.mark.parametrize("reweight", [None, P], ids=["plain", "divided"])
@pytest.mark.parametrize(
    ("keep", "first", "numbers"), [(4, 0.5, (8, 4)), (0.25, 11, (11, 4)), (10, 0.5, (10, 10))]
)
def test_is_what_its_rule_says(keep: Any, first: Any, numbers: Any, reweight: Any) -> None:
    eager, sdpa = tiny_llava(layers=6, attention="eager"), tiny_llava(layers=6)
    pruner = pore.HiMAP(keep, (2, 4), first, reweight)
    for seed in range(3):
        inputs = batch([prompt(4, 1, 6, seed)])
        expected, logits = by_hand(eager, embeddings(eager, inputs), 4, pruner, numbers)
        with torch.no_grad(), pruner(sdpa) as run:
            got = sdpa(**inputs).logits
        (image,) = run.report.samples[0].images
        assert [(layer, list(kept)) for layer, kept in image.stages] == [
            (2, expected[0]),
            (4, expected[1]),
        ]
        torch.testing.assert_close(got, logits, **tolerance("eager"))


def test_without_a_cache_every_token_prunes_anew() -> None:
    """As the authors generate: what was answered is among the text that looks."""
    eager, sdpa = tiny_llava(layers=6, attention="eager"), tiny_llava(layers=6)
    pruner, inputs = pore.HiMAP(4, (2, 4)), batch([prompt(4, 1, 6)])
    with torch.no_grad(), pruner(sdpa):
        tokens = sdpa.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    ids = inputs["input_ids"]
    for token in tokens[0, ids.shape[1] :].tolist():
        states = embeddings(eager, {**inputs, "input_ids": ids, "attention_mask": ids > 0})
        _, logits = by_hand(eager, states, 4, pruner, (8, 4))
        assert int(logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_calibration_measures_the_first_stage_alone() -> None:
    (stage,) = attention_stages(pore.HiMAP(4))
    assert stage.layer == 2


def test_published_rates_fit() -> None:
    bias = pore.profiles.published(host="himap", benchmark="gqa")
    assert pore.HiMAP(90, first=115, reweight=bias).remaining(576) == [115, 90]


def test_numbers() -> None:
    assert pore.HiMAP(72).remaining(576) == [288, 72]
    assert pore.HiMAP(400).remaining(576) == [400, 400]
    assert pore.HiMAP(5, first=99).remaining(16) == [16, 5]
    assert pore.HiMAP(1).remaining(1) == [1, 1]
    assert pore.HiMAP(72).counts(576, 10) == [576] * 2 + [288] * 6 + [72] * 2
    assert pore.HiMAP.usual(72, model_shape("llava-1.5-7b")).layers == (2, 8)
    assert pore.HiMAP.usual(4, model_shape("llava-64x4")).layers == (1, 2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep": 0}, BudgetError, "at least 1"),
        ({"first": 1.5}, BudgetError, "fraction"),
        ({"layers": (2,)}, BudgetError, "two layers"),
        ({"layers": (8, 2)}, BudgetError, "ascending"),
        ({"reweight": (P, P)}, ProfileMismatchError, "1 stage"),
    ],
)
def test_settings_that_make_no_sense(settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pore.HiMAP(**{"keep": 5, **settings})
