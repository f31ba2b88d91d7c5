"""Tiny twins: what a config of real size becomes, and what stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import PUBLISHED
from helpers.full_configs import stand_in
from pore.checking.shrinking import VOCABULARY
from pore.checking.twin import twin_of

each_config = pytest.mark.parametrize("name", PUBLISHED)


def kinds(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ["full_attention"])


@each_config
def test_a_twin_is_tiny_and_has_what_makes_the_family(name: str) -> None:
    full = PUBLISHED[name]()
    before = full.to_json_string()
    tiny, family = twin_of(full)
    assert full.to_json_string() == before
    assert type(tiny) is type(full)
    model = stand_in(full)
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000
    was, now = full.text_config, tiny.text_config
    assert kinds(now) == kinds(was)
    assert now.num_hidden_layers <= 9
    assert len(family.layers(model)) == now.num_hidden_layers
    heads = "num_attention_heads", "num_key_value_heads"  # which layers may have otherwise
    (queries, keys), few = ([c.to_dict()[name] for name in heads] for c in (was, now))
    assert (few[0] == few[1], few[1] == 1) == (queries == keys, keys == 1)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        assert getattr(now, cap, None) == getattr(was, cap, None)
    for several in ("num_experts", "num_local_experts", "n_routed_experts", "sliding_window"):
        assert bool(getattr(now, several, None)) == bool(getattr(was, several, None))
    assert bool(getattr(now, "num_kv_shared_layers", 0)) == bool(
        getattr(was, "num_kv_shared_layers", 0)
    )
    stacked = getattr(full.vision_config, "deepstack_visual_indexes", None)
    if stacked is not None:
        assert len(tiny.vision_config.deepstack_visual_indexes) == len(stacked)
    if family.mrope:
        sections = now.rope_parameters["mrope_section"]
        part = now.rope_parameters.get("partial_rotary_factor", 1.0)
        head = getattr(now, "head_dim", None) or now.hidden_size // now.num_attention_heads
        assert 2 * sum(sections) == head * part
        assert min(sections) > 0


@each_config
def test_special_tokens_fit_the_vocabulary_and_stay_apart(name: str) -> None:
    full = PUBLISHED[name]()
    tiny, _ = twin_of(full)
    was, now = ids_of(full.to_dict()), ids_of(tiny.to_dict())
    assert now.keys() == was.keys()
    assert all(100 <= one < VOCABULARY for one in now.values())
    assert len(set(now.values())) == len(set(was.values()))


def ids_of(config: dict[str, Any], at: str = "") -> dict[str, int]:
    """The token ids of a config, by where they are."""
    found: dict[str, int] = {}
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            found |= ids_of(value, f"{at}{name}.")
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            found[at + name] = value
    return found


@each_config
def test_a_twin_of_a_twin_is_the_same(name: str) -> None:
    tiny, _ = twin_of(PUBLISHED[name]())
    assert twin_of(tiny)[0].to_dict() == tiny.to_dict()


def test_a_twin_leaves_chance_alone() -> None:
    state = torch.get_rng_state()
    made = [stand_in(PUBLISHED["LLaVA-1.5"]()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(made[0].parameters(), made[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
