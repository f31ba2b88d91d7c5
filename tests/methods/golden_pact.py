"""Golden files of PACT: clusters of given keys, and whole decoders to the decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config

import pore
from helpers.golden_models import Worst, decoded_logits, layer_inputs, llava_around
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.methods.pact import assign, density, distances, greedy_centres, merge
from pore.tensors.gathering import inverse

_SELECTION = {"centres", "hidden", "keys", "labels", "merged", "sizes"}
_PRUNED = {"pruned_hidden", "pruned_keys"}
_END_TO_END = {
    "cache_lengths", "decode_logits", "decode_tokens", "inputs_embeds", "is_image", "kept_indices",
    "kept_positions", "labels", "logits", "merged", "scores", "sizes", "survivors",
}  # fmt: skip


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    return _check_selection(file) if "keys" in file.tensors else _check_end_to_end(file)


def _check_selection(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    assert tensors.keys() in (_SELECTION, _SELECTION | _PRUNED), tensors.keys() ^ _SELECTION
    keys, hidden, reach = tensors["keys"], tensors["hidden"], None
    on = torch.arange(len(keys))
    between = distances(keys, keys).fill_diagonal_(0.0)
    rank = inverse(density(between, params["dc"]).argsort(descending=True))
    centres = greedy_centres(between, rank, params["cutoff"]).nonzero()[:, 0]
    assert torch.equal(centres, tensors["centres"])
    if "pruned_keys" in tensors:
        keys = torch.cat([keys, tensors["pruned_keys"]])
        hidden = torch.cat([hidden, tensors["pruned_hidden"]])
        reach = params["cutoff"] * params["coef_pruned"]
    found = assign(keys, on, centres, reach)
    assert torch.equal(_named(found.labels, centres), tensors["labels"])
    means, sizes = merge(hidden, torch.ones(len(keys)), found)
    worst.compare(means if params["take_mean"] else hidden[centres], tensors["merged"])
    worst.compare(sizes, tensors["sizes"])
    return worst.value


def _named(labels: Tensor, centres: Tensor) -> Tensor:
    """The centre of every token in place of its number; -1 where a token is dropped."""
    return torch.where(labels < 0, -1, centres[labels])


def _check_end_to_end(file: Any) -> float:
    params, worst = file.params, Worst()
    model, tensors = llava_around(file, "qwen2_config", "qwen2.", Qwen2Config)
    assert tensors.keys() == _END_TO_END, tensors.keys() ^ _END_TO_END
    embeds, visual = tensors["inputs_embeds"], tensors["is_image"].bool()
    assert embeds.shape[1] == params["S"]
    assert int(visual.sum()) == params["n_image"]
    method = pore.PACT(
        cutoff=params["cutoff"],
        layer=params["layer"],
        share=params["keep_fraction"],
        reach=params["coef_pruned"] if params["retrieval"] else None,
        proportional=params["proportional_attention"],
        faithful=True,
    )
    recording = Recording(method)
    with torch.no_grad(), recording(model) as run, layer_inputs(model) as states:
        run.mark_visual(visual[None])
        out = model(inputs_embeds=embeds, use_cache=True)
        cache = cache_in(out)
        entering = states[params["layer"]][0][0]
        decoded = decoded_logits(model, cache, tensors, params["decode_positions"])
    _check_choice(method, recording.seen[0], tensors, visual, worst)
    kept = _places(visual, tensors["kept_indices"])
    assert torch.equal(kept, tensors["kept_positions"])
    left = torch.cat([(~visual).nonzero()[:, 0], kept]).sort().values
    worst.compare(entering[torch.isin(left, kept)], tensors["merged"])
    worst.compare(out.logits[:, -tensors["logits"].shape[1] :], tensors["logits"])
    worst.compare(decoded, tensors["decode_logits"])
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == tensors["cache_lengths"].tolist()
    return worst.value


def _places(visual: Tensor, indices: Tensor) -> Tensor:
    """Where visual tokens with these numbers lie in the prompt."""
    return visual.nonzero()[:, 0][indices]


def _check_choice(
    method: pore.PACT, seen: Any, tensors: dict[str, Tensor], visual: Tensor, worst: Worst
) -> None:
    """Compare importance, what goes on, clusters and sizes."""
    view, selection = seen.view, seen.selection
    layout = view.layout
    scores = (view.attention.attention * view.features.norm(dim=-1))[layout.valid]
    worst.compare(scores, tensors["scores"])
    survivors = tensors["survivors"]
    count = int(len(scores) * method.share)
    assert torch.equal(scores.topk(count).indices.sort().values, survivors)
    keys = layout.gather(view.attention.keys)[layout.valid]
    found = method._cluster(scores, keys, None)
    assert torch.equal(found.centres, tensors["kept_indices"])
    labels, where = tensors["labels"], torch.arange(len(scores))
    pruned = where[~torch.isin(where, survivors)]
    order = torch.cat([survivors, pruned])[: len(labels)]
    expected = torch.where(labels < 0, -1, survivors[labels])
    assert torch.equal(_named(found.labels, found.centres)[order], expected)
    columns = layout.columns[layout.valid][selection.keep[layout.valid]]
    assert torch.equal(columns, _places(visual, tensors["kept_indices"]))
    sizes = torch.bincount(found.labels[found.labels >= 0]).float()
    worst.compare(sizes, tensors["sizes"])
