"""Golden files of ToMe, and of LightCompress' version of it for LLaVA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import pore
from helpers.golden_models import llava_of, visual_embeddings
from pore.methods.tome import parse_r
from pore.tensors.merging import Matching, bipartite_matching

_ROUND = {
    "dst_idx", "effective_r", "metric", "size", "source", "src_idx", "unm_idx", "unmerged", "x",
}  # fmt: skip
_INDICES = {"dst_idx", "src_idx", "unm_idx"}  # the authors make none in a round that merges nothing
_END_TO_END = {
    "first_block_output", "hidden_states_minus2", "last_block_output", "pixel_values", "schedule",
    "sizes_last", "sizes_minus2", "source_minus2", "tokens_after_layer",
}  # fmt: skip
_LIGHTCOMPRESS = {
    "hidden_states_minus2", "pixel_values", "schedule", "tokens_after_layer", "visual_features",
}  # fmt: skip
_PARAMS = {"B", "class_token", "grid", "prop_attn", "r", "r_form", "seed", "sizes_tracked"}
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest absolute difference."""
    tensors: dict[str, Tensor] = file.tensors
    if file.params.keys() == {"cases"}:
        return _check_parse(file.params["cases"], tensors)
    weights = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    if not weights:
        return _check_rounds(file.params, tensors)
    keys = tensors.keys() - weights.keys()
    assert file.params.keys() <= _PARAMS, file.params.keys() - _PARAMS
    tracked = file.params.get("sizes_tracked", True)
    expected = _END_TO_END if tracked else _LIGHTCOMPRESS
    assert keys == expected, keys ^ expected
    weights = {k.removeprefix("weights."): v for k, v in weights.items()}
    return _check_end_to_end(file, weights, tracked)


def _check_parse(cases: list[dict[str, Any]], tensors: dict[str, Tensor]) -> float:
    assert tensors.keys() == {f"r_{i}" for i in range(len(cases))}
    for i, case in enumerate(cases):
        assert case.keys() == {"form", "num_layers", "r"}
        assert (
            parse_r(case["num_layers"], _r(case["r"], case["form"])) == tensors[f"r_{i}"].tolist()
        )
    return 0.0


def _r(r: Any, form: str) -> Any:
    return {"int": int, "tuple": tuple, "list": list}[form](r)


def _check_rounds(params: dict[str, Any], tensors: dict[str, Tensor]) -> float:
    cls, distill = params["class_token"], params["distill_token"]
    rounds = range(len(params["r"]))
    known = {"x"} | {f"{name}_{i}" for name in _ROUND for i in rounds}
    idle = [i for i in rounds if not int(tensors[f"effective_r_{i}"])]
    optional = {f"{name}_{i}" for name in _INDICES for i in idle}
    assert known - optional <= tensors.keys() <= known, tensors.keys() ^ known
    x, worst = tensors["x"], 0.0
    sizes = torch.ones(x.shape[:2])
    source = torch.eye(x.shape[1]).expand(len(x), -1, -1)
    for i, r in enumerate(params["r"]):
        count = max(min(r, (x.shape[1] - cls - distill) // 2), 0)
        assert count == int(tensors[f"effective_r_{i}"])
        matching = bipartite_matching(tensors[f"metric_{i}"], count, cls, distill)
        if count:
            _check_indices(matching, {name: tensors[f"{name}_{i}"] for name in _INDICES}, distill)
        x, sizes = matching.means(x, sizes), matching.sums(sizes[..., None])[..., 0]
        source = matching.sums(source)
        torch.testing.assert_close(x, tensors[f"x_{i}"], **_CLOSE)
        assert torch.equal(sizes, tensors[f"size_{i}"])
        assert torch.equal(source, tensors[f"source_{i}"])
        where = _where_the_authors_look(matching) if count else _where(matching)
        undone = x.gather(1, where[..., None].expand(-1, -1, x.shape[-1]))
        torch.testing.assert_close(undone, tensors[f"unmerged_{i}"], **_CLOSE)
        worst = max(worst, float((x - tensors[f"x_{i}"]).abs().max()))
    return worst


def _where(matching: Matching) -> Tensor:
    """(I, n) which of the tokens left every token is, or was merged into."""
    images, left = matching.places.shape
    where = torch.empty(images, left + matching.source.shape[1], dtype=torch.long)
    where.scatter_(1, matching.places, torch.arange(left).expand(images, -1))
    return where.scatter_(1, matching.source, matching.target)


def _where_the_authors_look(matching: Matching) -> Tensor:
    """`_where`, as their `unmerge` has it: as if what is left of the even places came first.

    With a distillation token it does not, and those from the second on are mixed up.
    """
    order = (matching.places % 2).argsort(dim=1, stable=True)
    assert torch.equal(matching.target, order.argsort(1).gather(1, matching.target))
    return _where(Matching(matching.places.gather(1, order), matching.source, matching.target))


def _check_indices(matching: Matching, expected: dict[str, Tensor], distill: bool) -> None:
    """Who goes where, in the numbering of the two halves."""
    even = matching.places % 2 == 0
    stay = matching.places[even].view(len(even), -1) // 2
    assert torch.equal(stay, expected["unm_idx"])
    assert torch.equal(matching.source // 2, expected["src_idx"])
    partner = matching.places.gather(1, matching.target)
    assert bool((partner % 2 == 1).all())
    assert torch.equal(partner // 2, expected["dst_idx"])
    if not distill:
        assert bool((even.int().diff(dim=1) <= 0).all())  # first the one half, then the other


def _check_end_to_end(file: Any, weights: dict[str, Tensor], tracked: bool) -> float:
    tensors: dict[str, Tensor] = file.tensors
    params, config = file.params, file.config
    schedule, layers = tensors["schedule"].tolist(), config["num_hidden_layers"]
    assert params["class_token"]
    settings = {"proportional": params["prop_attn"], "weighted": tracked}
    forms: list[Any] = [schedule]
    if "r_form" in params and tracked:  # LightCompress reads a pair as (start, step)
        forms.append(_r(params["r"], params["r_form"]))
        assert parse_r(layers, forms[-1])[:layers] == schedule
    worst = 0.0
    for r in forms:
        pruner = pore.ToMe(r=r, **settings)
        got, _ = _run(file, weights, pruner, -2)
        expected = tensors["hidden_states_minus2"][:, 1:]
        if not tracked:
            assert torch.equal(tensors["visual_features"], expected)
        torch.testing.assert_close(got, expected, **_CLOSE)
        worst = max(worst, float((got - expected).abs().max()))
    states, blocks = _blocks(file, weights, pruner, -2)
    torch.testing.assert_close(states[layers - 2], tensors["hidden_states_minus2"], **_CLOSE)
    lengths = tensors["tokens_after_layer"].tolist()
    assert [state.shape[1] for state in states[: layers - 1]] == lengths[: layers - 1]
    if tracked:
        torch.testing.assert_close(states[0], tensors["first_block_output"], **_CLOSE)
        _check_sizes(blocks, tensors["sizes_minus2"], tensors["source_minus2"])
    # Where the projector reads the last block, that one merges too.
    states, blocks = _blocks(file, weights, pruner, -1)
    assert [state.shape[1] for state in states] == lengths
    if tracked:
        torch.testing.assert_close(states[-1], tensors["last_block_output"], **_CLOSE)
        _check_sizes(blocks, tensors["sizes_last"], None)
    return worst


def _run(file: Any, weights: dict[str, Tensor], pruner: Any, read: int) -> Any:
    model = llava_of(file.config, weights, nn.Identity(), file.config["hidden_size"])
    model.config.vision_feature_layer = read
    return visual_embeddings(model, pruner, file.tensors["pixel_values"])


def _blocks(
    file: Any, weights: dict[str, Tensor], pruner: Any, read: int
) -> tuple[list[Tensor], list[Any]]:
    """Outputs of all blocks of the tower, and what each merging gave."""
    merged: list[Any] = []

    class Spy(pore.ToMe):
        def _merge(self, block: Any) -> Any:
            merged.append((block, super()._merge(block)))
            return merged[-1][1]

    model = llava_of(file.config, weights, nn.Identity(), file.config["hidden_size"])
    model.config.vision_feature_layer = read
    states: list[Tensor] = []
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    for layer in tower.encoder.layers:
        layer.register_forward_hook(
            lambda _, __, output: states.append(output if isinstance(output, Tensor) else output[0])
        )
    visual_embeddings(model, Spy(**vars(pruner)), file.tensors["pixel_values"])
    return states, merged


def _check_sizes(blocks: list[Any], sizes: Tensor, source: Tensor | None) -> None:
    assert torch.equal(blocks[-1][1].sizes, sizes)
    if source is None:
        return
    found = torch.eye(source.shape[2]).expand(len(source), -1, -1)
    for before, after in blocks:
        count = before.states.shape[1] - after.states.shape[1]
        matching = bipartite_matching(before.keys.mean(1), count, before.has_cls)
        found = matching.sums(found)
    assert torch.equal(found, source)
    members = one_hot(blocks[-1][1].raster[:, 1:] + 1, source.shape[2])
    assert bool((source[:, 1:] * members).sum(-1).eq(1).all())  # a token stands for one of its own
