"""Golden files of FEATHER: the choice from given scores, and a whole model to the decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from helpers.caches import as_argument
from helpers.golden_models import Worst, llava_around, marked_inputs
from pore._compat.caches import cache_in
from pore.engine.stages import Selection, View
from pore.layout import Image, Layout

_RUN = {
    "decode_logits", "decode_tokens", "image_len", "image_start", "inputs_embeds", "kept_indices",
    "kv_lens_prefill", "last_hidden_state", "logits",
}  # fmt: skip
_SELECTION = {"image_len", "image_start", "kept_indices"}
_STAGE = {"k", "kept", "score"}


class _Spy(pore.FEATHER):
    """FEATHER that remembers what its stages saw and chose."""

    def _select(self, stage: int, view: View) -> Selection:
        selection = super()._select(stage, view)
        seen.append((view, selection.keep))
        return selection


seen: list[tuple[View, Tensor]] = []


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    stages = range(len(file.params["layers"]))
    names = {f"stage{i}.{name}" for i in stages for name in _STAGE}
    weights = {name for name in file.tensors if name.startswith(("model.", "lm_head."))}
    expected = names | weights | (_RUN if weights else _SELECTION)
    assert file.tensors.keys() == expected, file.tensors.keys() ^ expected
    return _check_end_to_end(file) if weights else _check_selection(file)


def _method(params: dict[str, Any]) -> pore.FEATHER:
    criterion, *stride = params["mask"].split("_s=")
    assert criterion == "no_rope"
    return _Spy(
        1 - params["fastv_ratio"],
        tuple(params["layers"]),
        int(stride[0]) if stride else None,
        faithful=True,
    )


def _check_selection(file: Any) -> float:
    tensors, method = file.tensors, _method(file.params)
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    length = start + count + file.params["post"]
    tokens = torch.ones(1, length, dtype=torch.bool)
    layout = Layout.of([Image(0, 0, range(start, start + count))], tokens)
    for stage in range(len(method.layers)):
        states = torch.zeros(1, int(layout.tokens.sum()), 1)
        score = tensors[f"stage{stage}.score"][None]
        view = View(layout, states, score, None, torch.Generator(), norm=lambda x: x)
        keep = method._select(stage, view).keep
        _check_stage(tensors, stage, layout, keep)
        kept = layout.kept_tokens(keep)
        index = kept.nonzero()[:, 1][None]
        layout = layout.shorten(keep, index, torch.ones_like(index, dtype=torch.bool))
    left = _absolute(start, count, length, layout.raster[0].tolist())
    assert left == tensors["kept_indices"].tolist()
    return 0.0


def _check_stage(tensors: dict[str, Tensor], stage: int, layout: Layout, keep: Tensor) -> None:
    """What stays is what the file says, and so are those that its score alone kept."""
    kept = layout.raster[keep]
    assert kept.tolist() == tensors[f"stage{stage}.kept"].tolist()
    best = tensors[f"stage{stage}.score"].topk(int(tensors[f"stage{stage}.k"])).indices
    assert set(layout.raster[0][best].tolist()) <= set(kept.tolist())


def _absolute(start: int, count: int, length: int, kept: list[int]) -> list[int]:
    """The positions of all that is left in the prompt."""
    text = [i for i in range(length) if not start <= i < start + count]
    return sorted(text + [start + i for i in kept])


def _check_end_to_end(file: Any) -> float:
    worst, method = Worst(), _method(file.params)
    model, tensors = llava_around(file)
    length = tensors["inputs_embeds"].shape[1]
    tensors["attention_mask"] = torch.ones(1, length, dtype=torch.long)
    inputs, visual = marked_inputs(tensors)
    seen.clear()
    with torch.no_grad(), method(model) as run:
        run.mark_visual(visual)
        out = model(**inputs, use_cache=True, output_hidden_states=True)
        cache = cache_in(out)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        steps = []
        for token, position in zip(
            tensors["decode_tokens"], file.params["decode_positions"], strict=True
        ):
            step = model(
                input_ids=token.view(1, 1),
                **as_argument(cache),
                position_ids=torch.tensor([[position]]),
            )
            steps.append(step.logits[0, -1])
    for stage, (view, keep) in enumerate(seen):
        worst.compare(view.attention[0], tensors[f"stage{stage}.score"])
        _check_stage(tensors, stage, view.layout, keep)
    assert len(seen) == len(method.layers)
    (image,) = run.report.samples[0].images
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    assert _absolute(start, count, length, list(image.kept)) == tensors["kept_indices"].tolist()
    worst.compare(out.hidden_states[-1], tensors["last_hidden_state"])
    worst.compare(out.logits, tensors["logits"])
    assert lengths == tensors["kv_lens_prefill"].tolist()
    worst.compare(torch.stack(steps), tensors["decode_logits"])
    return worst.value
