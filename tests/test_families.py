"""Every method in every family, against the house's invariants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pore
from family_cases import CASES, COUSINS, TEXT, Case
from pore._private import DEEPSTACK
from pore.errors import UnsupportedModelError
from pore.families import family_of
from pore.pruner import Pruner, Stage
from pore.shapes import model_shape
from pore.support import support
from pore.tower import TowerStage
from reference import dropped_by_stage
from test_engine import fingerprint
from test_matrix import DRAWING, EVERY, Recording, ends

KEEP = 6
# One method of every kind: a stage in the decoder, several that number anew, merging ones, on the
# embeddings, in the tower. They meet every family at every run, the others one; the rest is slow.
KINDS = {"FastV", "PyramidDrop", "SparseVLM", "DivPrune", "VisionZip"}
EVERY_METHOD = "Qwen2.5-VL"
# What gives tokens that stay new states, on the embeddings or in the decoder.
MERGING = {"Downsample", "SparseVLM"}
PROMPTS = {
    "single": [[5, 6, -1, 7, 8, 9]],
    "ragged": [[5, -1, 7, 8], [5, 6, 10, -2, 7, 8, 9, 11]],
    "several": [[5, -1, 6, 7, -2, 8, 9], [5, -3, 7, 8]],
    "without": [[5, -1, 7, 8], [5, 6, 10, 11, 12, 13, 7, 8, 9]],
    "videos": [[5, -100, 7, 8], [5, 6, 10, -101, 7, 8, 9]],
    "mixed": [[5, -100, 6, -2, 7, 8], [5, 6, 10, -101, 7, 8, 9]],
}


def usual(name: str, keep: int | float, case: Case) -> Pruner:
    """A method's usual settings for the depth of a case's model."""
    shape = model_shape(f"llava-64x{case.layers}")
    model = case.model()
    family = family_of(model)
    if family.tower_refusal is None:
        depth = len(family.tower_layers(model))
        shape = replace(shape, tower=replace(shape.tower, layers=depth))
    made = pore.methods()[name].usual(keep, shape)
    assert made is not None
    return made


def refusal(case: Case, name: str) -> str | None:
    """Why a family does not take a method, or None."""
    family = family_of(case.model())
    for limit in usual(name, KEEP, case).limits(family):
        if limit.unless is None:
            return limit.reason
    if name == "Downsample" and case.tiled:
        return "fill no grid"
    if name == "HiRED" and family.tiles and not family.tiles_placed:
        return "where the tiles lie in the image"
    if name in MERGING and case.deepstack:
        return "has merged tokens before"
    recurrent = [family.recurrent(layer) for layer in family.layers(case.model())]
    sources = [family.source(case.model(), i) for i in range(len(recurrent))]
    first = min([source for source in sources if source is not None], default=len(recurrent))
    for stage in usual(name, KEEP, case).stages():
        if isinstance(stage, Stage) and stage.merges and stage.layer > first:
            return "which merged tokens would not be among"
        if isinstance(stage, Stage) and stage.probed is not None and recurrent[stage.probed]:
            return f"reads the attention of decoder layer {stage.probed}, which is recurrent"
        if isinstance(stage, Stage) and 0 < stage.layer <= recurrent.index(False):
            return "drop them behind it, or on the embeddings"
    return None


def takes_videos(case: Case, name: str) -> bool:
    """Whether a method prunes the videos of a family."""
    return name != "Downsample" and not usual(name, KEEP, case).reads_tower


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
        pytest.param(
            case,
            name,
            id=f"{case.name}-{name}",
            marks=() if name in KINDS or case.name == EVERY_METHOD else pytest.mark.slow,
        )
        for case in CASES
        for name in EVERY
        if wanted(case, name) and (refusal(case, name) is not None) == refused
    ]


def cells(wanted: Callable[[Case, str], bool] = lambda case, name: True) -> list[Any]:
    """Families with the methods that they take and the prompts that they have."""
    return [
        pytest.param(*pair.values, prompts, id=f"{pair.id}-{situation}", marks=pair.marks)
        for pair in pairs(wanted)
        for situation, prompts in PROMPTS.items()
        if situation not in ("videos", "mixed")
        or (situation == pair.values[0].videos and takes_videos(*pair.values))
    ]


def forward(case: Case, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """Logits, at the positions that `generate` would give: a plain forward counts left padding.

    Relative positions are the same, but not everything is relative: DART's key norms are not.
    """
    family = family_of(case.model())
    if not family.mrope:
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        more["position_ids"] = positions + family.first_position
    with torch.no_grad():
        logits: Tensor = case.model()(**inputs, **more).logits
    return logits


def together(case: Case, pruner: Pruner, inputs: dict[str, Tensor]) -> tuple[Tensor, pore.Run]:
    """Logits of a pruned forward, and the run."""
    with pruner(case.model()) as run:
        return forward(case, inputs), run


@pytest.mark.parametrize("side", ["left", "right"])
class TestBatches:
    @pytest.mark.parametrize(("case", "name", "prompts"), cells())
    def test_keep_all_is_bit_equal(self, case: Case, name: str, prompts: Any, side: str) -> None:
        inputs = case.inputs(prompts, side)
        dense = forward(case, inputs)
        got, _ = together(case, usual(name, 1.0, case), inputs)
        assert torch.equal(got, dense)

    @pytest.mark.parametrize(
        ("case", "name", "prompts"), cells(lambda _, name: name not in DRAWING)
    )
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

    @pytest.mark.parametrize(("case", "name", "prompts"), cells(drops))
    def test_equals_masked_dense(self, case: Case, name: str, prompts: Any, side: str) -> None:
        check_masked_dense(case, usual(name, KEEP, case), prompts, side)


def check_masked_dense(case: Case, pruner: Pruner, prompts: Any, side: str) -> None:
    """A pruned forward equals a dense one that does not see the dropped tokens."""
    inputs = case.inputs(prompts, side)
    logits, run = together(case, pruner, inputs)
    stages = dropped_by_stage(run, case.visual(prompts, side))
    tokens = inputs["attention_mask"].bool()
    with hidden_from(case, stages, tokens):
        dense = forward(case, inputs, use_cache=False)
    kept = tokens & ~stages[-1][1]
    found = ends(logits, tokens, kept.sum(1).tolist())
    for row, got in enumerate(found):
        torch.testing.assert_close(got, dense[row, kept[row]], rtol=case.close, atol=case.close)


@contextmanager
def hidden_from(case: Case, stages: list[tuple[int, Tensor]], tokens: Tensor) -> Iterator[None]:
    """Take dropped tokens out of the masks that the model itself made for the full sequence.

    A recurrent layer has no mask for that: it is run on what is left of every sample.
    """
    model, family = case.model(), family_of(case.model())

    def hook(i: int) -> Any:
        def hide(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            length = (args[0] if args else kwargs["hidden_states"]).shape[1]
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            additive = mask.dtype != torch.bool
            if additive:
                mask = mask == 0
            itself = torch.eye(length, dtype=torch.bool)
            for first, dropped in stages:
                if i >= first:
                    mask = (mask & ~dropped[:, None, None, :]) | (mask & itself)
            if additive:  # as eager attention takes it
                mask = torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
            return args, {**kwargs, "attention_mask": mask}

        return hide

    def rows(i: int, mixer: nn.Module) -> Any:
        left = tokens.clone()
        for first, dropped in stages:
            if i >= first:
                left &= ~dropped
        mix = mixer.forward

        def each(hidden_states: Tensor, **_: Any) -> Tensor:
            out = torch.zeros_like(hidden_states)
            for row, stays in enumerate(left):
                out[row, stays] = mix(hidden_states=hidden_states[row : row + 1, stays])[0]
            return out

        return each

    undo: list[Callable[[], None]] = []
    for i, layer in enumerate(family.layers(model)):
        if family.recurrent(layer):
            mixer: nn.Module = layer.linear_attn  # type: ignore[assignment]
            mixer.forward = rows(i, mixer)
            undo.append(partial(delattr, mixer, "forward"))
        else:
            undo.append(layer.register_forward_pre_hook(hook(i), with_kwargs=True).remove)
    try:
        yield
    finally:
        for one in undo:
            one()


@pytest.mark.parametrize(("case", "name", "prompts"), cells())
def test_cached_decode_equals_a_full_forward_with_the_same_selection(
    case: Case, name: str, prompts: Any
) -> None:
    check_cached_decode(case, usual(name, KEEP, case), prompts)


def check_cached_decode(case: Case, pruner: Pruner, prompts: Any, count: int = 4) -> None:
    """Prefill and cached decode equal a full forward with the same selection."""
    model, inputs = case.model(), case.inputs(prompts)
    recording = Recording(pruner)
    words = range(model.config.get_text_config().vocab_size)
    with torch.no_grad(), recording(model):
        out = model.generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            suppress_tokens=sorted(set(words) - set(TEXT)),
            output_logits=True,
            return_dict_in_generate=True,
        )
    recording.replays = True
    ids = out.sequences[:, :-1]
    mask = nn.functional.pad(inputs["attention_mask"], (0, count - 1), value=1)
    more = case.answered(ids, mask, count - 1)
    full = {**inputs, "input_ids": ids, "attention_mask": mask, **more}
    with recording(model):
        logits = forward(case, full, use_cache=False)[:, -count:]
    torch.testing.assert_close(
        torch.stack(out.logits, 1), logits.float(), rtol=case.close, atol=case.close
    )


@pytest.mark.parametrize(("case", "name"), pairs())
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


@pytest.mark.parametrize(
    "case", [case for case in [*CASES, *COUSINS] if case.videos], ids=lambda case: case.name
)
def test_a_video_is_not_pruned_in_the_tower(case: Case) -> None:
    refused = pytest.raises(UnsupportedModelError, match="on the embeddings or in the decoder")
    with refused, pore.FasterVLM(KEEP)(case.model()):
        case.model()(**case.inputs(PROMPTS[case.videos or "videos"]))


@pytest.mark.parametrize("pruner", [pore.FastV(KEEP), pore.DivPrune(KEEP)], ids=repr)
@pytest.mark.parametrize("case", COUSINS, ids=lambda case: case.name)
def test_cousins(case: Case, pruner: Pruner) -> None:
    for situation in ("ragged", case.videos or "several"):
        if drops(case, pruner.name):
            check_masked_dense(case, pruner, PROMPTS[situation], "left")
        check_cached_decode(case, pruner, PROMPTS[situation])
