"""What the engine needs to know of a family of vision-language models, and nothing more."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.errors import InputError, UnsupportedModelError
from pore.families.prompts import comes_with, equal_images, placeholder_runs, unbroken
from pore.layout import Image, Packing, Tiling

Noise = Callable[..., Tensor]


"""Makes (...) random pixels, given their shape."""


TAG = 90


"""The first of ten token ids that mean nothing to a tiny twin: tags, breaks and separators."""


class Family:
    """An adapter: where a family keeps its parts, and where its visual tokens lie.

    An adapter knows nothing of pruning methods. The defaults fit the usual shape of a model in
    transformers: a multimodal model that holds `language_model`, `vision_tower` and
    `multi_modal_projector`, wrapped by one that adds `lm_head`; in prompts, one placeholder token
    for every visual token. From its definition on, a subclass that names `model_types` is the
    adapter of those, in place of an earlier one.

    Attributes:
        name: What people call the family.
        model_types: The `config.model_type` of the models that the adapter is for. Followed by "+"
            and that of the vision tower where only those with such a tower are meant.
        placeholder: The token id that stands for visual content in prompts, or the config's name
            for it.
        encodes: Whether what `get_image_features` is called with says how images become tokens, see
            `tilings`.
        encodes_videos: Whether the same goes for `get_video_features`, see `video_tilings`.
        mrope: Whether rotary positions have several axes. Methods that number positions anew then
            leave them as they are.
        token_types: The argument that says, by token, which see those behind them, as those of one
            image do in Gemma; None in a causal decoder. Such a family has `masks`.
        deepstack: Whether the first decoder layers add features to the visual tokens.
        recurrent_mixer: What a decoder layer has in place of attention where it mixes tokens by a
            recurrence; None where all have attention.
        tiles: Whether an image may be cut into tiles, so that its tokens lie on no single grid.
        tiled_prompts: Whether images go through the vision tower in tiles, and only the prompt says
            which are of one image, see `prompt_tilings`.
        tiles_placed: Whether tilings say where in the image the tiles lie.
        merged: Whether visual tokens are made of several patches, see `merge_size`.
        packed: Whether all images go through the vision tower in one sequence, see `packing`.
        cls_first: Whether a CLS token of the vision tower comes before the patches.
        first_position: Where positions start.
        token_inputs: What the decoder and its layers get besides states, with an entry for every
            token (B, L, ...): the names that they have there.
        shares_keys: Whether decoder layers may look at keys and values of earlier ones, see
            `source`.
        tower_refusal: Why no method can act in the vision tower; None where they can.
        registry: The adapter of every `model_type`.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    placeholder: ClassVar[str | int] = "image_token_id"
    encodes: ClassVar[bool] = False
    encodes_videos: ClassVar[bool] = False
    mrope: ClassVar[bool] = False
    token_types: ClassVar[str | None] = None
    deepstack: ClassVar[bool] = False
    recurrent_mixer: ClassVar[str | None] = None
    tiles: ClassVar[bool] = False
    tiled_prompts: ClassVar[bool] = False
    tiles_placed: ClassVar[bool] = True
    merged: ClassVar[bool] = False
    packed: ClassVar[bool] = False
    cls_first: ClassVar[bool] = True
    first_position: ClassVar[int] = 0
    token_inputs: ClassVar[tuple[str, ...]] = ()
    shares_keys: ClassVar[bool] = False
    tower_refusal: ClassVar[str | None] = (
        "nothing is said of its tower (`tower_refusal`). Use a method that acts on the embeddings "
        "or in the decoder."
    )
    registry: ClassVar[dict[str, type[Family]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("model_types", ())
        if isinstance(own, str):
            raise InputError(f"{cls.__name__}.model_types is a tuple: ({own!r},).")
        Family.registry.update(dict.fromkeys(own, cls))

    def base(self, model: nn.Module) -> nn.Module:
        """The multimodal model: the module whose `forward` gets token ids and pixels."""
        return model.model if hasattr(model, "model") else model  # type: ignore[return-value]

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
        """The earlier layer whose keys and values a decoder layer looks at; None at its own.

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
            tokens: (B, n + L) bool, False at padding, behind n tokens in the cache.
            cache: The cache before the prompt, or None.
            types: (B, n + L) types of the tokens.

        Returns:
            What the decoder takes as `attention_mask`.
        """
        raise NotImplementedError

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return self.base(model).vision_tower  # type: ignore[return-value]

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """All layers of the vision tower."""
        return _vision(self.tower(model)).encoder.layers  # type: ignore[no-any-return]

    def tower_attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention module of a layer of the vision tower."""
        return layer.self_attn  # type: ignore[return-value]

    def tower_read(self, model: nn.Module) -> int:
        """Index of the tower layer whose output the projector reads: the last if none is named."""
        chosen: Any = getattr(model.config, "vision_feature_layer", -1)
        if not isinstance(chosen, int):
            raise UnsupportedModelError(
                f"The projector reads several tower layers ({chosen}), so no single one says which "
                "patches matter; use a method that acts in the decoder."
            )
        # hidden_states[0] are the embeddings, so entry i is the output of layer i - 1.
        return chosen + len(self.tower_layers(model)) if chosen < 0 else chosen - 1

    def tower_attended(self, model: nn.Module, layer: int) -> int:
        """The tower layer whose attention is read for that of a layer.

        The same, unless it attends in windows.
        """
        return layer

    def tower_has_cls(self, model: nn.Module) -> bool:
        """Whether the tower has a CLS token beside the patches (CLIP does, SigLIP does not)."""
        return hasattr(_vision(self.tower(model)).embeddings, "class_embedding")

    def projector(self, model: nn.Module) -> nn.Module:
        """The module that takes the tower's patch features, (I, N, C), to the decoder's width.

        It gives (I, N, D), or (I * N, D).
        """
        return self.base(model).multi_modal_projector  # type: ignore[return-value]

    def token_features(self, model: nn.Module) -> nn.Module:
        """The module whose first argument is one feature for every visual token, (I, N, C).

        That is the projector, or the part of it behind what makes a token of several patches.
        """
        return self.projector(model)

    def merge_size(self, model: nn.Module) -> int:
        """Side of the square of patches that a visual token is made of, where it is `merged`."""
        raise NotImplementedError

    def groups(self, model: nn.Module, patches: int) -> Tensor:
        """The patches that every visual token is made of.

        Called in families with `merged`. The default is for square images whose patches and tokens
        are in raster order.

        Args:
            model: The model.
            patches: Patches of an image that goes through the vision tower.

        Returns:
            (N, g) the places in the tower of the patches of every visual token, these in order.
        """
        size, side = self.merge_size(model), math.isqrt(patches)
        rows = torch.arange(patches).view(side // size, size, side // size, size)
        return rows.transpose(1, 2).reshape(-1, size * size)

    def packing(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Packing:
        """How images lie in the sequence of a call of `tower(model)`, in families with `packed`.

        Args:
            model: The model.
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.
        """
        raise NotImplementedError

    def inputs(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of a call of `base(model)`, by name."""
        if not args:  # as transformers calls it, at every token; a signature takes 0.2 ms
            return dict(kwargs)
        signature = inspect.signature(type(self.base(model)).forward)
        bound = signature.bind_partial(self.base(model), *args, **kwargs)
        named = dict(bound.arguments)
        named.update(named.pop("kwargs", {}))
        return named

    def tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """How the images of a call of the model's `get_image_features` become tokens.

        Args:
            model: A model of a family that `encodes`.
            inputs: The arguments of the call, by name.

        Returns:
            One entry for every image.
        """
        raise NotImplementedError

    def video_tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """How the videos of a call of the model's `get_video_features` become tokens.

        Args:
            model: A model of a family that `encodes_videos`.
            inputs: The arguments of the call, by name.

        Returns:
            One entry for every video.
        """
        raise NotImplementedError

    def prompt_tilings(self, model: nn.Module, input_ids: Tensor) -> list[Tiling]:
        """How the tiles that go through the vision tower for some prompts become tokens.

        Args:
            model: A model of a family with `tiled_prompts`.
            input_ids: (B, L) token ids.

        Returns:
            One entry for every image, by sample and then by place.
        """
        raise NotImplementedError

    def images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """The images whose visual tokens are among the token ids of this forward.

        By default every image is as many placeholders as its grid has places; in a family without
        a `grid`, every unbroken run of placeholders is an image. A video is one image without a
        grid.

        Args:
            model: The model.
            inputs: The arguments of its multimodal forward, by name; `input_ids` is there. In a
                family that `encodes`, `tilings` are those of the images that were encoded for it,
                where the images themselves are not among the arguments; likewise `video_tilings`.

        Returns:
            The images, by sample and then by place; empty where the forward has none.

        Raises:
            InputError: Placeholders and images do not fit together.
        """
        if not comes_with(inputs, "image"):
            return []
        grid = self.grid(model)
        columns = placeholder_runs(inputs["input_ids"], self.placeholder_id(model))
        if grid is not None:
            return equal_images(columns, grid[0] * grid[1], grid)
        return [
            Image(row, index, run)
            for row, where in enumerate(columns)
            for index, run in enumerate(unbroken(where))
        ]

    def grid(self, model: nn.Module) -> tuple[int, int] | None:
        """(height, width) in visual tokens that an image has on its own, None if it varies."""
        return None

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """The sizes of a model, from which its FLOPs follow.

        By default the decoder's alone.

        Args:
            config: The config of the whole model.
            decoder: What is known of its `text_config`.
        """
        return ModelShape.of_decoder(decoder, getattr(config, "model_type", None))

    def shrink(self, config: dict[str, Any]) -> None:
        """Mend the config of a tiny twin (`pore check`), whose sizes were chosen by their names.

        Args:
            config: The config as plain types, which this changes.
        """

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image as `pore check` gives it to a tiny twin, without a processor.

        The default is for a `grid` and a square picture.

        Args:
            model: The twin.
            noise: Makes random pixels of a shape.

        Returns:
            The token ids that stand for the image in a prompt, tags and breaks among them, and what
            the model gets besides; a batch is these put one behind another.

        Raises:
            UnsupportedModelError: The family does not say.
        """
        config: Any = model.config
        grid, vision = self.grid(model), getattr(config, "vision_config", None)
        side = getattr(vision, "image_size", None)
        if grid is None or not isinstance(side, int):
            raise UnsupportedModelError(
                f"{self.name} does not say what its models take for an image, so nothing can be "
                "checked: give its adapter a method `example` (docs/adding-a-family.md)."
            )
        count = grid[0] * grid[1]
        return [self.placeholder_id(model)] * count, {"pixel_values": noise(1, 3, side, side)}

    def prompt_types(self, model: nn.Module, ids: Tensor, answer: int) -> dict[str, Tensor]:
        """What the model gets besides token ids and images, by token, for `pore check`.

        Args:
            model: The twin.
            ids: (B, L) token ids.
            answer: How many of them, at the end, are of an answer.
        """
        if self.token_types is None:
            return {}
        return {self.token_types: (ids == self.placeholder_id(model)).long()}

    def placeholder_id(self, model: nn.Module) -> int:
        """The token id of the placeholder."""
        token = self.placeholder
        return token if isinstance(token, int) else int(getattr(model.config, token))

    def pixels(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The pixels among the arguments of a call of `tower(model)`.

        Returns:
            (I, 3, H, W) pixel values, one entry per image.
        """
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        return pixels

    def views(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The pictures that go through the vision tower for one image, as the processor makes them.

        Args:
            model: The model.
            inputs: What the processor makes of the image and a prompt.

        Returns:
            (3, H, W) pixel values for every tile, in the order of its visual tokens.
        """
        pixels: Tensor = inputs["pixel_values"]
        return list(pixels.reshape(-1, *pixels.shape[-3:]))


def _vision(tower: Any) -> Any:
    # Some towers hold embeddings and layers one level deeper.
    return getattr(tower, "vision_model", tower)
