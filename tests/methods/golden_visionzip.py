"""Golden files of VisionZip, of its port to Qwen2-VL, and of its packing for LLaVA-NeXT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pore
from helpers.golden_models import llava_of, tower_view, visual_embeddings
from helpers.recording import Recording
from pore.errors import BudgetError
from pore.methods.visionzip import zip_tokens
from pore.tensors.gathering import pack
from pore.tensors.merging import add_group_means, nearest, strided
from pore.tensors.selection import top_k

_MERGED = {
    "all_indices", "contextual_positions", "counts", "dominant_positions", "hidden_states",
    "merged_into", "merged_positions", "metric",
}  # fmt: skip
_SELECTION = _MERGED | {"cls_attention_heads", "tokens"}
_END_TO_END = _MERGED | {"cls_attention_sum", "pixel_values", "visual_features"}
_PACKING = {"all_indices", "packed", "tile_features"}
_QWEN = {
    "contextual_indices", "dominant_indices", "kept_indices", "keys", "merged_features",
    "received_attention", "tokens",
}  # fmt: skip
_TILE = 24  # patches along a side of a tile, as the authors' code has it
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    tensors: dict[str, Tensor] = file.tensors
    weights = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    keys = tensors.keys() - weights.keys()
    if keys == _PACKING:
        return _check_packing(file.params, tensors)
    if keys == _QWEN:
        return _check_qwen(file.params, tensors)
    if weights:
        assert keys == _END_TO_END, keys ^ _END_TO_END
        return _check_end_to_end(file, weights)
    assert keys == _SELECTION, keys ^ _SELECTION
    return _check_selection(file.params, tensors)


def _check_selection(params: dict[str, Any], tensors: dict[str, Tensor]) -> float:
    attention, states = tensors["cls_attention_heads"], tensors["hidden_states"]
    total, patches = params["dominant"] + params["contextual"], attention.shape[2]
    view = tower_view(
        states[:, 1:],
        attention[None],
        cls_feature=states[:, 0],
        keys=(tensors["metric"][:, None],),  # of one head, which is its own mean
    )
    order = attention.sum(1).argsort(dim=-1, descending=True)[:, : params["dominant"] - 1] + 1
    assert torch.equal(tensors["all_indices"], nn.functional.pad(order, (1, 0)))
    worst = _check_groups(tensors)
    if total > patches:  # all and CLS, for which a prompt has no room
        with pytest.raises(BudgetError):
            pore.VisionZip(total, params["contextual"], faithful=True)._select(view)
        return worst
    for pruner in _pruners(total, params["contextual"], patches):
        selection = pruner._select(view)
        assert selection.valid is None
        _check_positions(params, tensors, selection.raster + 1)
        torch.testing.assert_close(selection.features, tensors["tokens"], **_CLOSE)
        worst = max(worst, float((selection.features - tensors["tokens"]).abs().max()))
    return worst


def _check_end_to_end(file: Any, weights: dict[str, Tensor]) -> float:
    params = file.params
    weights = {k.removeprefix("weights."): v for k, v in weights.items()}
    patches = file.tensors["cls_attention_sum"].shape[1]
    pruners = _pruners(params["total_tokens"], params["contextual"], patches)
    return max(_check_run(file, weights, pruner) for pruner in pruners)


def _check_run(file: Any, weights: dict[str, Tensor], pruner: pore.VisionZip) -> float:
    tensors: dict[str, Tensor] = file.tensors
    params, config = file.params, file.config
    model = llava_of(config, weights, nn.Identity(), config["hidden_size"])
    recording = Recording(pruner)
    got, run = visual_embeddings(model, recording, tensors["pixel_values"])
    ((_, view, selection),) = recording.seen
    states = torch.cat([view.cls_feature[:, None], view.features], 1)
    for found, name in (
        (states, "hidden_states"),
        (view.cls_attention[0].sum(1), "cls_attention_sum"),
        (view.keys[0].mean(1), "metric"),
        (got, "visual_features"),
    ):
        torch.testing.assert_close(found, tensors[name], **_CLOSE)
    order = view.cls_attention[0].sum(1).argsort(dim=-1, descending=True)
    order = nn.functional.pad(order[:, : params["dominant"] - 1] + 1, (1, 0))
    assert torch.equal(tensors["all_indices"], order)
    _check_positions(params, tensors, selection.raster + 1)
    for sample, raster in zip(run.report, selection.raster.tolist(), strict=True):
        assert list(sample.images[0].kept) == [place for place in raster if place >= 0]
        assert sample.images[0].extra == 1
    worst = _check_groups(tensors)
    return max(worst, float((got - tensors["visual_features"]).abs().max()))


def _pruners(total: int, contextual: int, patches: int) -> list[pore.VisionZip]:
    """The method; the default differs where as many tokens are left as there are patches."""
    kinds = (True, False) if total < patches else (True,)
    return [pore.VisionZip(total, contextual, faithful) for faithful in kinds]


def _check_positions(params: dict[str, Any], tensors: dict[str, Tensor], found: Tensor) -> None:
    dominant, contextual = found.split([params["dominant"], params["contextual"]], 1)
    assert torch.equal(dominant, tensors["dominant_positions"])
    assert torch.equal(contextual, tensors["contextual_positions"])


def _check_groups(tensors: dict[str, Tensor]) -> float:
    """Who is merged into whom, in the file's own numbering."""
    metric, states = tensors["metric"], tensors["hidden_states"]
    others = torch.ones(metric.shape[:2], dtype=torch.bool)
    others.scatter_(1, tensors["dominant_positions"], False)
    count = tensors["contextual_positions"].shape[1]
    marks = strided(others, torch.full((len(metric),), count))
    targets, valid = pack(marks, width=count)
    assert torch.equal(targets, tensors["contextual_positions"])
    members = others & ~marks
    merged = tensors["merged_positions"]
    assert torch.equal(pack(members, width=merged.shape[1])[0], merged)
    group = nearest(metric, targets, valid)
    assert torch.equal(group.gather(1, merged), tensors["merged_into"])
    tokens, sizes = add_group_means(states, targets, group, members)
    assert torch.equal(sizes.clamp(min=1), tensors["counts"])
    expected = tensors.get("tokens", tensors.get("visual_features"))
    assert expected is not None
    torch.testing.assert_close(tokens, expected[:, -count:], **_CLOSE)
    return float((tokens - expected[:, -count:]).abs().max())


def _check_packing(params: dict[str, Any], tensors: dict[str, Tensor]) -> float:
    features, contextual = tensors["tile_features"], params["contextual"]
    patches = tensors["all_indices"].sort(-1).values - 1
    assert patches.shape[1] == params["dominant"]
    assert bool((patches[:, 0] == -1).all())
    raster = nn.functional.pad(patches, (0, contextual))
    tiles = (params["height"], params["width"])
    order = tile_order(raster, contextual, tiles, (_TILE, _TILE))
    assert torch.equal(features.flatten(0, 1)[order], tensors["packed"])
    return 0.0


def _check_qwen(params: dict[str, Any], tensors: dict[str, Tensor]) -> float:
    features = tensors["merged_features"][None]
    count = params["merged_tokens"]
    dominant, contextual = params["dominant"], params["contextual"]
    # Qwen2-VL makes one token of some consecutive patches.
    scores = tensors["received_attention"].view(1, count, -1).mean(-1)
    heads, patches, width = tensors["keys"].shape
    metric = tensors["keys"].view(heads, count, patches // count, width).mean((0, 2))[None]
    chosen = top_k(scores, [dominant])
    tokens, index, valid = zip_tokens(features, metric, chosen, ~chosen, [dominant], [contextual])
    assert bool(valid.all())
    assert torch.equal(index[0, :dominant], tensors["dominant_indices"].sort().values)
    assert torch.equal(index[0, dominant:], tensors["contextual_indices"])
    index, order = index[0].sort()
    assert torch.equal(index, tensors["kept_indices"])
    # Their sum goes through bfloat16.
    torch.testing.assert_close(tokens[0, order], tensors["tokens"], rtol=1e-2, atol=1e-2)
    return float((tokens[0, order] - tensors["tokens"]).abs().max())


def tile_order(
    raster: Tensor, contextual: int, tiles: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """How the authors put the tokens of LLaVA-NeXT's tiles into one sequence.

    The dominant patches of all tiles in the raster order of the whole picture, then the CLS token
    of every tile, then the contextual tokens tile by tile. The tokens of the whole image at low
    resolution go before these, in their own order; rows have no end tokens.

    Args:
        raster: (T, k) the patch that every token of every tile stands for, -1 for CLS; the
            contextual ones last.
        contextual: How many of the k are contextual.
        tiles: (rows, columns) of tiles; T is their product.
        grid: (height, width) of one tile in patches.

    Returns:
        (T * k,) the order, as indices into the tokens of one tile after the other.
    """
    (rows, columns), (height, width) = tiles, grid
    count, k = raster.shape
    tile = torch.arange(count, device=raster.device)[:, None]
    y, x = tile // columns * height + raster // width, tile % columns * width + raster % width
    place = y * columns * width + x
    patches = rows * height * columns * width
    place = place.masked_fill(raster < 0, patches)  # after all patches
    place[:, k - contextual :] = patches + 1
    return place.flatten().argsort(stable=True)
