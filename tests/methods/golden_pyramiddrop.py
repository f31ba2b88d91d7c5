"""Golden files of PyramidDrop: scores, survivors, positions and cached decode of every stage."""

from __future__ import annotations

import re
from typing import Any

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
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.tensors.attention import visual_weights
from pore.tensors.selection import top_k

_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "image_start", "image_len"}
_RUN = {
    "cache_decode_logits", "cache_decode_position_per_layer", "cache_decode_tokens",
    "image_token_ratio_list", "kv_lens_prefill", "last_hidden_state", "layer_list", "logits",
}  # fmt: skip
_STAGE = {"kept_image_rel_in_current", "kept_indices", "position_ids_after", "scores"}
_CASE = {"attn", "image_len", "image_start", "keep", "kept_indices"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    if "inputs_embeds" in file.tensors:
        return _check_end_to_end(file)
    tensors: dict[str, Tensor] = dict(file.tensors)
    cases = {key.split(".")[0] for key in tensors}
    assert tensors.keys() == {f"{case}.{key}" for case in cases for key in _CASE}
    for case in cases:
        _check_selection({key: tensors[f"{case}.{key}"] for key in _CASE})
    return 0.0


def _check_selection(case: dict[str, Tensor]) -> None:
    start, count = int(case["image_start"]), int(case["image_len"])
    columns = torch.arange(start, start + count)[None]
    valid = torch.ones_like(columns, dtype=torch.bool)
    score = visual_weights(case["attn"][None, :, -1:].log(), columns, valid)[:, :, 0].mean(1)
    kept = torch.ones(case["attn"].shape[-1], dtype=torch.bool)
    kept[start : start + count] = top_k(score, [int(case["keep"])])[0]
    assert torch.equal(kept.nonzero()[:, 0], case["kept_indices"])


def _check_end_to_end(file: Any) -> float:
    worst = Worst()
    model, tensors = llava_around(file)
    inputs, visual = marked_inputs(tensors)
    left = tensors.keys() - _INPUTS - {"vanilla.logits", "vanilla.last_hidden_state"}
    dense = model(**inputs, output_hidden_states=True)
    worst.compare(dense.logits, tensors["vanilla.logits"])
    worst.compare(dense.hidden_states[-1], tensors["vanilla.last_hidden_state"])
    for run in file.params["runs"]:
        own = {key for key in left if key.startswith(run["prefix"])}
        expected = {key.removeprefix(run["prefix"]): tensors[key] for key in own}
        left -= own
        assert expected["layer_list"].tolist() == run["layer_list"]
        ratios = torch.tensor(run["image_token_ratio_list"])
        torch.testing.assert_close(expected["image_token_ratio_list"], ratios)
        recording = Recording(
            pore.PyramidDrop(tuple(run["image_token_ratio_list"]), tuple(run["layer_list"]))
        )
        with torch.no_grad(), recording(model) as pruned, layer_inputs(model) as seen:
            pruned.mark_visual(visual)
            _check_run(model, pruned, seen, inputs, int(tensors["image_start"]), expected, worst)
    assert not left, f"keys that are not understood: {sorted(left)}"
    return worst.value


def _check_run(
    model: Any,
    run: pore.Run,
    seen: list[tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    start: int,
    expected: dict[str, Tensor],
    worst: Worst,
) -> None:
    recording: Any = run.pruner
    method = recording.method
    layers = method.layers
    names = {f"stage{s}.{key}" for s in range(len(layers)) for key in _STAGE}
    features = {key for key in expected if re.fullmatch(r"stage\d+\.features_after", key)}
    assert expected.keys() == _RUN | names | features, expected.keys() ^ (_RUN | names | features)
    seen.clear()
    out = model(**inputs, use_cache=True, output_hidden_states=True)
    (sample,) = run.report
    (image,) = sample.images
    length = inputs["inputs_embeds"].shape[1]
    before = tuple(range(image.seen))
    for s, (layer, kept) in enumerate(image.stages):
        golden = {key: expected.get(f"stage{s}.{key}") for key in (*_STAGE, "features_after")}
        assert layer == layers[s]
        worst.compare(recording.seen[s].view.attention[0], golden["scores"])
        assert [before.index(i) for i in kept] == golden["kept_image_rel_in_current"].tolist()
        text = [i for i in range(length) if not start <= i < start + image.seen]
        columns = sorted([*text, *(start + i for i in kept)])
        assert columns == golden["kept_indices"].tolist()
        states, cosines = seen[layer]
        check_positions(model, cosines, golden["position_ids_after"][0])
        if golden["features_after"] is not None:
            worst.compare(states, golden["features_after"])
        before = kept
    worst.compare(out.hidden_states[-1], expected["last_hidden_state"])
    worst.compare(out.logits, expected["logits"])

    cache = cache_in(out)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == list(sample.tokens) == expected["kv_lens_prefill"].tolist()
    text = length - image.seen
    assert [text + n for n in method.counts(image.seen, len(lengths))] == lengths
    check_decoding(model, cache, seen, expected, worst)
