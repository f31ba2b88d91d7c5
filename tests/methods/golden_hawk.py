"""Golden files of HAWK: scores of given queries and keys, and a whole model to the decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from helpers.caches import as_argument
from helpers.golden_models import Worst
from helpers.golden_qwen import prompt_of, qwen_around
from pore._compat.caches import cache_in
from pore.engine.readers import LayerAttention
from pore.engine.stages import Selection, View
from pore.layout import Image, Layout
from pore.methods.hawk import likeness, weighted
from pore.tensors.selection import top_k

_NORMALIZATIONS = ("l2", "softmax", "minmax")
_RUN = {
    "decode_logits", "decode_positions", "decode_tokens", "head_weights", "image_len",
    "image_start", "input_ids", "inputs_embeds", "kept", "kept_indices", "kv_len_prefill",
    "last_hidden_state", "logits", "position_ids", "query_rows", "score",
}  # fmt: skip


class _Spy(pore.HAWK):
    """HAWK that remembers what it saw."""

    def _select(self, view: View) -> Selection:
        seen.append(view)
        return super()._select(view)


seen: list[View] = []


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    return _check_selection(file) if "query_states" in file.tensors else _check_end_to_end(file)


def _check_selection(file: Any) -> float:
    tensors, worst = dict(file.tensors), Worst()
    query, key = (tensors.pop(f"{name}_states")[None] for name in ("query", "key"))
    weights = tensors.pop("head_weights").tolist()
    columns, length = tensors.pop("visual_indices"), int(tensors.pop("sequence_length"))
    count, rows = len(columns), query.shape[2]
    attention = _attention(query, key)
    every = torch.ones(1, rows, dtype=torch.bool)
    values = likeness(attention, count + torch.arange(rows)[None], every)
    visual = torch.zeros(length, dtype=torch.bool)
    visual[columns] = True
    for how in _NORMALIZATIONS:
        scores = weighted(values, attention.layout.valid, how, weights)  # type: ignore[arg-type]
        worst.compare(scores[0], tensors.pop(f"{how}.score"))
        for ratio in file.params["ratios"]:
            method = pore.HAWK(float(ratio), tuple(weights), how)  # type: ignore[arg-type]
            kept = top_k(scores, [method.kept(count)])[0]
            assert kept.nonzero()[:, 0].tolist() == tensors.pop(f"{how}.r{ratio}.kept").tolist()
            left = ~visual
            left[columns[kept]] = True
            expected = tensors.pop(f"{how}.r{ratio}.kept_indices")
            assert left.nonzero()[:, 0].tolist() == expected.tolist()
    assert not tensors, f"keys that are not understood: {sorted(tensors)}"
    return worst.value


def _attention(query: Tensor, key: Tensor) -> LayerAttention:
    """A prompt of visual tokens with these keys (1, H, N, d), then text with these queries."""
    count, rows = key.shape[2], query.shape[2]
    tokens = torch.ones(1, count + rows, dtype=torch.bool)
    return LayerAttention(
        layout=Layout.of([Image(0, 0, range(count))], tokens),
        query=torch.cat([torch.zeros_like(key), query], 2),
        key=torch.cat([key, torch.zeros_like(query)], 2),
        mask=None,
        scaling=query.shape[-1] ** -0.5,
        softcap=None,
        past=tokens[:, :0],
        origin=torch.arange(count + rows)[None],
    )


def _check_end_to_end(file: Any) -> float:
    worst, params = Worst(), file.params
    model, tensors = qwen_around(file, "Qwen2_5_VL")
    assert tensors.keys() == _RUN, tensors.keys() ^ _RUN
    inputs = prompt_of(file, model, tensors)
    method = _Spy(
        params["keep_ratio"],
        tuple(tensors["head_weights"].tolist()),
        params["score_normalization"],
        (params["vision_end_token_id"], params["im_end_token_id"]),
    )
    seen.clear()
    with torch.no_grad(), method(model) as run:
        out = model(**inputs, use_cache=True, output_hidden_states=True)
        cache = cache_in(out)
        lengths = {layer.get_seq_length() for layer in cache.layers}
        steps = []
        for token, position in zip(
            tensors["decode_tokens"], tensors["decode_positions"], strict=True
        ):
            step = model(
                input_ids=token.view(1, 1),
                **as_argument(cache),
                position_ids=position[:, None, None],
            )
            steps.append(step.logits[0, -1])
    ((index, valid),) = (view.memory for view in seen)
    assert index[valid].tolist() == tensors["query_rows"].tolist()
    worst.compare(seen[0].attention[0], tensors["score"])
    (image,) = run.report.samples[0].images
    assert list(image.kept) == tensors["kept"].tolist()
    start, length = int(tensors["image_start"]), inputs["input_ids"].shape[1]
    text = [i for i in range(length) if not start <= i < start + image.seen]
    left = sorted(text + [start + i for i in image.kept])
    assert left == tensors["kept_indices"].tolist()
    worst.compare(out.hidden_states[-1], tensors["last_hidden_state"])
    worst.compare(out.logits, tensors["logits"])
    assert lengths == {int(tensors["kv_len_prefill"])}
    worst.compare(torch.stack(steps), tensors["decode_logits"])
    return worst.value
