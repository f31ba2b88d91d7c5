"""Where the parts of a model are, except for its vision tower."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn


class ModelParts:
    """Where a family keeps its decoder, and what is special about it.

    The defaults fit the usual shape of a model in transformers: a multimodal model that holds
    `language_model`, wrapped by one that adds `lm_head`.

    Attributes:
        mrope: Whether rotary positions have several axes. Methods that number positions anew then
            leave them as they are.
        first_position: Where positions start.
        token_types: The argument that says which tokens also see tokens after them, as those of one
            image do in Gemma; None in a causal decoder. Such a family has `masks`.
        token_inputs: What the decoder and its layers get besides states, with an entry for every
            token (B, L, ...): the names of these arguments.
        deepstack: Whether the first decoder layers add features to the visual tokens.
        recurrent_mixer: The attribute of a decoder layer that holds its recurrence, if some layers
            have a recurrence in place of attention; None if all have attention.
        shares_keys: Whether decoder layers may look at keys and values of earlier ones, see
            `source`.
    """

    mrope: ClassVar[bool] = False
    first_position: ClassVar[int] = 0
    token_types: ClassVar[str | None] = None
    token_inputs: ClassVar[tuple[str, ...]] = ()
    deepstack: ClassVar[bool] = False
    recurrent_mixer: ClassVar[str | None] = None
    shares_keys: ClassVar[bool] = False

    def base(self, model: nn.Module) -> nn.Module:
        """The multimodal model: the module whose `forward` gets token ids and pixels."""
        return model.model if hasattr(model, "model") else model  # type: ignore[return-value]

    def inputs(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of a call of `base(model)`, by name."""
        if not args:  # the usual call, at every token; looking at a signature takes 0.2 ms
            return dict(kwargs)
        signature = inspect.signature(type(self.base(model)).forward)
        bound = signature.bind_partial(self.base(model), *args, **kwargs)
        named = dict(bound.arguments)
        named.update(named.pop("kwargs", {}))
        return named

    def decoder(self, model: nn.Module) -> nn.Module:
        """The language model without its head, called with `inputs_embeds`."""
        return self.base(model).language_model  # type: ignore[return-value]

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder layers, from the first."""
        return self.decoder(model).layers  # type: ignore[return-value]

    def attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention module of a decoder layer."""
        return layer.self_attn  # type: ignore[return-value]

    def recurrent(self, layer: nn.Module) -> bool:
        """Whether a decoder layer mixes tokens by a recurrence, and so has no attention to read."""
        return self.recurrent_mixer is not None and hasattr(layer, self.recurrent_mixer)

    def source(self, model: nn.Module, layer: int) -> int | None:
        """The earlier layer whose keys and values a decoder layer looks at; None: its own.

        Args:
            model: A model of a family that `shares_keys`.
            layer: The layer, from 0.
        """
        return None

    def norm(self, model: nn.Module) -> nn.Module:
        """The decoder's final norm."""
        return self.decoder(model).norm  # type: ignore[return-value]

    def rotary(self, model: nn.Module, hidden: Tensor, positions: Tensor, layer: int) -> Any:
        """Rotary tables for states (B, m, D) at positions (B, m), as a decoder layer takes them.

        Called for methods that number the kept tokens anew inside the decoder, or ask for them.
        """
        return self.decoder(model).rotary_emb(hidden, positions)  # type: ignore[operator]

    def masks(
        self, model: nn.Module, embeds: Tensor, tokens: Tensor, cache: Any, types: Tensor
    ) -> Any:
        """The masks that the decoder takes for a prompt, as the model itself makes them.

        Called only in families with `token_types`, for prompts that were shortened before the
        decoder.

        Args:
            model: The model.
            embeds: (B, L, D) embeddings of the prompt.
            tokens: (B, n + L) bool, False at padding; the first n tokens are in the cache.
            cache: The cache before the prompt, or None.
            types: (B, n + L) types of the tokens.

        Returns:
            What the decoder takes as `attention_mask`.
        """
        raise NotImplementedError
