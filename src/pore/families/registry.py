"""The families of models that pore knows, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any

from torch import nn

from pore.cost.decoders import DecoderShape
from pore.cost.reading import part
from pore.cost.shapes import ModelShape
from pore.errors import UnsupportedModelError
from pore.families.base import Family
from pore.layout import Image


@cache
def _load_entry_points() -> None:
    for entry in metadata.entry_points(group="pore.families"):
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Family)):
            raise UnsupportedModelError(
                f"Entry point {entry.name!r} of group 'pore.families' gives {kind!r}, "
                "which is not a subclass of pore.Family."
            )


def families() -> dict[str, Family]:
    """All families, built in, defined since, or from the entry points `pore.families`.

    Returns:
        The adapter for every `config.model_type`; keys such as "llava+pixtral" are for models whose
        vision tower makes them another family.

    Raises:
        UnsupportedModelError: An entry point does not give a `Family`.
    """
    _load_entry_points()
    return {model_type: kind() for model_type, kind in sorted(Family.registry.items())}


def family_of(model: nn.Module) -> Family:
    """The adapter for a model.

    Args:
        model: A model of transformers.

    Returns:
        The adapter.

    Raises:
        UnsupportedModelError: pore does not know the model; the message lists those it does.
    """
    return family_of_config(getattr(model, "config", None), type(model).__name__)


def family_of_config(config: Any, name: str) -> Family:
    """The adapter for models of a config.

    Args:
        config: The config of a whole model.
        name: What to call the model in an error.

    Returns:
        The adapter.

    Raises:
        UnsupportedModelError: As `family_of`.
    """
    found = _known(config)
    if found is not None:
        return found
    names = ", ".join(f"{kind.name} ({key})" for key, kind in families().items())
    model_type = getattr(config, "model_type", None)
    vision = getattr(config, "vision_config", None)
    raise UnsupportedModelError(
        f"pore does not know {name} (model_type {model_type!r}"
        f"{'' if vision else ', no vision tower in its config'}). Families that it knows: {names}. "
        f"To describe another takes a few lines: a subclass of pore.Family with its name and "
        f"model_types = ({str(model_type)!r},), see docs/adding-a-family.md."
    )


def _known(config: Any) -> Family | None:
    """The adapter for models of a config, None where there is none."""
    model_type = getattr(config, "model_type", None)
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    known = families()
    return known.get(f"{model_type}+{vision}") or known.get(str(model_type))


def images_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
    """The images of a batch, whatever the arguments are called that they come in.

    Args:
        model: A supported model.
        inputs: What its processor makes.

    Returns:
        The images, by sample and then by place in the prompt.

    Raises:
        UnsupportedModelError: The model belongs to no family.
        InputError: Images and placeholders do not fit together.
    """
    family = family_of(model)
    return family.images(model, family.inputs(model, (), inputs))


def shape_of(config: Any) -> ModelShape:
    """The sizes of models of a config, from which their FLOPs follow.

    Args:
        config: The config of a whole model, as `model.config`.

    Returns:
        What the model's family reads from it; of a model without a family, or whose family does
        not say, the decoder alone.

    Raises:
        UnsupportedModelError: The decoder is of a type not known to `pore.cost.decoders`, or a size
            is missing from the config.
    """
    decoder, family = DecoderShape.from_config(part(config, "text_config")), _known(config)
    if family is None:
        return ModelShape.of_decoder(decoder, getattr(config, "model_type", None))
    return family.shape(config, decoder)


def sizes_of(model: nn.Module) -> ModelShape:
    """The sizes of a model that methods are set up by, also where its FLOPs are not known.

    Args:
        model: A supported model.

    Returns:
        What `shape_of` says. Where it refuses, a shape whose decoder is no more than its number of
        layers, with the vision tower if its sizes are known.

    Raises:
        UnsupportedModelError: The model belongs to no family.
    """
    config = getattr(model, "config", None)
    with suppress(UnsupportedModelError):
        return shape_of(config)
    family = family_of(model)
    decoder = DecoderShape.of_depth(len(family.layers(model)))
    with suppress(UnsupportedModelError):
        return family.shape(config, decoder)
    return ModelShape.of_decoder(decoder, getattr(config, "model_type", None))
