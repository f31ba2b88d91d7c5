"""Every method in every family, against the house's invariants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from cases import CASES, COUSINS
from cases.base import Case
from helpers.engine import fingerprint
from helpers.families import (
    KEEP,
    PROMPTS,
    check_cached_decode,
    check_masked_dense,
    forward,
    refusal,
    together,
    usual,
)
from helpers.methods import DRAWING, EVERY, MERGING, ends
from helpers.representative import chosen, marks
from pore._compat.models import DEEPSTACK
from pore.engine.pruner import Pruner
from pore.families.registry import family_of
from pore.methods.support import support
from pore.tower.stages import TowerStage


def takes_videos(case: Case, name: str) -> bool:
    """Whether a method prunes the videos of a family."""
    return name not in ("Downsample", "ToMe")


def drops(case: Case, name: str) -> bool:
    """Whether a method only drops tokens, and those that stay keep their positions."""
    stages, family = usual(name, KEEP, case).stages(), family_of(case.model())
    anew = not family.mrope
    return name not in MERGING and not any(
        stage.merges or anew if isinstance(stage, TowerStage) else anew and stage.dense
        for stage in stages
    )


def pairs(
    wanted: Callable[[Case, str], bool] = lambda case, name: True, refused: bool = False
) -> list[Any]:
    """Families with the methods that they take, or with those that they refuse."""
    return [
        pytest.param(case, name, id=f"{case.name}-{name}", marks=marks(case, name))
        for case in CASES
        for name in EVERY
        if wanted(case, name) and (refusal(case, name) is not None) == refused
    ]


def situations(
    wanted: Callable[[Case, str], bool] = lambda case, name: True, sides: Sequence[Any] = (None,)
) -> list[Any]:
    """Families with the methods that they take and the prompts that they have."""
    return [
        pytest.param(
            *(value for value in (case, name, prompts, side) if value is not None),
            id="-".join(filter(None, (case.name, name, situation, side))),
            marks=marks(case, name, number, side),
        )
        for pair in pairs(wanted)
        for case, name in [pair.values]
        for number, (situation, prompts) in enumerate(PROMPTS.items())
        if situation not in ("videos", "mixed")
        or (situation == case.videos and takes_videos(case, name))
        for side in sides
    ]


def padded(wanted: Callable[[Case, str], bool] = lambda case, name: True) -> list[Any]:
    """The same, and on which side prompts are padded."""
    return situations(wanted, ("left", "right"))


class TestBatches:
    @pytest.mark.parametrize(("case", "name", "prompts", "side"), padded())
    @pytest.mark.at_once(22)
    def test_keep_all_is_bit_equal(self, case: Case, name: str, prompts: Any, side: str) -> None:
        inputs = case.inputs(prompts, side)
        dense = forward(case, inputs)
        got, _ = together(case, usual(name, 1.0, case), inputs)
        assert torch.equal(got, dense)

    @pytest.mark.parametrize(
        ("case", "name", "prompts", "side"), padded(lambda _, name: name not in DRAWING)
    )
    @pytest.mark.at_once(16)
    def test_batch_equals_singles(self, case: Case, name: str, prompts: Any, side: str) -> None:
        pruner, inputs = usual(name, KEEP, case), case.inputs(prompts, side)
        logits, run = together(case, pruner, inputs)
        samples = run.report.samples
        assert all(len(i.kept) + i.extra == KEEP for s in samples for i in s.images)
        got = ends(logits, inputs["attention_mask"], [s.tokens[-1] for s in samples])
        for row, prompt in enumerate(prompts):
            single, alone = together(case, pruner, case.inputs([prompt]))
            assert alone.report.samples[0].images == samples[row].images
            torch.testing.assert_close(got[row], single[0], rtol=case.close, atol=case.close)

    @pytest.mark.parametrize(("case", "name", "prompts", "side"), padded(drops))
    @pytest.mark.at_once(22)
    def test_equals_masked_dense(self, case: Case, name: str, prompts: Any, side: str) -> None:
        check_masked_dense(case, usual(name, KEEP, case), prompts, side)


@pytest.mark.parametrize(("case", "name", "prompts"), situations())
@pytest.mark.at_once(16)
def test_cached_decode_equals_a_full_forward_with_the_same_selection(
    case: Case, name: str, prompts: Any
) -> None:
    check_cached_decode(case, usual(name, KEEP, case), prompts)


@pytest.mark.parametrize(("case", "name"), pairs())
@pytest.mark.at_once(12)
def test_beams_static_cache_and_what_is_left_behind(case: Case, name: str) -> None:
    model, inputs, pruner = case.model(), case.inputs(PROMPTS["ragged"]), usual(name, KEEP, case)
    before = fingerprint(model)
    settings = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), pruner(model) as run:
        tokens = model.generate(**inputs, **settings)
        static = tokens
        if case.static:
            static = model.generate(**inputs, **settings, cache_implementation="static")
        if case.beams:
            model.generate(**inputs, **settings, num_beams=2)
    if name not in DRAWING:
        assert torch.equal(tokens, static)
        images = [sample.images for sample in run.report]
        again = [0, 1] + [0, 1] * case.static + [0, 0, 1, 1] * case.beams
        assert images == [images[i] for i in again]
    assert fingerprint(model) == before


@pytest.mark.parametrize(("case", "name"), pairs(refused=True))
def test_an_unsupported_pair_is_refused_with_the_reason(case: Case, name: str) -> None:
    reason = refusal(case, name)
    assert reason is not None
    with pytest.raises(pore.PoreError) as error, usual(name, KEEP, case)(case.model()):
        case.model()(**case.inputs(PROMPTS["single"]))
    assert reason in str(error.value)


def test_every_family_and_every_method_is_among_what_always_runs() -> None:
    families, methods = (set(names) for names in zip(*chosen(), strict=True))
    assert families == {case.name for case in CASES}
    assert methods == set(EVERY)


def test_the_table_says_what_is_refused() -> None:
    """`pore models` against what a run of each case refuses; that the rest runs is tested above."""
    of_family = {type(one.family): one for one in support()}
    for case in CASES:
        listed = of_family[type(family_of(case.model()))]
        assert set(listed.limits) == set(EVERY)
        for name, limits in listed.limits.items():
            refused = refusal(case, name)
            if name not in listed.takes:
                assert refused in [limit.reason for limit in limits], (case.name, name)
            if refused is not None:
                assert limits, (case.name, name)


@pytest.mark.parametrize("case", [*CASES, *COUSINS], ids=lambda case: case.name)
def test_what_a_family_says_of_itself_is_so(case: Case) -> None:
    model = case.model()
    family = family_of(model)
    assert family.deepstack == case.deepstack == hasattr(family.decoder(model), DEEPSTACK)
    assert family.tiles == case.tiled
    recurrent = [family.recurrent(layer) for layer in family.layers(model)]
    assert any(recurrent) == (family.recurrent_mixer is not None)
    assert all(
        hasattr(layer, "self_attn") != mixes
        for layer, mixes in zip(family.layers(model), recurrent, strict=True)
    )


SEEING = [c for c in [*CASES, *COUSINS] if family_of(c.model()).token_types is not None]


@pytest.mark.parametrize("case", SEEING, ids=lambda case: case.name)
def test_a_family_s_masks_are_those_of_the_forward(case: Case) -> None:
    model, inputs = case.model(), case.inputs(PROMPTS["ragged"])
    family, seen = family_of(model), {}
    assert family.token_types is not None
    hook = family.decoder(model).register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True
    )
    forward(case, inputs)
    hook.remove()
    tokens, types = inputs["attention_mask"].bool(), inputs[family.token_types]
    made = family.masks(model, seen["inputs_embeds"], tokens, None, types)
    given = seen["attention_mask"]
    if isinstance(given, Tensor):
        made, given = {"": made}, {"": given}
    assert {kind: None if mask is None else mask.tolist() for kind, mask in made.items()} == {
        kind: None if mask is None else mask.tolist() for kind, mask in given.items()
    }


@pytest.mark.parametrize("pruner", [pore.FastV(KEEP), pore.DivPrune(KEEP)], ids=repr)
@pytest.mark.parametrize("case", COUSINS, ids=lambda case: case.name)
@pytest.mark.at_once(4)
def test_cousins(case: Case, pruner: Pruner) -> None:
    for situation in ("ragged", case.videos or "several"):
        if drops(case, pruner.name):
            check_masked_dense(case, pruner, PROMPTS[situation], "left")
        check_cached_decode(case, pruner, PROMPTS[situation])
