"""Makes the config of a tiny twin from the config of a model: the same classes, other sizes.

What makes a family special stays: kinds of layers and their order, grouped heads, sections of
positions, soft caps, experts, layers that share keys, features that lower layers add. Sizes are
recognised by their names in configs: a `hidden_size` becomes 32 in any part of the config. What
names do not tell, a family says (`Family.shrink`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pore.errors import UnsupportedModelError
from pore.families.base import Family

WIDTH = 32
"""Width of a hidden state of the twin, in tower and decoder alike."""

VOCABULARY = 128

_HEADS = 4

_WINDOWS = ("sliding_window", "attention_chunk_size")

_PATCH = 4  # pixels

_SIDE = 4  # visual tokens along a side of an image or tile

_RUN = 2  # with several kinds of layers, at most this many of one kind follow each other
_ALIKE, _MIXED, _SHARING = 5, 6, 3  # layers if all are alike; if kinds differ; that share keys

# The names of sizes, and their values in the twin; other numbers stay.
_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "projection_dim"), WIDTH),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), WIDTH),
    **dict.fromkeys(("mm_embed_dim", "output_proj_dims"), WIDTH),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp"), 2 * WIDTH),
    "alignment_intermediate_size": 2 * WIDTH,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH // 2),
    **dict.fromkeys(("num_attention_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(_WINDOWS, 24),  # tokens; prompts are longer, so windows hide something
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_position_embeddings", "position_embedding_size"), 256),
    "mm_posemb_size": 256,
    "mm_tokens_per_image": _SIDE**2,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), WIDTH // 2),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), WIDTH // _HEADS),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), WIDTH // _HEADS),
    "hidden_size_per_layer_input": WIDTH // _HEADS,
}

# The largest values of some numbers.
_BOUNDS: Mapping[str, int] = {
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "n_group", "topk_group"), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_global_key_value_heads"), 1),
}

# For each name of a number of key heads, the name of the number of query heads in the same layers.
_GROUPED: Mapping[str, str] = {
    "num_key_value_heads": "num_attention_heads",
    "linear_num_key_heads": "linear_num_value_heads",
}

_DEPTHS = ("num_hidden_layers", "depth")

_LAYER_NUMBERS = ("fullatt_block_indexes", "moe_layers", "mlp_only_layers")

_TOKENS = ("token_id", "token_index")

# The twin has random weights, which are not quantized, and no part for sound.
_LEFT_OUT = ("quantization_config", "audio_config")


def shrink(config: Any, family: Family) -> Any:
    """The config of a tiny twin.

    Args:
        config: The config of a whole model, which is left as it is.
        family: Its adapter.

    Returns:
        A config of the same class.

    Raises:
        UnsupportedModelError: The config lacks something, or the small sizes do not fit together.
    """
    try:
        return type(config).from_dict(_shrunk(config.to_dict(), family))
    except Exception as error:  # an unknown config may lack anything
        raise UnsupportedModelError(
            f"No tiny twin can be made of this {type(config).__name__}, so nothing can be checked: "
            f"{type(error).__name__}: {error}. A subclass of {type(family).__name__} can mend the "
            "config in `shrink` (docs/adding-a-family.md)."
        ) from error


def _shrunk(full: dict[str, Any], family: Family) -> dict[str, Any]:
    """The config of a twin as plain types."""
    for name in _LEFT_OUT:
        if full.get(name) is not None:
            full[name] = None
    merge = _merge(full)
    tiny = _small(full, merge, _token_ids(full), family.mrope)
    if "image_grid_pinpoints" in tiny:
        ratio = tiny["vision_config"]["image_size"] / full["vision_config"]["image_size"]
        pinpoints = [
            [round(side * ratio) for side in pair] for pair in full["image_grid_pinpoints"]
        ]
        tiny["image_grid_pinpoints"] = pinpoints
    if (read := tiny.get("vision_feature_layer")) is not None:
        depth = _depth(tiny["vision_config"])
        tiny["vision_feature_layer"] = read if depth is None else _read(read, depth)
    family.shrink(tiny)
    tiny.pop("quantization_config", None)
    return tiny


def widened(tiny: Any) -> Any:
    """The config of a twin whose windows and chunks hide no part of its prompts."""
    wide = copy.deepcopy(tiny)
    decoder = wide.get_text_config()
    for name in _WINDOWS:
        if getattr(decoder, name, None) is not None:
            setattr(decoder, name, 1024)
    return wide


def _small(
    full: Mapping[str, Any], merge: int, ids: Mapping[int, int], mrope: bool
) -> dict[str, Any]:
    """One part of a config, and the parts in it."""
    tiny: dict[str, Any] = {}
    kept = _kept_layers(full)
    depth = _depth(full)
    head = _head_dim(full)
    for name, value in full.items():
        if name == "per_layer_config" and value:
            own = {int(i): _layer(sizes, full, head) for i, sizes in value.items()}
            value = {new: own[old] for new, old in enumerate(kept) if old in own}
        elif isinstance(value, Mapping) and name.endswith("_config"):
            value = _small(value, merge, ids, mrope and name == "text_config")
        elif name.startswith("rope_parameters") or name == "rope_scaling":
            value = _rope(value, full, head, mrope)
        elif name in _LAYER_NUMBERS and value is not None:
            value = [new for new, old in enumerate(kept) if old in value]
        elif isinstance(value, list | tuple) and depth is not None and len(value) == depth:
            value = [_size(name, value[i], full, merge, ids, head) for i in kept]
        elif isinstance(value, list | tuple) and name != "image_grid_pinpoints":
            value = [_size(name, one, full, merge, ids, head) for one in value]
        elif name in _DEPTHS:
            value = len(kept)
        elif name == "num_kv_shared_layers" and depth is not None and value:
            value = sum(i >= depth - value for i in kept)
        else:
            value = _size(name, value, full, merge, ids, head)
        tiny[name] = value
    if _rotated(full) < 1:
        tiny["head_dim"] = head  # which a config may leave to the widths
    return tiny


def _size(
    name: str, value: Any, full: Mapping[str, Any], merge: int, ids: Mapping[int, int], head: int
) -> Any:
    """The value that a number of a config has in the twin, by its name."""
    if isinstance(value, bool) or not isinstance(value, int) or value == 0:
        return ids.get(0, 0) if value == 0 and name.endswith(_TOKENS) else value
    if name.endswith(_TOKENS):
        return ids[value]
    if name in _SIZES:
        return _SIZES[name]
    if name in _BOUNDS:
        return min(value, _BOUNDS[name])
    if name in _GROUPED:
        return _key_heads(value, full[_GROUPED[name]])
    if name == "linear_num_value_heads":
        return _HEADS
    if name in ("head_dim", "qk_head_dim"):
        return head
    if name == "query_pre_attn_scalar":
        return max(int(value) * head // int(full["head_dim"]), 1)
    if name == "global_head_dim":
        return 2 * head
    if name == "patch_size":
        return _PATCH
    if name == "image_size":
        return _PATCH * merge * _SIDE
    if name == "window_size":  # for a tower, in pixels
        return _PATCH * merge * _SIDE // 2
    return value


def _key_heads(heads: int, queries: int) -> int:
    """Key heads of the twin: as many as query heads, half of them, or one."""
    if heads in (1, queries):
        return min(heads, _HEADS)
    return _HEADS // 2


def _layer(own: Mapping[str, Any], full: Mapping[str, Any], head: int) -> dict[str, Any]:
    """A single layer's own settings (`per_layer_config`), for the twin."""
    sizes = {name: _size(name, value, {**full, **own}, 1, {}, head) for name, value in own.items()}
    if "head_dim" in own:
        sizes["head_dim"] = head * max(round(own["head_dim"] / full["head_dim"]), 1)
    return sizes


def _depth(full: Mapping[str, Any]) -> int | None:
    return next((full[name] for name in _DEPTHS if name in full), None)


def _kept_layers(full: Mapping[str, Any]) -> list[int]:
    """Which layers the twin has: some of every kind, in their order, with long runs cut short."""
    depth = _depth(full)
    if depth is None:
        return []
    lists = [
        value
        for name, value in full.items()
        if isinstance(value, list | tuple) and len(value) == depth and name not in _LAYER_NUMBERS
    ]
    numbers = [full[name] for name in _LAYER_NUMBERS if full.get(name) is not None]
    kinds = [
        (*(str(one[i]) for one in lists), *(i in one for one in numbers)) for i in range(depth)
    ]
    shared = depth - (full.get("num_kv_shared_layers") or 0)
    return _some(kinds, range(shared), _MIXED) + _some(kinds, range(shared, depth), _SHARING)


def _some(kinds: Sequence[Any], layers: range, enough: int) -> list[int]:
    """The first layers of some: `enough` of them, and at least one of every kind."""
    every = {kinds[i] for i in layers}
    enough = enough if len(every) > 1 else min(enough, _ALIKE)
    kept: list[int] = []
    run = 0
    for i in layers:
        if len(kept) >= enough and every == {kinds[k] for k in kept}:
            break
        run = run + 1 if i > layers.start and kinds[i - 1] == kinds[i] else 1
        if run <= _RUN or len(every) == 1:
            kept.append(i)
    return kept


def _head_dim(full: Mapping[str, Any]) -> int:
    """The width of a head of the twin.

    If the heads of the model divide its width evenly, so do those of the twin. Otherwise they are
    twice as wide, as in most configs. They are wide enough to give rotary positions on three axes
    an angle each.
    """
    heads = next((full[n] for n in ("num_attention_heads", "num_heads") if full.get(n)), _HEADS)
    share = WIDTH // _HEADS
    if full.get("qk_rope_head_dim"):
        return _SIZES["qk_nope_head_dim"] + _SIZES["qk_rope_head_dim"]
    given = full.get("head_dim")
    if not isinstance(given, int) or given * heads != full.get("hidden_size"):
        share = share if given is None else 2 * share
    return max(share, round(WIDTH / _HEADS / _rotated(full)))


def _rotated(full: Mapping[str, Any]) -> float:
    """The smallest share of a head that RoPE rotates, over all kinds of layers."""
    found = full.get("rope_parameters") or {}
    every = [found, *(one for one in found.values() if isinstance(one, Mapping))]
    return min((one.get("partial_rotary_factor") or 1.0 for one in every), default=1.0)


def _rope(value: Any, full: Mapping[str, Any], head: int, mrope: bool) -> Any:
    """Rotary parameters; the angles of a head are divided among the axes as before."""
    if not isinstance(value, Mapping):
        return value
    tiny = dict(value)
    for name, one in value.items():
        if isinstance(one, Mapping):  # for one kind of layers
            tiny[name] = _rope(one, full, head, mrope)
    angles = round(head * (value.get("partial_rotary_factor") or 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if name in value:
            tiny[name] = list(value[name])[:angles]
    if mrope:
        sections: Sequence[int] = value.get("mrope_section") or (2, 3, 3)
        share = [max(angles * part // sum(sections), 1) for part in sections[:-1]]
        tiny["mrope_section"] = [*share, angles - sum(share)]
    return tiny


def _merge(full: Mapping[str, Any]) -> int:
    """Side of the square of patches that become one visual token."""
    vision = full.get("vision_config") or {}
    for part in (full, vision):
        for name in ("scale_factor", "downsample_factor", "spatial_merge_size"):
            if part.get(name):
                return int(part[name])
        for name in ("downsample_ratio", "pixel_shuffle_ratio"):
            if part.get(name):
                return int(1 / part[name] + 0.5)
    return 2 if "mm_tokens_per_image" in full else 1


def _read(chosen: Any, depth: int) -> Any:
    """Which tower layers the projector of the twin reads."""
    if isinstance(chosen, int):
        return max(chosen, -depth) if chosen < 0 else min(chosen, depth)
    order = sorted(set(chosen))
    return [order.index(one) % (depth + 1) for one in chosen]


def _token_ids(full: Mapping[str, Any]) -> dict[int, int]:
    """The twin's id for every special token: they are the last of its vocabulary."""
    found: set[int] = set()

    def walk(part: Mapping[str, Any]) -> None:
        for name, value in part.items():
            if isinstance(value, Mapping) and name.endswith("_config"):
                walk(value)
            elif name.endswith(_TOKENS):
                found.update(
                    one
                    for one in (value if isinstance(value, list | tuple) else [value])
                    if isinstance(one, int) and one >= 0
                )

    walk(full)
    return {old: VOCABULARY - len(found) + new for new, old in enumerate(sorted(found))}
