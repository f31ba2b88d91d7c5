"""Golden files of V2Drop: whole decoders, from the states of every stage to the decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from helpers.golden_models import Worst, decoded_logits
from helpers.golden_qwen import decoded_states, either_around
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.methods.v2drop import variation

_RUN = {"cache_lengths", "inputs_embeds"}
_LLAMA = _RUN | {"decode_logits", "decode_tokens", "logits"}
_QWEN = _RUN | {"decode_embeds", "decode_hidden", "last_hidden_state", "position_ids"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    params, worst = file.params, Worst()
    qwen, model, tensors, inputs, visual = either_around(file)
    stages = range(len(params["layers"]))
    names = {f"{name}.{i}" for i in stages for name in ("kept_indices", "variation")}
    names |= _QWEN if qwen else _LLAMA
    assert tensors.keys() == names, tensors.keys() ^ names
    left = _left(params)
    if left[-1] == 1 and left[:-1] == [params["N"] >> i for i in range(1, len(left))]:
        assert pore.V2Drop(1, tuple(params["layers"])).remaining(params["N"]) == left
    for faithful in (False, True) if params["B"] == 1 else (True,):
        recording = Recording(pore.V2Drop(tuple(left), tuple(params["layers"]), faithful))
        with torch.no_grad(), recording(model) as run:
            run.mark_visual(visual)
            out = model(**inputs, use_cache=True, output_hidden_states=True)
            cache = cache_in(out)
            lengths = [layer.get_seq_length() for layer in cache.layers]
            _check_stages(recording, tensors, worst)
            if qwen:
                worst.compare(out.hidden_states[-1], tensors["last_hidden_state"])
                got = decoded_states(model, cache, tensors, params["decode_positions"])
                worst.compare(got, tensors["decode_hidden"])
            else:
                rows = tensors["logits"].shape[1]
                worst.compare(out.logits[:, -rows:], tensors["logits"])
                got = decoded_logits(model, cache, tensors, params["decode_positions"])
                worst.compare(got, tensors["decode_logits"])
        assert lengths == tensors["cache_lengths"].tolist()
    return worst.value


def _left(params: dict[str, Any]) -> list[int]:
    """Tokens left after every stage: a share of those present, rounded down, at least one."""
    left = [params["N"]]
    for ratio in params["ratios"]:
        left.append(max(1, int(left[-1] * ratio)))
    return left[1:]


def _check_stages(recording: Recording, tensors: dict[str, Tensor], worst: Worst) -> None:
    for number, view, selection in recording.seen:
        before, after = view.layout.gather(view.earlier), view.features
        worst.compare(variation(before, after)[0], tensors[f"variation.{number}"])
        expected = tensors[f"kept_indices.{number}"].tolist()
        for raster, keep in zip(view.layout.raster, selection.keep, strict=True):
            assert raster[keep].tolist() == expected
