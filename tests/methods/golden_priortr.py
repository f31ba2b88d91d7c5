"""Golden files of PriorTR: scores of given attention, and whole models to the decode."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import pore
from helpers.caches import as_argument
from helpers.golden_models import Worst, llava_around, marked_inputs
from helpers.golden_qwen import prompt_of, qwen_around
from pore._compat.caches import cache_in
from pore.engine.readers import LayerAttention
from pore.engine.stages import Selection, View
from pore.layout import Image, Layout
from pore.methods.priortr import QuestionAndNull, gained
from pore.tensors.selection import top_k

_VARIANTS: dict[str, dict[str, Any]] = {
    "llava": {"with_last": True, "offset": 0},
    "internvl": {"with_last": True, "offset": 1},
    "qwen": {"with_last": False, "offset": 0},
    # Their attention before the question is of a forward by itself; here it is given.
    "two_forward": {"with_last": False, "offset": 0},
}
_SCORE = re.compile(r"(\w+)\.(question|last)\.(mean|max)\.score")
_RUN = {
    "decode_logits", "decode_tokens", "image_len", "image_start", "inputs_embeds", "kept_indices",
    "kv_lens_prefill", "last_hidden_state", "logits",
}  # fmt: skip
_QWEN = {"decode_positions", "input_ids", "position_ids"}
_STAGE = {"kept", "score"}


class _Spy(pore.PriorTR):
    """PriorTR that remembers how its stages scored and what they chose."""

    def _select(self, stage: int, view: View) -> Selection:
        selection = super()._select(stage, view)
        kept = view.layout.raster[selection.keep]
        seen.append((self.score(stage, view)[0], kept.tolist()))
        return selection


seen: list[tuple[Tensor, list[int]]] = []


class _Given(LayerAttention):
    """Attention weights (1, H, q, k) given in the place of queries."""

    def logits(self, index: Tensor) -> Tensor:
        return self.query[:, :, index[0]].log()


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    return _check_selection(file) if "attn" in file.tensors else _check_end_to_end(file)


def _check_selection(file: Any) -> float:
    tensors, worst = dict(file.tensors), Worst()
    attn, prior = tensors.pop("attn"), tensors.pop("prior")
    start, count = int(tensors.pop("image_start")), int(tensors.pop("image_len"))
    tokens = torch.ones(1, attn.shape[-1], dtype=torch.bool)
    given = _Given(
        layout=Layout.of([Image(0, 0, range(start, start + count))], tokens),
        query=attn[None],
        key=attn[None],
        mask=None,
        scaling=1.0,
        softcap=None,
        past=tokens[:, :0],
        origin=torch.arange(attn.shape[-1])[None],
    )
    runs = [match.groups() for name in tensors if (match := _SCORE.fullmatch(name))]
    for variant, query, heads in runs:
        reader = QuestionAndNull(query, heads, causal=True, **_VARIANTS[variant])
        question, null = reader(given).unbind(1)
        scores = gained(question, prior[None] if variant == "two_forward" else null)
        prefix = f"{variant}.{query}.{heads}."
        worst.compare(scores[0], tensors.pop(f"{prefix}score"))
        for keep in file.params["keeps"]:
            kept = top_k(scores, [keep])[0].nonzero()[:, 0]
            assert kept.tolist() == tensors.pop(f"{prefix}keep{keep}").tolist()
    assert runs
    assert not tensors, f"keys that are not understood: {sorted(tensors)}"
    return worst.value


def _method(params: dict[str, Any], count: int, faithful: bool = False) -> pore.PriorTR:
    """The method: every stage keeps a number, or a share of what is left."""
    left = [count]
    for _ in params["layers"]:
        number, share = params["keep_tokens"], params["keep_ratio"]
        left.append(min(number, left[-1]) if number is not None else int(left[-1] * share))
    return _Spy(
        tuple(left[1:]),
        tuple(params["layers"]),
        params["query_aggregation"],
        params["head_aggregation"],
        faithful=faithful,
        **_VARIANTS[params.get("variant", "llava")],
    )


def _check_end_to_end(file: Any) -> float:
    worst, qwen = Worst(), "text_config" in file.params
    if qwen:
        model, tensors = qwen_around(file, "Qwen2VL")
        inputs, visual = prompt_of(file, model, tensors), None
        positions = tensors["decode_positions"][:, :, None, None]
    else:
        model, tensors = llava_around(file)
        length = tensors["inputs_embeds"].shape[1]
        mask = torch.ones(1, length, dtype=torch.long)
        inputs, visual = marked_inputs({**tensors, "attention_mask": mask})
        positions = torch.tensor(file.params["decode_positions"])[:, None, None]
    stages = range(len(file.params["layers"]))
    unmasked = {name for name in tensors if name.startswith("sdpa_unmasked.")}
    names = {f"stage{i}.{name}" for i in stages for name in _STAGE}
    names |= _RUN | unmasked | (_QWEN if qwen else set())
    assert tensors.keys() == names, tensors.keys() ^ names
    method = _method(file.params, int(tensors["image_len"]))
    out, run = _forward(model, method, inputs, visual)
    _check_stages(tensors, "", worst)
    start, length = int(tensors["image_start"]), tensors["inputs_embeds"].shape[1]
    (image,) = run.report.samples[0].images
    text = [i for i in range(length) if not start <= i < start + image.seen]
    left = sorted(text + [start + i for i in image.kept])
    assert left == tensors["kept_indices"].tolist()
    worst.compare(out.hidden_states[-1], tensors["last_hidden_state"])
    worst.compare(out.logits, tensors["logits"])
    _check_decode(model, cache_in(out), run, tensors, positions, worst)
    if unmasked:
        _forward(model, _method(file.params, image.seen, faithful=True), inputs, visual)
        _check_stages(tensors, "sdpa_unmasked.", worst)
    return worst.value


def _forward(
    model: nn.Module, method: pore.PriorTR, inputs: dict[str, Tensor], visual: Tensor | None
) -> tuple[Any, pore.Run]:
    seen.clear()
    with torch.no_grad(), method(model) as run:
        run.mark_visual(visual)
        return model(**inputs, use_cache=True, output_hidden_states=True), run


def _check_stages(tensors: dict[str, Tensor], prefix: str, worst: Worst) -> None:
    for stage, (score, kept) in enumerate(seen):
        name = f"{prefix}stage{stage}"
        worst.compare(score, tensors[f"{name}.score"])
        assert kept == tensors[f"{name}.kept"].tolist()


def _check_decode(
    model: Any,
    cache: Any,
    run: pore.Run,
    tensors: dict[str, Tensor],
    positions: Tensor,
    worst: Worst,
) -> None:
    """Decode as they do, once the cache of every layer holds what the last one keeps.

    Theirs cut what is dropped out of the caches of the layers before, too, where pore leaves it.
    Then no layer knows of it any more, and the model decodes without pore.
    """
    (sample,) = run.report.samples
    left, start = tensors["kept_indices"], int(tensors["image_start"])
    length, count = tensors["inputs_embeds"].shape[1], int(tensors["image_len"])
    text = [i for i in range(length) if not start <= i < start + count]
    cut = DynamicCache()
    for number, layer in enumerate(cache.layers):
        kept = [kept for first, kept in sample.images[0].stages if first <= number]
        held = sorted(text + [start + i for i in (kept[-1] if kept else range(count))])
        stays = torch.isin(torch.tensor(held), left)
        cut.update(layer.keys[:, :, stays], layer.values[:, :, stays], number)
    lengths = [layer.get_seq_length() for layer in cut.layers]
    assert lengths == tensors["kv_lens_prefill"].tolist()
    steps = []
    for token, position in zip(tensors["decode_tokens"], positions, strict=True):
        with torch.no_grad():
            step = model(input_ids=token.view(1, 1), **as_argument(cut), position_ids=position)
        steps.append(step.logits[0, -1])
    worst.compare(torch.stack(steps), tensors["decode_logits"])
