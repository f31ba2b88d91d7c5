"""What transformers calls the arguments of its models, decoders and layers.

The names may change: in 5.24 `past_key_values` became `cache`. All other files of pore use the
constants here, so that a further rename is one line; `check_interface` refuses a model whose
arguments have other names."""

from __future__ import annotations

import inspect
from functools import lru_cache

from pore.errors import UnsupportedModelError

IDS = "input_ids"
"""(B, L) token ids of a model's prompt."""

EMBEDS = "inputs_embeds"
"""What enters a decoder: (B, L, D)."""

HIDDEN = "hidden_states"
"""What enters a decoder layer, mostly as a positional argument: (B, L, D)."""

MASK = "attention_mask"
"""The mask of a model, a decoder or a layer."""

POSITIONS = "position_ids"
"""(B, L) or, on several axes, (3 or 4, B, L)."""

ROTARY = "position_embeddings"
"""Rotary tables of a decoder layer, or two of them by kind of layer."""

WANTED = "logits_to_keep"
"""The tokens whose logits are asked for: how many from the end, or their positions."""

TOWER_READ = ("vision_feature_layer", "vision_feature_select_strategy")
"""Which layer and tokens of the vision tower the projector reads: in a call, or in the config."""

LABELS = "labels"
"""(B, L) the token ids that the loss expects; -100 where it skips a token."""

ROUTER_LOGITS = "output_router_logits"
"""Asks for the loss that balances experts."""

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Where each sample starts when several lie in one row, for FlashAttention."""

DEEPSTACK_WHERE = "visual_pos_masks"
DEEPSTACK_WHAT = "deepstack_visual_embeds"
"""Arguments of a Qwen3-VL decoder: which tokens are visual, and what is added to them."""

SHARED_KEYS = "shared_kv_states"
"""The argument in which decoder layers pass keys and values to later ones, by kind of layer."""

CACHE = ("cache", "past_key_values")
"""What forwards call the cache, newest first: `cache` since transformers 5.24."""

DECODER = frozenset(
    {IDS, EMBEDS, MASK, POSITIONS, WANTED, DEEPSTACK_WHERE, DEEPSTACK_WHAT, *CACHE}
    | {"per_layer_inputs", "use_cache"}
)
"""All arguments of decoders; the engine knows what to do with each."""

LAYER = frozenset(
    {HIDDEN, MASK, POSITIONS, ROTARY, SHARED_KEYS, *CACHE} | {"per_layer_input", "use_cache"}
)
"""All arguments of decoder layers; the engine knows what to do with each."""


@lru_cache(maxsize=64)
def check_interface(kind: type) -> None:
    """Refuse a decoder or a layer whose arguments have names that pore does not know.

    Args:
        kind: The class of a decoder or of a decoder layer.

    Raises:
        UnsupportedModelError: It takes no mask, no positions or no cache by a known name.
    """
    import transformers

    names = set(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
    for what, known in (("mask", {MASK}), ("positions", {POSITIONS, ROTARY}), ("cache", {*CACHE})):
        if not names & known:
            raise UnsupportedModelError(
                f"{kind.__name__} of transformers {transformers.__version__} takes no {what} by a "
                f"name that this version of pore knows ({', '.join(sorted(known))}); use a version "
                "of transformers that it was tested with, or a newer pore."
            )
