"""Golden files of FrameFusion: its calls one by one, and whole decoders to the decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config

import pore
from helpers.golden_models import Worst, decoded_logits, llava_around
from helpers.recording import Recording
from helpers.videos import tiling
from pore._compat.caches import cache_in
from pore.engine.dropping import choose
from pore.engine.forward import Left, Visual
from pore.engine.prefill import Prefill
from pore.engine.stages import View
from pore.layout import Image, Layout

_ALL = {"patch_type", "sparsity_list"}
_EACH = ("hidden_in", "hidden_out", "kept_original")
_END_TO_END = _ALL | {
    "cache_lengths", "decode_logits", "decode_tokens", "inputs_embeds", "lengths_after_call",
    "logits",
}  # fmt: skip


class _OfFrames(pore.FrameFusion):
    """FrameFusion that is told the frames of a video whose tokens are only marked."""

    def _begin(self, view: View) -> Any:
        video = {"tiling": tiling(*frames[-1]), "of_video": True}
        images = tuple(replace(image, **video) for image in view.layout.images)
        begun.append(super()._begin(replace(view, layout=replace(view.layout, images=images))))
        return begun[-1]


frames: list[tuple[int, int]] = []
begun: list[Any] = []


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    return _check_end_to_end(file) if "logits" in file.tensors else _check_calls(file)


def _prepared(params: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[_OfFrames, Tensor]:
    """The method, and which tokens are visual."""
    count, size = params["T"], params["patches_per_frame"]
    frames.append((count, size))
    visual = tensors["patch_type"][0] >= 0
    places = torch.arange(count * size) % size
    assert torch.equal(tensors["patch_type"][0][visual], places)
    given = params["similarity_lower_bound"], params["ratio_lower_bound"]
    faithful = params["num_layers"] == 28  # which their code counts whatever the model has
    return _OfFrames(params["cost"], False, *given, average=True, faithful=faithful), visual


def _check_calls(file: Any) -> float:
    params, tensors, worst = file.params, file.tensors, Worst()
    stages = params["stages"]
    expected = {f"{name}_{i}" for i in range(len(stages)) for name in _EACH} | _ALL
    expected |= {f"attention_{i}" for i, stage in enumerate(stages) if stage == "prune"}
    assert tensors.keys() == expected, tensors.keys() ^ expected
    method, shown = _prepared(params, tensors)
    tokens = torch.ones(1, len(shown), dtype=torch.bool)
    layout = Layout.of([Image(0, 0, shown.nonzero()[:, 0].tolist())], tokens)
    left, visual = Left(tokens, None, False), Visual(layout, Prefill(tokens, layout), None, [])
    nothing = torch.Generator()
    first = View(layout, tensors["hidden_in_0"], None, None, nothing, norm=nn.Identity())
    progress = method._begin(first)
    (fusion,) = progress.fusions
    for i, stage in enumerate(stages):
        hidden, layout = tensors[f"hidden_in_{i}"], visual.layout
        attention = tensors.get(f"attention_{i}")
        if attention is not None:
            attention = layout.gather(attention.mean(1))
        view = View(layout, hidden, attention, None, nothing, nn.Identity(), memory=progress)
        selection = method._fuse(i, params["num_layers"], view)
        out = choose(left, visual, i, selection, hidden)
        kept = torch.arange(len(shown)) if left.index is None else left.index[0]
        assert torch.equal(kept, tensors[f"kept_original_{i}"])
        worst.compare(out, tensors[f"hidden_out_{i}"])
        assert fusion.finished == (stage in ("prune", "merge_topk"))
        assert fusion.merging == (stage == "merge")
    torch.testing.assert_close(torch.tensor(fusion.shares), tensors["sparsity_list"])
    return worst.value


def _check_end_to_end(file: Any) -> float:
    params, worst = file.params, Worst()
    model, tensors = llava_around(file, "config", "weights.", Qwen2Config)
    assert tensors.keys() == _END_TO_END, tensors.keys() ^ _END_TO_END
    method, visual = _prepared(params, tensors)
    embeds = tensors["inputs_embeds"]
    length = embeds.shape[1]
    recording = Recording(method)
    with torch.no_grad(), recording(model) as run:
        run.mark_visual(visual[None])
        out = model(inputs_embeds=embeds, use_cache=True)
        cache = cache_in(out)
        entered = [layer.get_seq_length() for layer in cache.layers]
        steps = range(length, length + len(tensors["decode_tokens"]))
        decoded = decoded_logits(
            model, cache, {"decode_tokens": tensors["decode_tokens"][None]}, list(steps)
        )
    lengths = tensors["lengths_after_call"].tolist()
    assert [seen.number for seen in recording.seen] == list(range(len(lengths)))
    assert list(run.report.samples[0].tokens[: len(lengths)]) == lengths[: len(entered)]
    assert len(params["stages"]) == len(lengths)
    assert entered == tensors["cache_lengths"].tolist()
    worst.compare(out.logits, tensors["logits"])
    worst.compare(decoded[0], tensors["decode_logits"])
    (fusion,) = begun[-1].fusions
    torch.testing.assert_close(torch.tensor(fusion.shares), tensors["sparsity_list"])
    return worst.value
