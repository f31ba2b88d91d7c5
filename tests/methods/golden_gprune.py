"""Golden files of G-Prune."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig

import pore
from helpers.golden_prompts import embeddings, inputs_of, model_around
from helpers.recording import Recording
from pore.families.registry import family_of
from pore.methods.gprune import arrivals, degrees, transition

_SCORES = {"degree_base", "degree_grid", "score_base", "score_grid"}
_SELECTION = _SCORES | {
    "features", "image_keep_indices", "keep_indices", "order_base", "order_grid",
    "transition_power_base",
}  # fmt: skip
_END_TO_END = _SCORES | {
    "crop_features", "embed_tokens.weight", "image_keep_indices", "image_newline", "input_ids",
    "inputs_embeds_checksum", "keep_indices", "position_ids",
}  # fmt: skip


class _Worst:
    """The largest difference met so far, relative to the largest expected value."""

    value = 0.0

    def compare(self, got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        scale = float(expected.abs().max())
        self.value = max(self.value, float((got - expected).abs().max()) / scale)


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    tensors, params, worst = file.tensors, file.params, _Worst()
    if "features" not in tensors:
        assert tensors.keys() == _END_TO_END, tensors.keys() ^ _END_TO_END
        _check_end_to_end(file, worst)
        return worst.value
    # Large files may leave the matrix out.
    keys = tensors.keys() | {"transition_power_base"}
    assert keys == _SELECTION, keys ^ _SELECTION
    base, rows, cols = params["n_base"], params["rows"], params["cols"]
    features = tensors["features"]
    grid = features[base:].view(rows, cols + 1, -1)[:, :-1].flatten(0, 1)
    kept = _check_scores(file, features[:base], grid, worst)
    image = _with_newlines(kept, base, rows, cols)
    assert image == tensors["image_keep_indices"].tolist()
    system, after = params["system_prompt_length"], params["text_after"]
    ends = range(system + len(features), system + len(features) + after)
    assert [*range(system), *(system + i for i in image), *ends] == tensors["keep_indices"].tolist()
    return worst.value


def _check_scores(file: Any, base: Tensor, grid: Tensor, worst: _Worst) -> list[list[int]]:
    """Scores of both graphs; the tokens of each that stay."""
    tensors, params = file.tensors, file.params
    kept = []
    for name, features in (("base", base), ("grid", grid)):
        valid = torch.ones(1, len(features), dtype=torch.bool)
        links = transition(features[None], valid, params["similarity"], params["temperature"])
        assert torch.equal(degrees(links)[0], tensors[f"degree_{name}"])
        scores = arrivals(features[None], links, valid, params["iterations"])[0]
        worst.compare(scores, tensors[f"score_{name}"])
        order = scores.argsort(descending=True)[: int(params["keep_ratio"] * len(features))]
        if f"order_{name}" in tensors:
            assert torch.equal(order, tensors[f"order_{name}"])
        if name == "base" and "transition_power_base" in tensors:
            power = torch.linalg.matrix_power(links[0], params["iterations"])
            worst.compare(power, tensors["transition_power_base"])
        kept.append(order.tolist())
    return kept


def _with_newlines(kept: list[list[int]], base: int, rows: int, cols: int) -> list[int]:
    """Kept tokens of both graphs and all newlines, as they lie among the image's tokens."""
    grid = [base + i + i // cols for i in kept[1]]
    newlines = [base + row * (cols + 1) + cols for row in range(rows)]
    return sorted([*kept[0], *grid, *newlines])


class _Given(nn.Module):
    """A projector that gives what the file holds."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, _: Tensor) -> Tensor:
        return self.features


def _check_end_to_end(file: Any, worst: _Worst) -> None:
    tensors, params = file.tensors, file.params
    model, inputs = _model(file)
    pruner = pore.GPrune(
        keep=float(params["keep_ratio"]),
        similarity=params["similarity"],
        temperature=params["temperature"],
        iterations=params["iterations"],
        faithful=True,
    )
    positions: list[Tensor] = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, __, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    recording = Recording(pruner)
    got, run = embeddings(model, recording, inputs)
    hook.remove()
    ((_, view, _),) = recording.seen
    tiling = view.layout.images[0].tiling
    assert tiling is not None
    base, rows, cols = params["n_base"], params["rows"], params["cols"]
    assert (tiling.patches, len(tiling.shown)) == (base, base + rows * cols)
    kept = _check_scores(file, view.features[0, :base], view.features[0, base:], worst)
    image = _with_newlines(kept, base, rows, cols)
    assert image == tensors["image_keep_indices"].tolist()
    start = tensors["input_ids"][0].tolist().index(-200)
    assert start == params["system_prompt_length"]
    (report,) = run.report.samples[0].images
    structure = [i for i, slot in enumerate(tiling.slots) if slot < 0]
    shown = [i for i, slot in enumerate(tiling.slots) if slot >= 0]
    assert sorted([*structure, *(shown[i] for i in report.kept)]) == image
    assert positions[0][0].tolist() == tensors["position_ids"].tolist()
    assert torch.equal(tensors["position_ids"], tensors["keep_indices"])
    assert got.shape == (1, params["L_out"], params["D"])
    worst.compare(got[0].sum(-1), tensors["inputs_embeds_checksum"])


def _model(file: Any) -> tuple[Any, dict[str, Tensor]]:
    """A LLaVA-NeXT whose projector gives the file's crops, cut as the file's grid is."""
    tensors, params = file.tensors, file.params
    crops, base = tensors["crop_features"].shape[:2]
    side = round(base**0.5)
    vision = CLIPVisionConfig(
        hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        image_size=side, patch_size=1,
    )  # fmt: skip
    size = params["image_size_wh"][::-1]
    tensors = {**tensors, "pixel_values": torch.zeros(1, crops, 3, side, side)}
    for rows in range(1, crops):
        if (crops - 1) % rows:
            continue
        words = tensors["embed_tokens.weight"]
        model = model_around(vision, words, [rows, (crops - 1) // rows])
        model.model.multi_modal_projector = _Given(tensors["crop_features"])
        model.model.image_newline.data = tensors["image_newline"]
        (tiling,) = family_of(model).tilings(model, {"image_sizes": torch.tensor([size])})
        shown, ends = len(tiling.shown) - base, tiling.slots.count(-1)
        if (ends, shown) == (params["rows"], params["rows"] * params["cols"]):
            return model, inputs_of(model, tensors, -200, size)
    raise AssertionError("no grid of crops comes to the file's rows and columns")
