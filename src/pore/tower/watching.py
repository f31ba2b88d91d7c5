"""Noting what the vision tower does not get: how images are cut into tiles, and the prompt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pore._compat.arguments import IDS, MASK
from pore._compat.models import ENCODE_IMAGES, ENCODE_VIDEOS
from pore._compat.modules import CALL
from pore.changes import Changes
from pore.families.base import Family
from pore.layout import Tiling


def watch_tiling(
    changes: Changes,
    model: nn.Module,
    family: Family,
    note: Callable[[Sequence[Tiling], bool], None],
    done: Callable[[], None],
) -> None:
    """Note how images and videos are cut into tiles, whenever a model encodes some.

    The sizes that determine this are arguments of `get_image_features` only, and `generate` calls
    that function before it calls the model.

    Args:
        changes: What undoes this.
        model: The model.
        family: Its adapter, which says by `encodes` and `encodes_videos` whether there is
            something to tell.
        note: Called before every encoding with the tilings, and whether they are of videos.
        done: Called after it, also if it failed.
    """
    base: Any = family.base(model)
    encoding = False  # some models encode videos by the function that is for images

    def watch(name: str, tilings: Callable[..., Sequence[Tiling]], videos: bool) -> None:
        encode = getattr(base, name)

        @functools.wraps(encode)  # `generate` reads the signature
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal encoding
            if encoding:
                return encode(*args, **kwargs)
            bound = inspect.signature(encode).bind_partial(*args, **kwargs)
            named = dict(bound.arguments)
            named.update(named.pop("kwargs", {}))
            note(tilings(model, named), videos)
            try:
                encoding = True
                return encode(*args, **kwargs)
            finally:
                encoding = False
                done()

        changes.put(base, name, watched)

    if family.encodes:
        watch(ENCODE_IMAGES, family.tilings, False)
    if family.encodes_videos:
        watch(ENCODE_VIDEOS, family.video_tilings, True)


def watch_prompt(
    changes: Changes,
    model: nn.Module,
    family: Family,
    note: Callable[[Tensor | None, Any], None],
) -> None:
    """Note the token ids and the mask of a prompt before its images are encoded.

    `generate` encodes images before it calls the model, without passing token ids.

    Args:
        changes: What undoes this.
        model: The model.
        family: Its adapter.
        note: Called with the ids (B, L), or None, and the attention mask as it was given, before a
            prompt; and with None and None after it.
    """
    base = family.base(model)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = family.inputs(model, args, kwargs)
        note(inputs.get(IDS), inputs.get(MASK))

    call = getattr(base, CALL)

    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        finally:
            note(None, None)

    changes.before(base, before, with_kwargs=True)
    changes.put(base, CALL, called)
    generate: Any = getattr(model, "generate", None)
    if generate is not None:

        @functools.wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            ids = args[0] if args else kwargs.get("inputs")
            try:
                note(kwargs.get(IDS) if ids is None else ids, kwargs.get(MASK))
                return generate(*args, **kwargs)
            finally:
                note(None, None)

        changes.put(model, "generate", watched)
