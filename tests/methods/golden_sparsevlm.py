"""Golden files of SparseVLM and SparseVLM+: raters, scores, clusters, and whole models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import pore
from helpers.golden_models import (
    Worst,
    check_decoding,
    check_positions,
    layer_inputs,
    llava_around,
    marked_inputs,
)
from helpers.sparsevlm import Spy, SpyPlus, raters, seen
from pore._compat.caches import cache_in
from pore.bias.rope import rope_prior
from pore.engine.readers import LayerAttention
from pore.engine.stages import View
from pore.layout import Image, Layout
from pore.methods import _sparsevlm
from pore.methods._sparsevlm import (
    RaterAttention,
    Raters,
    clusters,
    rate,
    strongest_heads,
)
from pore.tensors.clustering import density_peaks
from pore.tensors.merging import group_means
from pore.tensors.selection import top_k

_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "image_start", "image_len"}
_RUN = {
    "cache_decode_logits", "cache_decode_position_per_layer", "cache_decode_tokens", "flops",
    "kv_lens_prefill", "last_hidden_state", "logits", "rater_rel_indices", "tokens_per_layer_in",
    "vanilla.logits",
}  # fmt: skip
_STAGE = {
    "kept_indices", "kept_rel", "layer", "position_ids_after", "scores", "text_start_in",
    "v_num_in", "v_num_out",
}  # fmt: skip
_MERGE = {"cluster_num", "density_noise", "merge_in", "merge_source_rel", "merged_tokens"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    tensors: dict[str, Tensor] = dict(file.tensors)
    if "rope_weights" in tensors:
        return _check_prior(tensors)
    if all(key.startswith("cluster") for key in tensors):
        return _check_clusters(tensors)
    if "attn" in tensors:
        return _check_selection(tensors)
    if "lm_head.weight" in tensors:
        return _check_end_to_end(file)
    return _check_raters(tensors)


def _check_prior(tensors: dict[str, Tensor]) -> float:
    assert tensors.keys() == {"head_dim", "position_ids", "rope_theta", "rope_weights"}
    worst, positions = Worst(), tensors["position_ids"]
    size, theta = int(tensors["head_dim"]), float(tensors["rope_theta"])
    distance = positions[:, None] - positions
    prior = rope_prior(distance, head_dim=size, theta=theta)
    worst.compare(prior.float(), tensors["rope_weights"])
    return worst.value


def _check_raters(tensors: dict[str, Tensor]) -> float:
    assert tensors.keys() == {"image_len", "image_start", "inputs_embeds", "rater_rel_indices"}
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    image, text = (tensors["inputs_embeds"][:, part] for part in _parts(start, count))
    ones = [torch.ones(part.shape[:2], dtype=torch.bool) for part in (image, text)]
    chosen = rate(image, ones[0], text, ones[1])
    assert torch.equal(chosen[0].nonzero()[:, 0], tensors["rater_rel_indices"])
    return 0.0


def _parts(start: int, count: int) -> tuple[slice, slice]:
    return slice(start, start + count), slice(start + count, None)


def _check_clusters(tensors: dict[str, Tensor]) -> float:
    worst = Worst()
    cases = {key.split(".")[0] for key in tensors}
    names = ("cluster_num", "density_noise", "merged", "x")
    assert tensors.keys() == {f"{case}.{name}" for case in cases for name in names}
    for case in cases:
        number, noise, merged, x = (tensors[f"{case}.{name}"] for name in names)
        worst.compare(_merged(x, int(number), noise), merged)
    return worst.value


def _merged(x: Tensor, count: int, noise: Tensor | None) -> Tensor:
    valid = torch.ones(1, len(x), dtype=torch.bool)
    draws = None if noise is None else noise[None]
    cluster, _ = density_peaks(x[None], [count], valid, draws)
    return group_means(x[None], cluster, valid, count)[0][0]


class _Given(LayerAttention):
    """Attention weights (1, H, q, k) given in the place of queries."""

    def logits(self, index: Tensor) -> Tensor:
        return self.query[:, :, index[0]].log()


def _check_selection(tensors: dict[str, Tensor]) -> float:
    worst, left = Worst(), dict(tensors)
    attn, start = left.pop("attn"), int(left.pop("image_start"))
    count, rel = int(left.pop("image_len")), left.pop("rater_rel_indices")
    everywhere = torch.arange(attn.shape[-1])
    index = start + count + rel
    if "selected_heads" in left:  # divided by a prior or not, so that rows may add up to anything
        heads = attn[None, :, index, start : start + count].mean(2)
        chosen = strongest_heads(heads, len(left["selected_heads"]))
        assert torch.equal(chosen[0], left.pop("selected_heads"))
        heads = heads[:, chosen[0]]
    else:
        heads = _read(attn, Image(0, 0, range(start, start + count)), index)
    scores = heads.mean(1)
    worst.compare(scores[0], left.pop("scores"))
    prefixes = {key.removesuffix("keep") for key in left if key.endswith("keep")}
    assert prefixes
    for prefix in prefixes:
        # A budget that is not below what there is drops one token all the same.
        keep = min(int(left.pop(f"{prefix}keep")), count - 1)
        kept = top_k(scores, [keep])[0].nonzero()[:, 0]
        assert torch.equal(kept, left.pop(f"{prefix}kept_rel"))
        every = torch.cat([everywhere[:start], start + kept, everywhere[start + count :]])
        if f"{prefix}kept_indices" in left:
            assert torch.equal(every, left.pop(f"{prefix}kept_indices"))
    assert not left, f"keys that are not understood: {sorted(left)}"
    return worst.value


def _read(attn: Tensor, image: Image, index: Tensor) -> Tensor:
    """What the engine's reader takes from attention weights (H, q, k)."""
    tokens = torch.ones(1, attn.shape[-1], dtype=torch.bool)
    layout, origin = Layout.of([image], tokens), torch.arange(tokens.shape[1])[None]
    every = torch.ones(1, len(index), dtype=torch.bool)
    given = _Given(
        layout=layout,
        query=attn[None],
        key=attn[None],
        mask=None,
        scaling=1.0,
        softcap=None,
        past=tokens[:, :0],
        origin=origin,
        memory=Raters(index[None], every, tokens.shape[1], None),
    )
    return RaterAttention()(given).attention


def _check_end_to_end(file: Any) -> float:
    worst, params = Worst(), file.params
    model, tensors = llava_around(file)
    inputs, visual = marked_inputs(tensors)
    expected = {key: value for key, value in tensors.items() if key not in _INPUTS}
    stages = range(len(params["pruning_loc"]))
    version = 2 if "2_0" in params["version"] else 1
    assert version == 2 or "1_0" in params["version"]
    names = {f"stage{s}.{key}" for s in stages for key in _STAGE}
    extra = _MERGE if version == 1 else {"selected_heads"}
    names |= {f"stage{s}.{key}" for s in stages for key in extra}
    # Large files leave the states out.
    features = {f"stage{s}.features_after" for s in stages} & expected.keys()
    assert expected.keys() == names | features | _RUN, expected.keys() ^ (names | features | _RUN)
    kind = Spy if version == 1 else SpyPlus
    pruner = kind(
        tuple(params["keep_per_stage"]),
        tuple(layer + 1 for layer in params["pruning_loc"]),
        faithful=True,
    )
    worst.compare(model(**inputs).logits, expected["vanilla.logits"])
    noises = [expected[f"stage{s}.density_noise"] for s in stages if version == 1]
    with (
        torch.no_grad(),
        patch.object(_sparsevlm, "density_peaks", _noisy(noises)),
        pruner(model) as run,
        layer_inputs(model) as states,
    ):
        run.mark_visual(visual)
        _check_run(model, run, states, inputs, expected, worst)
    return worst.value


def _noisy(noises: Sequence[Tensor]) -> Any:
    """Clustering with the file's noise where that decides: between two clusters."""
    left = iter(noises)

    def cluster(x: Tensor, counts: Sequence[int], valid: Tensor) -> tuple[Tensor, Tensor]:
        noise = next(left)[None]
        return density_peaks(x, counts, valid, noise if list(counts) == [2] else None)

    return cluster


def _check_run(
    model: Any,
    run: pore.Run,
    states: list[tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    expected: dict[str, Tensor],
    worst: Worst,
) -> None:
    pruner: Any = run.pruner
    seen.clear()
    raters.clear()
    out = model(**inputs, use_cache=True, output_hidden_states=True)
    (sample,) = run.report
    (image,) = sample.images
    length = inputs["inputs_embeds"].shape[1]
    (rater,) = raters
    start = int(seen[0][0].layout.columns[0, 0])
    assert (rater.index[0] - start - image.seen).tolist() == expected["rater_rel_indices"].tolist()

    # Original positions, or -1 - s of what was merged at stage s, of all that is left.
    labels = list(range(length))
    for s, (layer, (view, scores, selection)) in enumerate(zip(pruner.layers, seen, strict=True)):
        golden = {
            key.removeprefix(f"stage{s}."): value
            for key, value in expected.items()
            if key.startswith(f"stage{s}.")
        }
        here = view.layout.counts[0]
        assert int(golden["layer"]) == layer - 1
        assert int(golden["v_num_in"]) == here
        assert int(golden["text_start_in"]) == start + here
        worst.compare(scores[0], golden["scores"])
        keep = min(pruner.keep[s], here - 1)
        kept = top_k(scores, [keep])[0].nonzero()[:, 0]
        assert torch.equal(kept, golden["kept_rel"])
        merged = 0
        if pruner.version == 1:
            merged = clusters(here - keep)
            _check_merging(view, scores[0], kept, merged, golden, worst)
        else:
            heads = view.attention.corrected
            assert torch.equal(strongest_heads(heads, 14)[0], golden["selected_heads"])
        assert int(selection.keep.sum()) == int(golden["v_num_out"]) == keep + merged
        labels = [
            *labels[:start],
            *(labels[start + i] for i in kept.tolist()),
            *[-1 - s] * merged,
            *labels[start + here :],
        ]
        assert labels == golden["kept_indices"].tolist()
        patches = [label - start for label in labels if start <= label < start + image.seen]
        assert image.stages[s] == (layer, tuple(patches))
        after, cosines = states[layer]
        check_positions(model, cosines, golden["position_ids_after"])
        if pruner.version == 1:
            worst.compare(after[0, start + keep : start + keep + merged], golden["merged_tokens"])
        if "features_after" in golden:
            worst.compare(after, golden["features_after"])
    assert image.extra == sum(label < 0 for label in labels)
    worst.compare(out.hidden_states[-1], expected["last_hidden_state"])
    worst.compare(out.logits, expected["logits"])

    _check_decoding(model, run, cache_in(out), states, expected, worst)


def _check_decoding(
    model: Any,
    run: pore.Run,
    cache: Any,
    states: list[tuple[Tensor, Tensor]],
    expected: dict[str, Tensor],
    worst: Worst,
) -> None:
    """What the cache holds, what it cost, and what is decoded from it."""
    pruner: Any = run.pruner
    (sample,) = run.report
    (image,) = sample.images
    layers = len(model.model.language_model.layers)
    text = sample.tokens[0] - image.seen
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == expected["kv_lens_prefill"].tolist()
    assert list(sample.tokens) == expected["tokens_per_layer_in"].tolist()
    assert [text + n for n in pruner.counts(image.seen, layers)] == list(sample.tokens)
    config = model.config.text_config
    d, m = config.hidden_size, config.intermediate_size
    flops = sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in sample.tokens)
    assert torch.tensor(float(flops)) == expected["flops"]

    check_decoding(model, cache, states, expected, worst)


def _check_merging(
    view: View,
    scores: Tensor,
    kept: Tensor,
    merged: int,
    golden: dict[str, Tensor],
    worst: Worst,
) -> None:
    dropped = scores.clone()
    dropped[kept] = -torch.inf
    pool = dropped.argsort(descending=True)[: len(golden["merge_in"])]
    assert torch.equal(pool, golden["merge_source_rel"])
    x = view.features[0, pool]
    worst.compare(x, golden["merge_in"])
    assert merged == int(golden["cluster_num"])
    if merged != 2:
        worst.compare(_merged(x, merged, None), golden["merged_tokens"])
    worst.compare(_merged(x, merged, golden["density_noise"]), golden["merged_tokens"])
