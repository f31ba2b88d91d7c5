"""The vision tower of transformers inside a model of vLLM, with a method at work in it.

vLLM's own towers fuse and split what methods read. So a model that prunes has the tower and the
projector of transformers in their place, with the weights of the checkpoint, and the engine of pore
runs the method in them as it does everywhere: nothing of a method is written a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import IDS, MASK
from pore._compat.models import of_layers
from pore.engine.embeddings import KeptEmbeddings, kept_embeddings
from pore.engine.pruner import Pruner
from pore.errors import InputError, ModelStateError, UnsupportedModelError
from pore.families.registry import family_of
from pore.layout import Tiling


class PrunedTower:
    """A model of transformers without a decoder, which says what is left of images.

    Args:
        config: The config of the whole model.
        pruner: A method that acts in the vision tower or on the embeddings.
        modules: The names of the modules and weights, in the multimodal model of transformers, that
            make visual tokens of pixels.

    Attributes:
        modules: These, to be part of vLLM's model, which loads their weights.
        dtype: Type of their weights.
    """

    def __init__(self, config: Any, pruner: Pruner, modules: Iterable[str]) -> None:
        from transformers import AutoModelForImageTextToText

        self._pruner = pruner
        with torch.device("meta"):  # a decoder layer is there to be counted, and never runs
            model = AutoModelForImageTextToText.from_config(of_layers(config, 1))
        self._family = family_of(model)
        base: Any = self._family.base(model)
        self.modules: dict[str, Any] = {}
        for name in modules:
            self.modules[name] = real = _real(getattr(base, name), config)
            setattr(base, name, real)
        width = config.get_text_config().hidden_size
        self.dtype = torch.get_default_dtype()
        base.set_input_embeddings(_NoText(width, self.dtype))
        self._model = model.eval()

    def tilings(self, sizes: Tensor) -> list[Tiling]:
        """How images become tokens, in a family that cuts them into tiles.

        Args:
            sizes: (B, 2) height and width of each.
        """
        return self._family.tilings(self._model, {"image_sizes": sizes})

    def rows(
        self, visual: int, left: int | None, inputs: Mapping[str, Any]
    ) -> list[KeptEmbeddings]:
        """What is left of images of one size.

        The prompt has nothing but images, so a method that reads the question fails.

        Args:
            visual: Placeholders that each of them has where nothing is pruned.
            left: Placeholders that it has here; None where that is what is asked.
            inputs: The pixels of B images, and what else the model gets with them; of a single
                image where the tower takes all in one sequence.

        Returns:
            One entry for each of the B.

        Raises:
            UnsupportedModelError: The method needs the question.
            ModelStateError: More or fewer are left than the prompt was given placeholders for.
        """
        pixels: Tensor = inputs[self._family.pixels_name(self._model)]
        images = 1 if self._family.packed else len(pixels)
        token = self._family.placeholder_id(self._model)
        ids = torch.full((images, visual), token, device=pixels.device)
        types = self._family.prompt_types(self._model, ids, 0)
        given = {IDS: ids, MASK: torch.ones_like(ids), **types, **inputs}
        try:
            found = kept_embeddings(self._model, given, self._pruner)
        except InputError as error:
            raise UnsupportedModelError(
                f"{self._pruner.name} does not choose by the image alone, which is all that is "
                f"known where a server encodes it: {error}"
            ) from error
        for image in found:
            if left is not None and len(image.kept) != left:
                raise ModelStateError(
                    f"{len(image.kept)} tokens are left of an image for which the prompt has "
                    f"{left}: how many {self._pruner.name} keeps is not known from the image's "
                    "size alone, as a server must."
                )
        return found


def _real(outline: Any, config: Any) -> nn.Module | nn.Parameter:
    """A module or weight like one without numbers, with numbers that are to be loaded."""
    if isinstance(outline, nn.Parameter):
        return nn.Parameter(torch.zeros(outline.shape), requires_grad=False)
    # A tower has a config of its own, a projector is made from the whole one.
    made: nn.Module = type(outline)(getattr(outline, "config", config)).eval()
    return made


def renamed(
    weights: Iterable[tuple[str, Tensor]], names: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Weights of a checkpoint under the names that transformers has for them now.

    Args:
        weights: Names and tensors.
        names: What is replaced in a name, and by what.
    """
    for name, tensor in weights:
        for old, new in names.items():
            name = name.replace(old, new)
        yield name, tensor


class _NoText(nn.Module):
    """Embeddings of placeholders, which images replace: zeros."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width = width
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L, D) zeros."""
        return torch.zeros(*ids.shape, self._width, dtype=self._dtype, device=ids.device)
