"""What every method must fulfil in every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import pore
from cases.base import TEXT, Case
from helpers.methods import ends
from helpers.recording import Recording
from helpers.reference import dropped_by_stage
from pore.cost.named import model_shape
from pore.engine.pruner import Pruner
from pore.engine.stages import Stage
from pore.families.registry import family_of

KEEP = 6


# One method of every kind: one stage in the decoder, several stages with new positions, merging
# stages, on the embeddings, in the tower.
KINDS = {"FastV", "PyramidDrop", "SparseVLM", "DivPrune", "VisionZip"}


PROMPTS = {
    "single": [[5, 6, -1, 7, 8, 9]],
    "ragged": [[5, -1, 7, 8], [5, 6, 10, -2, 7, 8, 9, 11]],
    "several": [[5, -1, 6, 7, -2, 8, 9], [5, -3, 7, 8]],
    "without": [[5, -1, 7, 8], [5, 6, 10, 11, 12, 13, 7, 8, 9]],
    "videos": [[5, -100, 7, 8], [5, 6, 10, -101, 7, 8, 9]],
    "mixed": [[5, -100, 6, -2, 7, 8], [5, 6, 10, -101, 7, 8, 9]],
}


@cache
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


@cache
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
    misplaced = [
        stage
        for stage in usual(name, KEEP, case).stages()
        if isinstance(stage, Stage) and stage.merges and not stage.in_place
    ]
    if misplaced and case.deepstack:
        return "has merged tokens before"
    recurrent = [family.recurrent(layer) for layer in family.layers(case.model())]
    sources = [family.source(case.model(), i) for i in range(len(recurrent))]
    first = min([source for source in sources if source is not None], default=len(recurrent))
    for stage in usual(name, KEEP, case).stages():
        if isinstance(stage, Stage) and stage.merges and stage.layer > first:
            return "which merged tokens would not be among"
        if (
            isinstance(stage, Stage)
            and stage.reads_layer is not None
            and recurrent[stage.reads_layer]
        ):
            return f"reads the attention of decoder layer {stage.reads_layer}, which is recurrent"
        if isinstance(stage, Stage) and 0 < stage.layer <= recurrent.index(False):
            return "drop them after it, or on the embeddings"
    return None


def forward(case: Case, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """Logits, at the positions that `generate` would give: a plain forward counts left padding.

    Relative positions are the same, but DART's key norms depend on absolute ones.
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
    """Hide dropped tokens in the masks that the model itself made for the full sequence.

    A recurrent layer has no such mask: it is run on the tokens left of every sample.
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
            if additive:  # the form that eager attention takes
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
