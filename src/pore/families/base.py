"""What the engine needs to know about a family of vision-language models, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.errors import InputError, UnsupportedModelError
from pore.families.prompts import (
    by_place,
    check_sizes,
    comes_with,
    encoded_images,
    equal_images,
    placeholder_runs,
    tiles_apart,
    unbroken,
)
from pore.families.tower_parts import TowerParts
from pore.layout import Image, Tiling

Noise = Callable[..., Tensor]
"""Makes random pixels, given their shape: `noise(1, 3, 336, 336)`."""

TAG = 90
"""The first of ten token ids that mean nothing to a tiny twin: tags, breaks and separators."""


class Family(TowerParts):
    """An adapter: where a family keeps its parts, and where its visual tokens lie.

    An adapter knows nothing about pruning methods. `ModelParts` and `TowerParts` define where the
    modules are; this class adds which tokens of a prompt are visual, the sizes that FLOPs follow
    from, and what `pore check` needs. The defaults fit a model whose prompts have
    one placeholder token for every visual token.

    As soon as it is defined, a subclass that names `model_types` is the adapter for them. It may
    replace an earlier adapter only if it is a subclass of that one, or the same class defined
    again, as in a notebook.

    Attributes:
        name: What people call the family.
        model_types: The `config.model_type` of the models that the adapter is for. Followed by "+"
            and the vision tower's type if only models with such a tower are meant.
        placeholder: The token id that stands for visual content in prompts, or the config's name
            for it.
        encodes: Whether only the arguments of `get_image_features` say how many tokens an image
            becomes, see `tilings`.
        encodes_videos: Whether there are videos; the arguments of `get_video_features` say how many
            tokens each becomes, see `video_tilings`.
        tiles: Whether an image may be cut into tiles, so that its tokens lie on no single grid.
        tiled_prompts: Whether images go through the vision tower in tiles, and only the prompt says
            which tiles belong to one image, see `prompt_tilings`.
        tiles_placed: Whether tilings say where in the image the tiles lie.
        registry: The adapter of every `model_type`.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    placeholder: ClassVar[str | int] = "image_token_id"
    encodes: ClassVar[bool] = False
    encodes_videos: ClassVar[bool] = False
    tiles: ClassVar[bool] = False
    tiled_prompts: ClassVar[bool] = False
    tiles_placed: ClassVar[bool] = True
    registry: ClassVar[dict[str, type[Family]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("model_types", ())
        if isinstance(own, str):
            raise InputError(f"{cls.__name__}.model_types is a tuple: ({own!r},).")
        for model_type in own:
            cls._check_free(f"model type {model_type!r}", Family.registry.get(model_type))
        if own and "name" in cls.__dict__:
            same = [kind for kind in Family.registry.values() if kind.name == cls.name]
            for kind in same:
                cls._check_free(f"family name {cls.name!r}", kind)
        Family.registry.update(dict.fromkeys(own, cls))

    @classmethod
    def _check_free(cls, what: str, earlier: type[Family] | None) -> None:
        """Refuse a name that belongs to a class which this one is not derived from."""
        if earlier is None or issubclass(cls, earlier):
            return
        full, known = (f"{kind.__module__}.{kind.__qualname__}" for kind in (cls, earlier))
        if full != known:
            raise InputError(
                f"{full} has the {what} of {known}. Give it another, or make it a subclass of "
                f"{known}, whose place it then takes."
            )

    def images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """The images and videos whose visual tokens are among the token ids of this forward.

        Args:
            model: The model.
            inputs: The arguments of its multimodal forward, by name; `input_ids` is there. In a
                family that `encodes`, `tilings` are those of the images that were encoded for it,
                where the images themselves are not among the arguments; likewise `video_tilings`.

        Returns:
            The images, by sample and then by place; empty where the forward has none. A video is
            one image without a grid.

        Raises:
            InputError: Placeholders and images do not fit together.
        """
        found: list[Image] = []
        if comes_with(inputs, "image"):  # a placeholder that the model generated is not an image
            found += self.still_images(model, inputs)
        if self.encodes_videos and comes_with(inputs, "video"):
            columns = placeholder_runs(inputs["input_ids"], self.video_token(model))
            tilings = inputs.get("video_tilings")
            if not tilings:
                check_sizes(inputs, "video")
                tilings = self.video_tilings(model, inputs)
            videos = encoded_images(columns, tilings)
            found += [replace(video, of_video=True) for video in videos]
        return by_place(found)

    def still_images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """The images of a prompt, without its videos; called where some come with it.

        By default, every image has as many placeholders as its tiling says (in a family that
        `encodes`) or as its `grid` has places. Without a grid every unbroken run of
        placeholders is an image.

        Args:
            model: The model.
            inputs: As in `images`. In a family with `tiled_prompts` the token ids alone must do.
        """
        columns = placeholder_runs(inputs["input_ids"], self.placeholder_id(model))
        if self.encodes:
            tilings = inputs.get("tilings")
            if not tilings:
                check_sizes(inputs, "image")
                tilings = self.tilings(model, inputs)
            return encoded_images(columns, tilings)
        grid = self.grid(model)
        if grid is not None:
            return equal_images(columns, grid[0] * grid[1], grid)
        return [
            Image(row, index, run)
            for row, where in enumerate(columns)
            for index, run in enumerate(unbroken(where))
        ]

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

        By default tile by tile, with the whole image last, and without places for the others.

        Args:
            model: A model of a family with `tiled_prompts`, which has a `grid` for each tile.
            input_ids: (B, L) token ids.

        Returns:
            One entry for every image, by sample and then by place.
        """
        grid = self.grid(model)
        assert grid is not None
        found = self.still_images(model, {"input_ids": input_ids})
        return [tiles_apart(image, grid[0] * grid[1], image.grid) for image in found]

    def grid(self, model: nn.Module) -> tuple[int, int] | None:
        """(height, width) in visual tokens that an image has on its own, None if it varies."""
        return None

    def common_grid(self, model: nn.Module) -> tuple[int, int] | None:
        """The grid of every image, None where images differ in size or are cut into tiles."""
        return None if self.tiles else self.grid(model)

    def placeholder_id(self, model: nn.Module) -> int:
        """The token id of the placeholder."""
        token = self.placeholder
        return token if isinstance(token, int) else int(getattr(model.config, token))

    @property
    def of_videos(self) -> Family:
        """The adapter for how the frames of videos go through the vision tower, as pictures.

        In it `tower`, `merged` and the rest are of frames. By default they go as images do.
        """
        return self

    def video_token(self, model: nn.Module) -> int:
        """The token id of the placeholder of videos."""
        config: Any = model.config
        return int(config.video_token_id)

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """The sizes of a model, from which its FLOPs follow.

        By default only the decoder's are known.

        Args:
            config: The config of the whole model.
            decoder: The sizes of the decoder, as read from `text_config`.
        """
        return ModelShape.of_decoder(decoder, getattr(config, "model_type", None))

    def shrink(self, config: dict[str, Any]) -> None:
        """Correct the config of a tiny twin (`pore check`), whose sizes were chosen by their names.

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
            The token ids that stand for the image in a prompt, tags and breaks included, and what
            else the model gets; a batch is several of these, concatenated.

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
        """What else the model gets for every token, besides ids and images, for `pore check`.

        Args:
            model: The twin.
            ids: (B, L) token ids.
            answer: How many of them, at the end, belong to an answer.
        """
        if self.token_types is None:
            return {}
        return {self.token_types: (ids == self.placeholder_id(model)).long()}

    def pixels_name(self, model: nn.Module) -> str:
        """The name of the model's argument for pixels."""
        return "pixel_values"
