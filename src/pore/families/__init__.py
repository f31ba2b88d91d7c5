"""The families of models that pore knows, one file each."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from pore._private import commit
from pore.embedded import embedded_model
from pore.errors import UnsupportedModelError
from pore.families.base import Family as Family
from pore.families.gemma3 import Gemma3
from pore.families.glm4v import Glm4V
from pore.families.idefics3 import Idefics3
from pore.families.internvl import InternVL
from pore.families.llama4 import Llama4
from pore.families.llava import Llava
from pore.families.llava_next import LlavaNext, LlavaNextVideo, LlavaOnevision
from pore.families.qwen_vl import QwenVL

_BUILT_IN: tuple[type[Family], ...] = (
    Llava,
    LlavaNext,
    LlavaNextVideo,
    LlavaOnevision,
    QwenVL,
    Glm4V,
    InternVL,
    Llama4,
    Idefics3,
    Gemma3,
)


@cache
def families() -> dict[str, Family]:
    """All families, built in or from the entry points `pore.families`, by `model_type`.

    Returns:
        The adapter for every `config.model_type`.

    Raises:
        UnsupportedModelError: An entry point does not give a `Family`.
    """
    kinds = list(_BUILT_IN)
    for entry in metadata.entry_points(group="pore.families"):
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Family)):
            raise UnsupportedModelError(
                f"Entry point {entry.name!r} of group 'pore.families' gives {kind!r}, "
                "which is no subclass of pore.families.Family."
            )
        kinds.append(kind)
    return {model_type: kind() for kind in kinds for model_type in kind.model_types}


def family_of(model: nn.Module) -> Family:
    """The adapter for a model.

    Args:
        model: A model of transformers.

    Returns:
        The adapter.

    Raises:
        UnsupportedModelError: pore does not know the model; the message lists those it does.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    found = families().get(str(model_type))
    if found is not None:
        return found
    known = ", ".join(f"{kind.name} ({name})" for name, kind in sorted(families().items()))
    what = f"{type(model).__name__} (model_type {model_type!r})"
    if config is not None and not hasattr(config, "vision_config"):
        raise UnsupportedModelError(
            f"{what} has no vision tower, so there are no visual tokens to prune. "
            f"Families that pore knows: {known}."
        )
    raise UnsupportedModelError(
        f"pore does not know {what}. Families that it knows: {known}. "
        "docs/adding-a-family.md says how to describe another."
    )


def identity(model: nn.Module) -> dict[str, Any]:
    """What names a checkpoint, for a position bias to say where it was measured.

    A local folder is known by its last part only, so that nothing of the machine is told.

    Args:
        model: A model of transformers.

    Returns:
        `model`, the hub id, folder name or "embedded" (None for a model that was not loaded), and
        `revision`, the commit on the hub where that is known.
    """
    config: Any = model.config
    name = getattr(config, "name_or_path", "") or None
    if name is not None and Path(name).is_dir():
        path = Path(name).resolve()
        name = "embedded" if path == Path(embedded_model()).resolve() else path.name
    return {"model": name, "revision": commit(config)}
