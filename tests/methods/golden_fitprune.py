"""Golden files of FitPrune: the choice of tokens, whole models with cached decode, and the fit."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import pore
from helpers.caches import as_argument
from helpers.golden_models import Worst, check_positions, layer_inputs, llava_around, marked_inputs
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.cost.decoders import DecoderShape
from pore.engine.pruner import Pruner
from pore.engine.readers import HeadMax, LayerAttention
from pore.engine.stages import View
from pore.layout import Image, Layout
from pore.methods._fitting import FittedScheme, fit_scheme, lightest

_LAYER = r"layer\d+\.(score|kept_indices)"
_RUN = re.compile(
    r"delete_scheme|kept_indices|tokens_in_per_layer|tokens_out_per_layer|last_hidden_state|logits"
    r"|kv_lens_prefill|cache_decode_(tokens|logits|position_per_layer)|" + _LAYER
)
_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "image_start", "image_len"}
_FIT = {
    "alphas", "final_scheme", "flops_reached", "image_len", "image_start", "num_samples",
    "origin_flops", "reduction_ratio", "schemes", "weightsum_cross", "weightsum_self",
}  # fmt: skip
_DETAIL = re.compile(
    r"(first|last)\.layer(\d+)\.sample(\d+)"
    r"\.(cross_weights|self_weights|del_cross|del_self|deleted)"
)


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    if any(name.endswith(".attn") for name in file.tensors):
        return _check_selection(file)
    if "alphas" in file.tensors:
        return _check_fit(file)
    return _check_end_to_end(file)


class _Given(LayerAttention):
    """Attention weights from a file."""

    weights: Tensor

    def logits(self, index: Tensor) -> Tensor:
        return self.of_all[None, :, index[0]].log()


def _check_selection(file: Any) -> float:
    tensors, worst = dict(file.tensors), Worst()
    runs = {name.removesuffix(".attn") for name in tensors if name.endswith(".attn")}
    for run in runs:
        attn = tensors.pop(f"{run}.attn")
        start, count = (int(tensors.pop(f"{run}.{name}")) for name in ("image_start", "image_len"))
        layout = Layout.of(
            [Image(0, 0, range(start, start + count))],
            torch.ones(1, attn.shape[-1], dtype=torch.bool),
        )
        heads, length = attn.shape[:2]
        query = torch.zeros(1, heads, length, 1)
        past, origin = torch.zeros(1, 0, dtype=torch.bool), torch.arange(length)[None]
        given = _Given(layout, query, query, None, 1.0, None, past, origin)
        object.__setattr__(given, "of_all", attn)
        read = HeadMax()(given)
        delete = int(tensors.pop(f"{run}.delete"))
        scheme = (delete,) if delete else (1,)
        keep = count - delete
        view = View(layout, query, read, None, torch.Generator(), norm=lambda x: x)
        kept = pore.FitPrune(keep, scheme)._select(0, view).keep[0]
        worst.compare(_score(layout, read), tensors.pop(f"{run}.score"))
        stays = torch.ones(length, dtype=torch.bool)
        stays[start : start + count] = kept
        assert stays.nonzero()[:, 0].tolist() == tensors.pop(f"{run}.kept_indices").tolist()
    assert not tensors, f"keys that are not understood: {sorted(tensors)}"
    return worst.value


def _score(layout: Layout, read: Tensor) -> Tensor:
    """The authors' score: they sum over the text where we average, which changes no order."""
    return read[0, 0] * read[0, 1] * int(layout.text_after.sum())


def _check_end_to_end(file: Any) -> float:
    worst = Worst()
    model, tensors = llava_around(file)
    inputs, visual = marked_inputs(tensors)
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    left = set(tensors) - _INPUTS
    if "vanilla.logits" in left:
        left.remove("vanilla.logits")
        with torch.no_grad():
            dense = model(**inputs).logits
        expected = tensors["vanilla.logits"]
        worst.compare(dense[:, -expected.shape[1] :], expected)
    for ratio in file.params["reduction_ratios"]:
        prefix = f"r{ratio}."
        own = {name for name in left if name.startswith(prefix)}
        expected = {name.removeprefix(prefix): tensors[name] for name in own}
        for name in expected:
            assert _RUN.fullmatch(name), f"a key that is not understood: {name}"
        left -= own
        scheme = tuple(expected["delete_scheme"].tolist())
        method = Recording(pore.FitPrune(count - sum(scheme), scheme))
        with torch.no_grad(), method(model) as run, layer_inputs(model) as seen:
            run.mark_visual(visual)
            out = model(**inputs, use_cache=True, output_hidden_states=True)
            prefill = list(seen)
            seen.clear()
            cache = cache_in(out)
            lengths = [layer.get_seq_length() for layer in cache.layers]
            steps = []
            for token in expected["cache_decode_tokens"]:
                step = model(input_ids=token.view(1, 1), **as_argument(cache))
                steps.append(step.logits[0, -1])
            decoded = list(seen)
        last = expected["logits"].shape[1]  # large files hold those of the last tokens alone
        worst.compare(out.logits[:, -last:], expected["logits"])
        worst.compare(out.hidden_states[-1], expected["last_hidden_state"])
        worst.compare(torch.stack(steps), expected["cache_decode_logits"])
        assert lengths == expected["kv_lens_prefill"].tolist()
        enter = [states.shape[1] for states, _ in prefill]
        assert enter == expected["tokens_in_per_layer"].tolist()
        leave = [*enter[1:], out.logits.shape[1]]
        assert leave == expected["tokens_out_per_layer"].tolist()
        positions = expected["cache_decode_position_per_layer"]
        for (_, cosines), position in zip(decoded, positions.flatten(), strict=True):
            check_positions(model, cosines, position[None])
        _check_deletions(method, run, visual, start, expected, worst)
    assert not left, f"keys that are not understood: {sorted(left)}"
    return worst.value


def _check_deletions(
    method: Recording,
    run: pore.Run,
    visual: Tensor,
    start: int,
    expected: dict[str, Tensor],
    worst: Worst,
) -> None:
    """What every layer scored, and what it left."""
    scheme = expected["delete_scheme"].tolist()
    stages = iter(method.seen)
    text = [i for i in range(visual.shape[1]) if not visual[0, i]]
    for layer, deleted in enumerate(scheme):
        names = (f"layer{layer}.score", f"layer{layer}.kept_indices")
        assert (deleted > 0) == (names[0] in expected) == (names[1] in expected)
        if not deleted:
            continue
        _, view, chosen = next(stages)
        worst.compare(_score(view.layout, view.attention), expected[names[0]])
        places = view.layout.raster[chosen.keep].tolist()
        kept = sorted(text + [start + i for i in places])
        assert kept == expected[names[1]].tolist()
    assert kept == expected["kept_indices"].tolist()
    (image,) = run.report.samples[0].images
    assert sorted(text + [start + i for i in image.kept]) == kept


def _check_fit(file: Any) -> float:
    params, worst = file.params, Worst()
    model, tensors = llava_around(file)
    samples = int(tensors["num_samples"])
    names = {f"sample{i}.{name}" for i in range(samples) for name in ("input_ids", "inputs_embeds")}
    details = {name for name in tensors if _DETAIL.fullmatch(name)}
    assert tensors.keys() == _FIT | names | details, tensors.keys() ^ (_FIT | names | details)
    layers, width = params["config"]["num_hidden_layers"], params["flops_hidden"]
    shape = DecoderShape(
        hidden=width,
        intermediate=params["flops_intermediate"],
        layers=layers,
        heads=1,
        kv_heads=1,
        head_dim=width,
        vocab=params["config"]["vocab_size"],
        gated=True,
    )
    runs: list[Recording] = []

    def forward(pruner: Pruner) -> None:
        runs.append(Recording(pruner))
        for number in range(samples):
            _send(model, runs[-1], tensors, number)

    with torch.no_grad():
        fitted = {
            faithful: fit_scheme(forward, shape, params["reduction_ratio"], faithful=faithful)
            for faithful in (False, True)
        }
    assert len(runs) == 2 * (1 + len(tensors["alphas"]))
    _check_steps(file, fitted)
    for sample in range(samples):
        own = runs[0].seen[sample * layers :][:layers]
        sums = torch.cat([seen.view.attention for seen in own]).sum(-1)
        worst.compare(sums[:, 0], tensors["weightsum_self"][sample])
        worst.compare(sums[:, 1], tensors["weightsum_cross"][sample])
    for name in details:
        which, layer, sample, what = _DETAIL.fullmatch(name).groups()  # type: ignore[union-attr]
        run = runs[1] if which == "first" else runs[len(tensors["alphas"])]
        _, view, chosen = run.seen[int(sample) * layers + int(layer)]
        read = view.attention
        if what.endswith("_weights"):
            part = 0 if what.startswith("self") else 1
            worst.compare(read[0, part], tensors[name])
        elif what == "deleted":
            gone = (view.layout.valid & ~chosen.keep)[0].nonzero()[:, 0]
            assert gone.tolist() == sorted(tensors[name].tolist())
        else:
            _check_prefix(name, tensors, read)
    return worst.value


def _check_steps(file: Any, fitted: dict[bool, FittedScheme]) -> None:
    tensors, params = file.tensors, file.params
    steps = fitted[True].steps
    assert steps == fitted[False].steps
    assert [step.alpha for step in steps] == tensors["alphas"].tolist()
    assert [step.reached for step in steps] == tensors["flops_reached"].bool().tolist()
    assert [list(step.scheme) for step in steps] == tensors["schemes"].tolist()
    assert list(fitted[True].scheme) == tensors["final_scheme"].tolist()
    best = [step.scheme for step in steps if step.reached][-1]
    assert fitted[False].scheme == best
    n = fitted[True].visual
    assert n == int(tensors["image_len"]) == params["image_len"]
    assert int(tensors["image_start"]) == params["image_start"]
    d, m, layers = params["flops_hidden"], params["flops_intermediate"], len(best)
    full = torch.tensor(float(layers * (4 * n * d * d + 2 * n * n * d + 3 * d * m * n)))
    torch.testing.assert_close(full, tensors["origin_flops"])
    ratio = torch.tensor(params["reduction_ratio"])
    torch.testing.assert_close(tensors["reduction_ratio"], ratio)


def _check_prefix(name: str, tensors: dict[str, Tensor], read: Tensor) -> None:
    """The tokens that one of the two rankings alone would delete, the least first."""
    match = _DETAIL.fullmatch(name)
    assert match is not None
    which, layer, sample, what = match.groups()
    alpha = tensors["alphas"][0 if which == "first" else -1].item()
    part = what.removeprefix("del_")
    weights = read[:, 0 if part == "self" else 1]
    total = tensors[f"weightsum_{part}"][int(sample), int(layer), None]
    mask = lightest(weights, total, alpha, torch.ones_like(weights, dtype=torch.bool))
    order = weights[0].argsort()
    assert order[mask[0][order]].tolist() == tensors[name].tolist()


def _send(
    model: LlavaForConditionalGeneration,
    pruner: Pruner,
    tensors: dict[str, Tensor],
    number: int,
) -> None:
    embeds = tensors[f"sample{number}.inputs_embeds"]
    start, count = int(tensors["image_start"]), int(tensors["image_len"])
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, start : start + count] = True
    with pruner(model) as run:
        run.mark_visual(visual)
        model.model(inputs_embeds=embeds, use_cache=False)
