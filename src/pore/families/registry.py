"""The families of models that pore knows, one file each."""

from __future__ import annotations

import re
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from pore._compat.weights import commit
from pore.cost.decoders import DecoderShape
from pore.cost.reading import part
from pore.cost.shapes import ModelShape
from pore.embedded import embedded_model
from pore.errors import UnsupportedModelError
from pore.families.base import Family
from pore.identity import config_of, weights_of

# The folder of a model in the cache of the hub.
_CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([^/]+)$")


@cache
def _load_entry_points() -> None:
    for entry in metadata.entry_points(group="pore.families"):
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Family)):
            raise UnsupportedModelError(
                f"Entry point {entry.name!r} of group 'pore.families' gives {kind!r}, "
                "which is no subclass of pore.Family."
            )


def families() -> dict[str, Family]:
    """All families, built in, defined since, or from the entry points `pore.families`.

    Returns:
        The adapter for every `config.model_type`, and for those with a vision tower of some type
        where that makes another family of them: "llava+pixtral".

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


def names_of(model: nn.Module) -> dict[str, str | None]:
    """The names of a checkpoint.

    A local folder is known by its last part only, so that nothing of the machine is told.

    Args:
        model: A model of transformers.

    Returns:
        `model`, the hub id, folder name or "embedded" (None for a model that was not loaded), and
        `revision`, the commit on the hub where that is known: transformers from 5.18 on does not
        tell it, `pore.loading.load_model` does.
    """
    config: Any = model.config
    name, revision = getattr(config, "name_or_path", "") or None, commit(config)
    if name is not None and Path(name).is_dir():
        path = Path(name).resolve()
        name = "embedded" if path == Path(embedded_model()).resolve() else path.name
        cached = _CACHED.search(path.as_posix())
        if cached:
            owner, repository, snapshot = cached.groups()
            name, revision = f"{owner}/{repository}", revision or snapshot
    return {"model": name, "revision": revision}


def identity(model: nn.Module) -> dict[str, Any]:
    """What a model is, for a position bias, a calibration or answers to say where they come from.

    Args:
        model: A model of transformers.

    Returns:
        What `names_of` gives, and of its content `weights`, a fingerprint, and `config`, settings;
        see `pore.identity`.
    """
    return {**names_of(model), "weights": weights_of(model), "config": config_of(model)}


def at_hand(model: nn.Module) -> dict[str, Any]:
    """The same for `PositionBias.check`, which asks for the content only where it has to know."""
    return {
        **names_of(model),
        "weights": partial(weights_of, model),
        "config": partial(config_of, model),
    }
