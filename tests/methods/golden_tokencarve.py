"""Golden files of TokenCarve: both criteria, the merged states, and a whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from helpers.golden_models import Worst, cut_cache, decoded_logits, layer_inputs, llava_around
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.engine.stages import View
from pore.layout import Image, Layout
from pore.methods.tokencarve import rank_points, singular_scores
from pore.tensors.attention import visual_weights

_RUN_PARAMS = {"tokens", "rank", "merge", "mode", "weight"}
_SELECTION = {"hidden", "attn_last_row", "image_start", "image_len", "attn_score", "svd_score"}
_RUN = {"kept", "kept_indices", "hidden_after"}
_END_TO_END = {
    "inputs_embeds", "image_start", "image_len", "attn_score", "svd_score", "rank_score", "kept",
    "kept_indices", "hidden_after", "last_hidden_state", "logits", "kv_lens_prefill",
    "decode_tokens", "decode_logits",
}  # fmt: skip


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    if file.params["level"] == "selection":
        return _check_selection(file)
    return _check_end_to_end(file)


def _pruner(params: dict[str, Any], visual: int, layer: int = 2) -> pore.TokenCarve:
    tokens = params["tokens"]
    assert params["rank"] == int(tokens / 2 * 3) <= visual
    assert params["merge"] == int(tokens / 2)
    weight = {0: params["weight"], 1: 0.0, 2: 1.0}[params["mode"]]
    return pore.TokenCarve(keep=tokens, layer=layer, weight=weight)


def _check_scores(tensors: dict[str, Tensor], prefix: str, view: View, mode: dict[str, Any]) -> Any:
    """Compare the criteria and, where both count, what they come to."""
    worst, valid = Worst(), view.layout.valid
    scores = singular_scores(view.features, valid)
    worst.compare(view.attention[0], tensors["attn_score"])
    worst.compare(scores[0], tensors["svd_score"])
    ranks = mode["weight"] * rank_points(view.attention, valid)
    ranks = ranks + (1 - mode["weight"]) * rank_points(scores, valid)
    if f"{prefix}rank_score" in tensors:
        worst.compare(ranks[0], tensors[f"{prefix}rank_score"])
    return worst


def _check_selection(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    assert params.keys() == {"level", "seed", "runs"}, params.keys()
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    hidden = tensors["hidden"][None]
    image = Image(0, 0, range(start, start + count))
    layout = Layout.of([image], torch.ones(hidden.shape[:2], dtype=torch.bool))
    logits = tensors["attn_last_row"][None, :, None].log()
    attention = visual_weights(logits, layout.columns, layout.valid)[:, :, 0].mean(1)
    view = View(layout, hidden, attention, None, torch.Generator(), norm=lambda x: x)
    left = tensors.keys() - _SELECTION
    for run in params["runs"]:
        prefix = run["prefix"]
        assert run.keys() == _RUN_PARAMS | {"prefix"}, run.keys()
        own = {f"{prefix}{key}" for key in _RUN}
        own |= {f"{prefix}rank_score"} & left
        assert own <= left, own - left
        left -= own
        scored = _check_scores(tensors, prefix, view, run)
        worst.value = max(worst.value, scored.value)
        made = _pruner(run, count)._select(view)
        assert made.keep[0].nonzero()[:, 0].tolist() == tensors[f"{prefix}kept"].tolist()
        kept = layout.kept_tokens(made.keep)[0].nonzero()[:, 0]
        assert kept.tolist() == tensors[f"{prefix}kept_indices"].tolist()
        after = hidden[0].clone()
        if made.features is not None:
            after[start : start + count] = made.features[0]
        worst.compare(after[kept], tensors[f"{prefix}hidden_after"])
    assert not left, f"keys that are not understood: {sorted(left)}"
    return worst.value


def _check_end_to_end(file: Any) -> float:
    params = file.params
    known = _RUN_PARAMS | {"level", "seed", "K", "post", "config", "decode_positions"}
    assert params.keys() == known | {"logits_rows"}, params.keys()
    model, tensors = llava_around(file)
    assert tensors.keys() == _END_TO_END, tensors.keys() ^ _END_TO_END
    embeds, layer = tensors["inputs_embeds"], params["K"]
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    length = embeds.shape[1]
    assert length == start + count + params["post"]
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, start : start + count] = True
    recording = Recording(_pruner(params, count, layer))
    with torch.no_grad(), recording(model) as run, layer_inputs(model) as states:
        run.mark_visual(visual)
        out = model(inputs_embeds=embeds, use_cache=True, output_hidden_states=True)
    worst = _check_scores(tensors, "", recording.seen[0].view, params)
    (image,) = run.report.samples[0].images
    assert list(image.kept) == tensors["kept"].tolist()
    kept = tensors["kept_indices"]
    text = [i for i in range(length) if not visual[0, i]]
    assert sorted([*text, *(start + i for i in image.kept)]) == kept.tolist()
    worst.compare(states[layer][0], tensors["hidden_after"])
    worst.compare(out.hidden_states[-1], tensors["last_hidden_state"])
    rows = tensors["logits"].shape[1]
    worst.compare(out.logits[:, -rows:], tensors["logits"])

    # Theirs cuts what layers 0 and 1 have cached, whatever K.
    cache = cut_cache(cache_in(out), range(min(2, layer)), kept)
    lengths = [one.get_seq_length() for one in cache.layers]
    assert lengths == tensors["kv_lens_prefill"].tolist()
    tokens = {"decode_tokens": tensors["decode_tokens"][None]}
    decoded = decoded_logits(model, cache, tokens, params["decode_positions"])[0]
    for got, logits in zip(decoded, tensors["decode_logits"], strict=True):
        worst.compare(got, logits)
    return worst.value
