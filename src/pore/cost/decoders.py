"""Shapes of decoders: what their FLOPs depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pore.cost.reading import known_type, size

# Decoders by `model_type` whose layers are all alike: attention and a gated MLP.
_DECODERS = (
    "llama",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "cohere2",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "glm4v_text",
    "glm_ocr_text",
)

# Decoders whose layers differ or have other parts: experts, recurrences, compressed keys.
_MIXED = (
    "qwen3_vl_moe_text",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "glm4v_moe_text",
    "mistral4",
    "llama4_text",
)


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer multiplies, for each token and for each pair of tokens.

    Attributes:
        token: Multiply-adds for each token: with all matrices that it goes through (in a mixture of
            experts, those of the experts chosen for it), and with the state of a recurrence.
        pair: Multiply-adds for each pair of tokens: query times key, and weight times value; 0 in a
            layer without attention.
        qkv: The part of `token` that makes queries, keys and values.
    """

    token: int
    pair: int
    qkv: int


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder (the language model), as its FLOPs need them.

    Attributes:
        hidden: Width of the residual stream, d.
        intermediate: Width of the MLP, m; for experts, of all that a token goes through together.
        layers: Number of decoder layers.
        heads: Query heads of a layer.
        kv_heads: Key and value heads of a layer; fewer than `heads` with grouped queries.
        head_dim: Width of one head; `heads * head_dim` need not be `hidden`.
        vocab: Rows of the output head.
        gated: Whether the MLP has three matrices (gate, up, down) rather than two.
        each: The layers one by one, if they are not all alike or have more than attention and an
            MLP; empty if the sizes above say everything.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool
    each: tuple[LayerShape, ...] = ()

    @classmethod
    def of_depth(cls, layers: int) -> DecoderShape:
        """A decoder of which only the number of layers is known: all else is 0, no FLOPs follow."""
        return cls(0, 0, layers, 0, 0, 0, 0, gated=True)

    @property
    def known(self) -> bool:
        """Whether more than the number of layers is known."""
        return self.hidden > 0

    def layer(self, number: int) -> LayerShape:
        """What a layer multiplies; sliding windows are counted as if they showed everything."""
        if self.each:
            return self.each[number]
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv = self.hidden * (queries + 2 * keys)
        mlp = self.hidden * self.intermediate * (3 if self.gated else 2)
        return LayerShape(qkv + queries * self.hidden + mlp, 2 * queries, qkv)

    @classmethod
    def from_config(cls, config: object) -> DecoderShape:
        """Read the sizes from the decoder's config (`text_config` of a vision-language model).

        Args:
            config: A transformers config, such as of type llama or qwen3_vl_moe_text.

        Raises:
            UnsupportedModelError: The config has a type that is not known here, or lacks a size.
        """
        model_type = known_type(config, "decoder", (*_DECODERS, *_MIXED))
        hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
        head_dim = size(config, "head_dim", default=hidden // heads)
        if model_type == "mistral4":
            head_dim = size(config, "qk_nope_head_dim") + size(config, "qk_rope_head_dim")
        mlps = _mlps(config, model_type)
        shape = cls(
            hidden=hidden,
            intermediate=mlps[-1][0],
            layers=size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=size(config, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            vocab=size(config, "vocab_size"),
            gated=True,
        )
        if model_type in _DECODERS:
            return shape
        return replace(shape, each=tuple(_layers(config, model_type, shape, mlps)))


def _mlps(config: Any, model_type: str) -> list[tuple[int, int]]:
    """For every layer: the width of all MLPs that a token goes through, and their router's rows.

    A router has a row for every expert, and one more if a shared expert has a gate.
    """
    layers = size(config, "num_hidden_layers")
    if model_type in ("qwen3_vl_moe_text", "qwen3_5_moe_text"):
        experts = size(config, "num_experts")
        width = size(config, "num_experts_per_tok") * size(config, "moe_intermediate_size")
        if model_type == "qwen3_5_moe_text":
            width += size(config, "shared_expert_intermediate_size")
            return [(width, experts + 1)] * layers
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        plain = size(config, "intermediate_size"), 0
        return [plain if i in dense or (i + 1) % step else (width, experts) for i in range(layers)]
    if model_type in ("glm4v_moe_text", "mistral4"):
        each = size(config, "moe_intermediate_size")
        chosen = size(config, "num_experts_per_tok") + size(config, "n_shared_experts")
        plain = size(config, "intermediate_size"), 0
        dense = config.first_k_dense_replace
        mixed = chosen * each, size(config, "n_routed_experts")
        return [plain if i < dense else mixed for i in range(layers)]
    if model_type == "llama4_text":
        # transformers sends every token through all experts, and the shared one.
        experts = size(config, "num_local_experts")
        plain = size(config, "intermediate_size_mlp"), 0
        mixed = (experts + 1) * size(config, "intermediate_size"), experts
        return [mixed if i in config.moe_layers else plain for i in range(layers)]
    return [(size(config, "intermediate_size"), 0)] * layers


def _layers(
    config: Any, model_type: str, shape: DecoderShape, mlps: list[tuple[int, int]]
) -> Iterator[LayerShape]:
    """Every layer of a decoder of `_MIXED`."""
    hidden, heads = shape.hidden, shape.heads
    queries, keys = heads * shape.head_dim, shape.kv_heads * shape.head_dim
    qkv, values = hidden * (queries + 2 * keys), queries
    if model_type == "mistral4":  # keys and values come from one compressed vector
        values = heads * size(config, "v_head_dim")
        rank, rope = size(config, "kv_lora_rank"), size(config, "qk_rope_head_dim")
        squeezed = config.q_lora_rank
        asked = hidden * queries if squeezed is None else squeezed * (hidden + queries)
        unpacked = queries - heads * rope + values
        qkv = asked + hidden * (rank + rope) + rank * unpacked
    if model_type.startswith("qwen3_5"):  # queries come with a gate
        qkv += hidden * queries
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * shape.layers
    for kind, (width, routed) in zip(kinds, mlps, strict=True):
        mlp = hidden * (3 * width + routed)
        if kind == "linear_attention":
            yield LayerShape(_recurrent(config, hidden) + mlp, 0, 0)
        else:
            yield LayerShape(qkv + values * hidden + mlp, queries + values, qkv)


def _recurrent(config: Any, hidden: int) -> int:
    """Multiply-adds of a token in a gated DeltaNet: matrices, convolution and state.

    By definition, the state is read for the old value, written to, and read for the output. Kernels
    do this in chunks of tokens, with more and other products.
    """
    key_heads, heads = (size(config, f"linear_num_{x}_heads") for x in ("key", "value"))
    key, value = (size(config, f"linear_{x}_head_dim") for x in ("key", "value"))
    mixed = 2 * key_heads * key + heads * value
    projected = hidden * (mixed + heads * value + 2 * heads) + heads * value * hidden
    convolved = mixed * size(config, "linear_conv_kernel_dim")
    return projected + convolved + 3 * heads * key * value
