"""Golden files of PruMerge+ and of the rules by which others give it a budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pore
from methods.golden_prumerge import check_file
from pore.methods.prumerge import outliers

_SELECTION = {
    "cls_attn", "complement", "grid_step", "idx", "image_features", "k", "q", "reduction_ratio",
    "topk", "visual_features",
}  # fmt: skip
_EFFIVLM = {
    "budget_tokens", "complement", "idx", "image_features", "iqr_tokens", "k", "q", "score",
    "visual_features",
}  # fmt: skip
_PARAMS = {"B", "dim", "neighbours", "num_patches", "qk_layer", "seed"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    params, tensors = file.params, file.tensors
    rule = params.keys() - _PARAMS
    settings = {"neighbours": params["neighbours"], "faithful": True}
    if rule == {"budget"}:
        return _check_effivlm(file, settings)
    if rule == {"token_num"}:
        pruner = pore.PruMergePlus(keep=params["token_num"], rule="vtc-cls", **settings)
        assert (int(tensors["topk"]), int(tensors["grid_step"])) == _vtc_cls(pruner, tensors)
        # Their function ends in float16.
        return check_file(file, [pruner], _SELECTION, {"rtol": 2e-3, "atol": 2e-3})
    if params["if_adaptive"]:
        assert rule == {"if_adaptive"}
        return _check_adaptive(file, settings)
    assert rule == {"if_adaptive", "reduction_ratio"}
    ratio = params["reduction_ratio"]
    assert int(1 / ratio) == int(tensors["grid_step"])
    assert int(params["num_patches"] * ratio) == int(tensors["topk"])
    return check_file(
        file, [pore.PruMergePlus(keep=ratio, rule="prumerge", **settings)], _SELECTION
    )


def _check_effivlm(file: Any, settings: dict[str, Any]) -> float:
    params, tensors = file.params, file.tensors
    budget = int(tensors["budget_tokens"])
    assert budget == max(int(params["budget"] * params["num_patches"]), 1)
    pruners = [pore.PruMergePlus(keep=params["budget"], **settings)]
    found = outliers(tensors["score"], torch.ones_like(tensors["score"], dtype=torch.bool))
    count, truncated = params["num_patches"], int(tensors["iqr_tokens"])
    share = sum(n / count for n in found.tolist()) / len(found)
    assert truncated == max(int(count * share), 1)
    if found.tolist() == [truncated]:  # the default does not truncate
        pruners.append(pore.PruMergePlus(keep=budget + 1, neighbours=settings["neighbours"]))
    return check_file(file, pruners, _EFFIVLM)


def _check_adaptive(file: Any, settings: dict[str, Any]) -> float:
    tensors: dict[str, Tensor] = file.tensors
    scores = tensors["cls_attn"]
    (found,) = outliers(scores, torch.ones_like(scores, dtype=torch.bool)).tolist()
    ratio = found / scores.shape[1]
    torch.testing.assert_close(torch.tensor(ratio), tensors["reduction_ratio"])
    assert int(scores.shape[1] * ratio) == int(tensors["topk"])
    assert int(int(1 / ratio) / 3) == int(tensors["grid_step"])
    pruners = [pore.PruMergePlus(**settings)]
    if found == int(tensors["topk"]):
        pruners.append(pore.PruMergePlus(neighbours=settings["neighbours"]))
    return check_file(file, pruners, _SELECTION)


def _vtc_cls(pruner: Any, tensors: dict[str, Tensor]) -> tuple[int, int]:
    grid = pruner._grid(tensors["cls_attn"].shape[1], 0, 0)
    return grid.best, grid.step
