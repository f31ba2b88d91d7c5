"""Golden files of DART: the choice of tokens, and a whole model with its cached decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from helpers.caches import as_argument
from helpers.golden_models import Worst, llava_around
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.engine.stages import View
from pore.layout import Image, Layout
from pore.methods.dart import key_norms, largest, set_order

_PARAMS = {
    "level", "start", "N", "post", "pivot_image_token", "pivot_text_token", "reduction_ratio",
    "topk_per_pivot", "kept", "seed",
}  # fmt: skip
_SELECTION_PARAMS = _PARAMS | {"heads", "head_dim", "D", "python"}
_END_TO_END_PARAMS = _PARAMS | {"pruning_loc", "llama_config", "decode_positions", "attn"}
_CHOICE = {"image_pivots", "text_pivots", "pivot_visit_order", "retained_set_order"}
_SELECTION = _CHOICE | {"normed_states", "key_states", "retained_sorted"}
_END_TO_END = _CHOICE | {
    "inputs_embeds", "keep_indices", "logits", "decode_tokens", "decode_logits", "cache_lengths",
    "unpruned_logits_last",
}  # fmt: skip


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    known = {"selection": _SELECTION_PARAMS, "e2e_llm": _END_TO_END_PARAMS}[file.params["level"]]
    assert file.params.keys() <= known, file.params.keys() - known
    if file.params["level"] == "selection":
        return _check_selection(file)
    return _check_end_to_end(file)


def _pruner(params: dict[str, Any]) -> pore.DART:
    return pore.DART(
        keep=1 - params["reduction_ratio"],
        layer=params.get("pruning_loc", 2),
        image_pivots=params["pivot_image_token"],
        text_pivots=params["pivot_text_token"],
        faithful=True,
    )


def _check_pivots(file: Any, layout: Layout, norms: Tensor) -> None:
    """The pivots by falling norm, the order in which they are visited, and picks of each."""
    params, tensors = file.params, file.tensors
    pivots = params["pivot_image_token"] + params["pivot_text_token"]
    picks = _pruner(params)._picks(torch.tensor(params["N"]), torch.tensor(pivots))
    assert int(picks) == params["topk_per_pivot"]
    visual = layout.gather(norms)
    own, is_own = largest(visual, params["pivot_image_token"], layout.valid)
    text, is_text = largest(norms, params["pivot_text_token"], layout.text_after)
    own = layout.columns.gather(1, own)
    assert own[0].tolist() == tensors["image_pivots"].tolist()
    assert text[0].tolist() == tensors["text_pivots"].tolist()
    pivots = torch.cat([own, text], 1)
    order = set_order(pivots, torch.cat([is_own, is_text], 1))
    assert pivots.gather(1, order)[0].tolist() == tensors["pivot_visit_order"].tolist()


def _check_selection(file: Any) -> float:
    params, tensors = file.params, file.tensors
    assert tensors.keys() == _SELECTION, tensors.keys() ^ _SELECTION
    start, count = params["start"], params["N"]
    norms, states = key_norms(tensors["key_states"]), tensors["normed_states"]
    image = Image(0, 0, range(start, start + count))
    layout = Layout.of([image], torch.ones(norms.shape, dtype=torch.bool))
    assert norms.shape[1] == start + count + params["post"]
    _check_pivots(file, layout, norms)
    view = View(layout, states, norms, None, torch.Generator(), norm=lambda x: x)
    kept = _pruner(params)._select(view).keep[0].nonzero()[:, 0] + start
    assert kept.tolist() == tensors["retained_sorted"].tolist()
    assert kept.tolist() == sorted(tensors["retained_set_order"].tolist())
    assert len(kept) == params["kept"]
    return 0.0


def _check_end_to_end(file: Any) -> float:
    params, worst = file.params, Worst()
    model, tensors = llava_around(file, "llama_config", "llama.")
    assert tensors.keys() == _END_TO_END, tensors.keys() ^ _END_TO_END
    embeds, start, count = tensors["inputs_embeds"], params["start"], params["N"]
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, start : start + count] = True

    with torch.no_grad():
        worst.compare(model(inputs_embeds=embeds).logits[:, -1], tensors["unpruned_logits_last"])
        recording = Recording(_pruner(params))
        with recording(model) as run:
            run.mark_visual(visual)
            out = model(inputs_embeds=embeds, use_cache=True)
            view = recording.seen[0].view
            _check_pivots(file, view.layout, view.attention)
            (image,) = run.report.samples[0].images
            kept = [start + i for i in image.kept]
            assert kept == sorted(tensors["retained_set_order"].tolist())
            assert len(kept) == params["kept"]
            text = [i for i in range(embeds.shape[1]) if not visual[0, i]]
            assert sorted(kept + text) == tensors["keep_indices"].tolist()
            worst.compare(out.logits, tensors["logits"])
            cache = cache_in(out)
            steps = zip(tensors["decode_tokens"], tensors["decode_logits"], strict=True)
            for number, (token, logits) in enumerate(steps):
                assert params["decode_positions"][number] == embeds.shape[1] + number
                step = model(input_ids=token.view(1, 1), **as_argument(cache))
                worst.compare(step.logits[0, -1], logits)
            lengths = [layer.get_seq_length() for layer in cache.layers]
            assert lengths == tensors["cache_lengths"].tolist()
    return worst.value
