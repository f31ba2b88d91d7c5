"""Golden files of IVC-Prune: coordinates, votes by value, and a whole model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import pore
from helpers.golden_models import Worst, cut_cache, decoded_logits, llava_around
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.engine.readers import text_rows
from pore.engine.stages import View
from pore.layout import Image, Layout
from pore.methods.ivcprune import Votes, turns, value_weights, vote, voters
from pore.tensors.selection import by_score

_BEYOND = {"ivc_cos", "ivc_sin", "seeds", "kept", "kept_indices", "image_start", "image_len"}
_COSINES = {"ivc_cos_score", "ivc_sin_score"}
_LLAVA = _BEYOND | _COSINES | {"seeds_score", "foreground", "foreground_score"}
_QWEN = _BEYOND | _COSINES | {"seeds_score", "fill_score", "position_ids", "value_states"}
_END = {
    "inputs_embeds", "last_hidden_state", "logits", "kv_lens_prefill", "decode_tokens",
    "decode_logits",
}  # fmt: skip
_PARAMS = {"level", "variant", "seed", "post", "fractions"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    if file.params["level"] == "e2e":
        return _check_end_to_end(file)
    assert file.params.keys() - {"rope_theta", "grid"} == _PARAMS, file.params.keys()
    known = _LLAVA | {"value_weights"} if file.params["variant"] == "llava" else _QWEN
    assert file.tensors.keys() == known | {"cos", "sin"}, file.tensors.keys() ^ known
    return _check_selection(file)


def _pruner(params: dict[str, Any], layer: int = 16) -> pore.IVCPrune:
    """Fractions of an image are seeds; foreground or all that is kept; each kind of coordinate."""
    seeds, share, coordinates = params["fractions"]
    settings = {"layer": layer, "coordinates": coordinates / share, "seeds": seeds}
    if params["variant"] == "llava":
        return pore.IVCPrune(foreground=share, normalize="prompt", **settings)
    return pore.IVCPrune(keep=share, **settings)


def _layout(tensors: dict[str, Tensor], params: dict[str, Any]) -> Layout:
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    tokens = torch.ones(1, start + count + params["post"], dtype=torch.bool)
    return Layout.of([Image(0, 0, range(start, start + count))], tokens)


def _compare(view: View, tensors: dict[str, Tensor]) -> Worst:
    """Scores, and the tokens chosen by each, from the highest score down."""
    worst, votes = Worst(), view.attention
    assert isinstance(votes, Votes)
    assert view.positions is not None
    assert view.rotary is not None
    places = torch.stack([view.layout.gather(axis) for axis in view.positions])
    cosines, sines = turns(view.rotary, view.hidden_states, places)
    scores = {"seeds": votes.first, "ivc_cos": cosines, "ivc_sin": sines}
    scores["foreground" if "foreground" in tensors else "fill"] = votes.scores
    for name, score in scores.items():
        worst.compare(score[0], tensors[f"{name}_score"])
        if name in tensors:
            # Equals such as (r, c) and (c, r) on the axes of M-RoPE have no order of their own.
            best = by_score(score, view.layout.valid)[0, : len(tensors[name])]
            assert sorted(best.tolist()) == sorted(tensors[name].tolist()), name
            assert torch.equal(score[0, best], score[0, tensors[name]]), name
    assert votes.seeds[0].nonzero()[:, 0].tolist() == sorted(tensors["seeds"].tolist())
    return worst


def _check_selection(file: Any) -> float:
    tensors, params = file.tensors, file.params
    layout, pruner = _layout(tensors, params), _pruner(params)
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    if "value_weights" in tensors:
        attention = tensors["value_weights"].mean(0)
        inside = slice(start, start + count)

        def weights(index: Tensor) -> Tensor:
            return attention[index[0], inside][None]

    else:
        value = tensors["value_states"].transpose(0, 1)[None]
        weights = partial(
            value_weights, value, layout.tokens, layout.rows, layout.columns, layout.valid
        )
    index, valid = voters(*text_rows(layout), pruner.skip)
    seeds = [max(1, round(params["fractions"][0] * count))]
    votes = vote(weights, index, valid, layout.columns, layout.valid, seeds)
    cos, sin = (
        tensors[name].view(-1, *layout.tokens.shape, tensors[name].shape[-1])
        for name in ("cos", "sin")
    )
    # A place of a table of its own for every axis, so that the order of axes does not matter.
    length = layout.tokens.shape[1]
    axes = torch.arange(len(cos))[:, None, None] * length + torch.arange(length)

    def rotary(_: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        axis, place = positions // length, positions % length
        return cos[axis, 0, place], sin[axis, 0, place]

    view = View(
        layout,
        torch.zeros(*layout.tokens.shape, 1),
        votes,
        None,
        torch.Generator(),
        norm=lambda x: x,
        positions=axes,
        rotary=rotary,
    )
    worst = _compare(view, tensors)
    keep = pruner._select(view).keep
    assert keep[0].nonzero()[:, 0].tolist() == tensors["kept"].tolist()
    kept = layout.kept_tokens(keep)[0].nonzero()[:, 0]
    assert kept.tolist() == tensors["kept_indices"].tolist()
    return worst.value


def _check_end_to_end(file: Any) -> float:
    params = file.params
    assert params.keys() == _PARAMS | {"K", "config", "decode_positions"}, params.keys()
    assert params["variant"] == "llava"
    model, tensors = llava_around(file)
    assert tensors.keys() == _LLAVA | _END, tensors.keys() ^ (_LLAVA | _END)
    embeds, layer, layout = tensors["inputs_embeds"], params["K"], _layout(tensors, params)
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[0, layout.columns[0]] = True
    recording = Recording(_pruner(params, layer))
    with torch.no_grad(), recording(model) as run:
        run.mark_visual(visual)
        out = model(inputs_embeds=embeds, use_cache=True, output_hidden_states=True)
    worst = _compare(recording.seen[0].view, tensors)
    (image,) = run.report.samples[0].images
    assert list(image.kept) == tensors["kept"].tolist()
    kept = tensors["kept_indices"]
    text = (~visual[0]).nonzero()[:, 0].tolist()
    assert sorted([*text, *layout.columns[0, list(image.kept)].tolist()]) == kept.tolist()
    worst.compare(out.hidden_states[-1], tensors["last_hidden_state"])
    worst.compare(out.logits, tensors["logits"])

    # Theirs cuts what layers 1 to K - 1 have cached.
    cache = cut_cache(cache_in(out), range(1, layer), kept)
    lengths = [one.get_seq_length() for one in cache.layers]
    assert lengths == tensors["kv_lens_prefill"].tolist()
    tokens = {"decode_tokens": tensors["decode_tokens"][None]}
    decoded = decoded_logits(model, cache, tokens, params["decode_positions"])[0]
    for got, logits in zip(decoded, tensors["decode_logits"], strict=True):
        worst.compare(got, logits)
    return worst.value
