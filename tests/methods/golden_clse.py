"""Golden files of CLSE: scores of given states, and whole decoders to the decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import pore
from helpers.golden_models import Worst, decoded_logits
from helpers.golden_qwen import decoded_states, either_around
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.engine.records import record_of
from pore.engine.stages import View
from pore.methods.clse import By, evolution, high_pass
from pore.tensors.selection import top_k

_BY: dict[str, By] = {"clse_attn": "both", "attn": "attention", "clse": "evolution"}
_SELECTION = {
    "attention", "evolution", "kept_indices", "score", "spectral_L", "spectral_Lk", "z_L", "z_Lk",
}  # fmt: skip
_RUN = {"cache_lengths", "evolution", "inputs_embeds"}
_LLAMA = _RUN | {"decode_logits", "decode_tokens", "logits"}
_QWEN = _RUN | {"decode_embeds", "decode_hidden", "last_hidden_state", "position_ids"}
_STAGE = ("attention", "kept_indices", "score")


class _OnGrid(pore.CLSE):
    """CLSE that is told the grid of an image whose tokens are only marked."""

    def score(self, stage: int, view: View) -> Tensor:
        images = tuple(replace(image, grid=grids[-1]) for image in view.layout.images)
        return super().score(stage, replace(view, layout=replace(view.layout, images=images)))


grids: list[tuple[int, int]] = []


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    if "z_L" not in file.tensors:
        return _check_end_to_end(file)
    tensors, params, worst = file.tensors, file.params, Worst()
    assert tensors.keys() == _SELECTION, tensors.keys() ^ _SELECTION
    grid = (params["T"], params["H"], params["W"])
    energies = []
    for name, expected in (("z_L", "spectral_L"), ("z_Lk", "spectral_Lk")):
        states = tensors[name].unflatten(1, grid)
        energies.append(high_pass(states, params["cutoff_ratio"]).flatten(1))
        worst.compare(energies[-1], tensors[expected])
    factor = evolution(*energies, torch.ones_like(energies[0], dtype=torch.bool), params["temp"])
    worst.compare(factor, tensors["evolution"])
    attention = tensors["attention"]
    attention = attention if attention.dim() == 2 else attention.mean(1)[:, 0]
    by = _BY[params["score_type"]]
    score = {"both": factor * attention, "attention": attention, "evolution": factor}[by]
    worst.compare(score, tensors["score"])
    kept = top_k(score, [params["keep"]])[0].nonzero()[:, 0]
    assert torch.equal(kept, tensors["kept_indices"])
    return worst.value


def _check_end_to_end(file: Any) -> float:
    params, worst = file.params, Worst()
    qwen, model, tensors, inputs, visual = either_around(file)
    stages = range(len(params["K"]))
    names = {f"{name}.{i}" for i in stages for name in _STAGE} | (_QWEN if qwen else _LLAMA)
    if "evolution" not in tensors:  # where it does not rank
        names.remove("evolution")
    assert tensors.keys() == names, tensors.keys() ^ names
    (since,) = params["L"]
    method = _OnGrid(
        tuple(params["keeps"]),
        tuple(params["K"]),
        by=_BY[params.get("score_type", "clse_attn")],
        since=since,
        faithful=not qwen,
    )
    recording = Recording(method)
    grids.append(tuple(params["grid"]))
    with torch.no_grad(), recording(model) as run:
        run.mark_visual(visual)
        out = model(**inputs, use_cache=True, output_hidden_states=True)
        _check_stages(method, recording, tensors, worst)
        cache, positions = cache_in(out), params["decode_positions"]
        if qwen:
            lengths = [layer.get_seq_length() for layer in cache.layers]
            worst.compare(out.hidden_states[-1], tensors["last_hidden_state"])
            got = decoded_states(model, cache, tensors, positions)
            worst.compare(got, tensors["decode_hidden"])
        else:
            lengths = _shown(cache, method.layers)
            rows = tensors["logits"].shape[1]
            worst.compare(out.logits[:, -rows:], tensors["logits"])
            got = decoded_logits(model, cache, tensors, positions)
            worst.compare(got, tensors["decode_logits"])
    assert lengths == tensors["cache_lengths"].tolist()
    return worst.value


def _check_stages(
    method: pore.CLSE,
    recording: Recording,
    tensors: dict[str, Tensor],
    worst: Worst,
) -> None:
    for number, view, selection in recording.seen:
        worst.compare(view.attention[0], tensors[f"attention.{number}"])
        worst.compare(method.score(number, view)[0], tensors[f"score.{number}"])
        kept = view.layout.raster[selection.keep]
        assert kept.tolist() == tensors[f"kept_indices.{number}"].tolist()
    if "evolution" not in tensors:
        return
    view = recording.seen[0].view
    energies = [
        high_pass(view.layout.gather(x).unflatten(1, grids[-1]), method.cutoff).flatten(1)
        for x in (view.earlier, view.hidden_states)
    ]
    factor = evolution(*energies, view.layout.valid, method.temperature)
    worst.compare(factor, tensors["evolution"])


def _shown(cache: Any, stages: tuple[int, ...]) -> list[int]:
    """How many tokens every layer shows to later ones. Theirs cut the others out of the cache."""
    record = record_of(cache)
    assert record is not None
    return [
        int(record.tracks[sum(layer >= stage for stage in stages) - 1].valid.sum())
        for layer in range(len(cache.layers))
    ]
