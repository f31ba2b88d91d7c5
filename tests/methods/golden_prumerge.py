"""Golden files of PruMerge, and what those of PruMerge+ share with them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import pore
from helpers.golden_models import llava_of, tower_view, visual_embeddings
from helpers.recording import Recording
from pore.methods import prumerge
from pore.methods.prumerge import outliers, single_head_attention
from pore.tensors.merging import weighted_sum
from pore.tower.stages import TowerSelection, TowerView

_SELECTION = {
    "cls_attn", "complement", "idx", "image_features", "k", "q", "reduction_ratio", "topk",
    "visual_features",
}  # fmt: skip
_PARAMS = {
    "B", "dim", "if_adaptive", "neighbours", "num_patches", "qk_layer", "reduction_ratio", "seed",
}  # fmt: skip
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    params = file.params
    assert params.keys() <= _PARAMS, params.keys() - _PARAMS
    keep = None if params["if_adaptive"] else params["reduction_ratio"]
    pruners = [pore.PruMerge(keep=keep, neighbours=params["neighbours"], faithful=True)]
    if params["B"] == 1:  # then the default differs by no more than the truncation
        count = int(file.tensors["topk"])
        pruners.append(pore.PruMerge(keep=count + 1, neighbours=params["neighbours"]))
    if keep is None:
        ratio = _ratio(file.tensors["cls_attn"])
        # The file holds it in float32; the authors multiply in double precision, as Python does.
        torch.testing.assert_close(torch.tensor(ratio), file.tensors["reduction_ratio"])
        assert int(params["num_patches"] * ratio) == int(file.tensors["topk"])
    assert int(file.tensors["topk"]) == file.tensors["idx"].shape[1]
    return check_file(file, pruners, _SELECTION)


def _ratio(scores: Tensor) -> float:
    every = torch.ones_like(scores, dtype=torch.bool).view(1, -1)
    return int(outliers(scores.view(1, -1), every)) / scores.numel()


def check_file(
    file: Any, pruners: list[Any], keys: set[str], close: dict[str, float] = _CLOSE
) -> float:
    """All pruners give what the file of known keys holds."""
    tensors: dict[str, Tensor] = file.tensors
    weights = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    expected = keys | {"pixel_values"} if weights else keys
    assert tensors.keys() - weights.keys() == expected, tensors.keys() - weights.keys() ^ expected
    check_parts(tensors)
    worst = [_check_selection(tensors, pruner, close) for pruner in pruners]
    if weights:
        assert file.params["qk_layer"] == file.config["num_hidden_layers"] - 1
        weights = {k.removeprefix("weights."): v for k, v in weights.items()}
        worst += [_check_end_to_end(file, weights, pruner, close) for pruner in pruners]
    return max(worst)


def check_parts(tensors: dict[str, Tensor]) -> None:
    """Attention, and which patches are kept and which are not."""
    cls = tensors["q"].shape[1] - tensors["image_features"].shape[1]
    scores = single_head_attention(tensors["q"], tensors["k"], bool(cls))
    expected = tensors["cls_attn"] if cls else tensors["score"]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-8)


def view_of(tensors: dict[str, Tensor]) -> TowerView:
    """A view with queries and keys of one head of full width."""
    features = tensors["image_features"]
    cls = tensors["q"].shape[1] > features.shape[1]
    return tower_view(
        features,
        features.new_empty(0),
        cls_feature=features[:, 0] if cls else None,  # its value is not looked at
        queries=(tensors["q"][:, None],),
        keys=(tensors["k"][:, None],),
    )


def _check_selection(tensors: dict[str, Tensor], pruner: Any, close: dict[str, float]) -> float:
    with patch.object(prumerge, "weighted_sum", wraps=weighted_sum) as rest:
        selection: TowerSelection = pruner._select(view_of(tensors))
    _, _, others = rest.call_args.args
    complement = tensors["complement"]
    assert torch.equal(others.nonzero()[:, 1].view_as(complement), complement)
    assert selection.valid is None
    assert torch.equal(selection.raster, nn.functional.pad(tensors["idx"], (0, 1), value=-1))
    torch.testing.assert_close(selection.features, tensors["visual_features"], **close)
    return float((selection.features - tensors["visual_features"]).abs().max())


def _check_end_to_end(
    file: Any, weights: dict[str, Tensor], pruner: Any, close: dict[str, float]
) -> float:
    tensors: dict[str, Tensor] = file.tensors
    model = llava_of(file.config, weights, nn.Identity(), file.config["hidden_size"])
    recording = Recording(pruner)
    got, run = visual_embeddings(model, recording, tensors["pixel_values"])
    ((_, view, _),) = recording.seen
    for found, name in (
        (view.features, "image_features"),
        (view.queries[0].transpose(1, 2).flatten(2), "q"),
        (view.keys[0].transpose(1, 2).flatten(2), "k"),
    ):
        torch.testing.assert_close(found, tensors[name], **close)
    for sample, expected in zip(run.report, tensors["idx"].tolist(), strict=True):
        assert list(sample.images[0].kept) == expected
        assert sample.images[0].extra == 1
    torch.testing.assert_close(got, tensors["visual_features"], **close)
    return float((got - tensors["visual_features"]).abs().max())
