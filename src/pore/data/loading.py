"""A model and its processor by name: a hub id, a folder, `embedded` or `embedded-video`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from pore._compat.models import of_layers
from pore._compat.videos import load_processor
from pore._compat.weights import note_commit
from pore.data.quantizing import need, quantization
from pore.embedded import EMBEDDED, EMBEDDED_VIDEO, embedded_model, embedded_video_model
from pore.errors import InputError, UnsupportedModelError
from pore.families.registry import families

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of accelerate to spread a model over the devices that there are."""

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
"""Names of number formats; "auto" is that of the checkpoint, float32 on a CPU."""


def resolve(name: str) -> str:
    """What transformers is to load a model from: the path of a shipped one, or the name itself."""
    shipped = {EMBEDDED: embedded_model, EMBEDDED_VIDEO: embedded_video_model}
    return shipped[name]() if name in shipped else os.path.expanduser(name)


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn: str | None = None,
    revision: str | None = None,
    layers: int | None = None,
    device_map: str | None = None,
    quantize: str | None = None,
) -> tuple[Any, Any]:
    """Load a supported model, ready to evaluate, and its processor.

    Args:
        name: Hub id, folder, "embedded" or "embedded-video".
        device: Such as "cpu", "cuda:1" or "mps"; "auto" takes the accelerator, if there is one.
        dtype: One of `DTYPES`.
        attn: Attention implementation, such as "sdpa", "flash_attention_2" or "eager"; None is
            the choice of transformers.
        revision: Branch, tag or commit on the hub. The commit is noted in the model's config, for
            `pore.identity.names_of`.
        layers: Decoder layers to load, from the first; None loads all. A model of fewer does not
            answer, but methods choose in it.
        device_map: In place of `device`, one of `DEVICE_MAPS`: accelerate spreads the model over
            all accelerators and, where they are too small for it, the memory of the CPU.
        quantize: One of `pore.data.quantizing.QUANTIZED`: the weights are brought to few bits
            while they are loaded; None leaves them as they are.

    Returns:
        The model, in evaluation mode on the device, and the processor.

    Raises:
        UnsupportedModelError: The model is of no family that pore knows.
        InputError: There is no such device, number format or quantisation, a library for them is
            not installed, or transformers cannot load the model so.
        OSError: There is no such model.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    check_dtype(dtype)
    target = choose_device(device)
    check_device_map(device_map, device)
    path = resolve(name)
    config = known_config(name, revision)  # before gigabytes are loaded
    special: Any = {} if layers is None else {"config": of_layers(config, layers)}
    if quantize is not None:
        special["quantization_config"] = quantization(quantize, config)
        device_map = device_map or str(target)  # a quantised model is loaded where it stays
    if dtype == "auto" and target.type == "cpu":
        dtype = "float32"
    disable_progress_bar()
    try:
        with nullcontext() if layers is None else _without_warnings():
            model = AutoModelForImageTextToText.from_pretrained(
                path,
                **special,
                revision=revision,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attn,
                device_map=device_map,
            )
        if device_map is None:
            model = model.to(target)
        processor = load_processor(path, revision)
        if found := _commit(path, revision):
            note_commit(model.config, found)
    except (ImportError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"transformers cannot load {name!r} as asked: {error}") from error
    return model.eval(), processor


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Loading does not warn of weights that the model has no place for, which is on purpose."""
    from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


def _commit(path: str, revision: str | None) -> str | None:
    """The commit that a model on the hub was loaded from; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.isdir(path):
        return None
    found = try_to_load_from_cache(path, "config.json", revision=revision)
    # In the cache, a file lies in the folder of its commit, whichever branch or tag was requested.
    return os.path.basename(os.path.dirname(found)) if isinstance(found, str) else revision


def known_config(name: str, revision: str | None) -> Any:
    """The config of a checkpoint, refused where pore knows no family for it.

    Args:
        name: Hub id, folder, "embedded" or "embedded-video".
        revision: Branch, tag or commit on the hub.

    Raises:
        UnsupportedModelError: It is of no family that pore knows.
        InputError: It cannot be read.
        OSError: There is no such model.
    """
    config = load_config(name, revision=revision)
    if config.model_type not in families():  # `pore models` lists what is known
        raise UnsupportedModelError(
            f"{name!r} is a {config.model_type!r} model, which pore does not know. It knows: "
            f"{', '.join(sorted(families()))}. To describe another takes a few lines: see "
            "docs/adding-a-family.md."
        )
    return config


def load_outline(name: str) -> tuple[Any, Any]:
    """A model without weights, whose images can be counted, and its processor.

    Args:
        name: Hub id, folder, "embedded" or "embedded-video".

    Returns:
        The model, on the device "meta", and the processor.

    Raises:
        UnsupportedModelError: The model is of no family that pore knows.
        InputError: transformers cannot make it.
        OSError: There is no such model.
    """
    from transformers import AutoModelForImageTextToText

    config = known_config(name, None)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        return model, load_processor(resolve(name))
    except (ImportError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"transformers cannot make {name!r}: {error}") from error


def load_config(name: str, *, revision: str | None = None) -> Any:
    """The configuration of a model.

    Args:
        name: Hub id, folder, "embedded" or "embedded-video".
        revision: Branch, tag or commit on the hub.

    Returns:
        The configuration, of any model that transformers knows.

    Raises:
        InputError: It cannot be read.
        OSError: There is no such model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(name), revision=revision)
    except (KeyError, ValueError) as error:
        raise InputError(f"The configuration of {name!r} cannot be read: {error}") from error


def check_dtype(name: str) -> None:
    """Refuse a name that is not in `DTYPES`.

    Args:
        name: The name of a number format.

    Raises:
        InputError: Says which there are.
    """
    if name not in DTYPES:
        raise InputError(f"{name!r} is not a number format; choose from {', '.join(DTYPES)}.")


def check_device_map(name: str | None, device: str) -> None:
    """Refuse a device map that is not in `DEVICE_MAPS`, or that comes with a device.

    Args:
        name: The device map; None where there is none.
        device: The device.

    Raises:
        InputError: Says which there are, that both were given, or that accelerate is missing.
    """
    if name is None:
        return
    if name not in DEVICE_MAPS:
        raise InputError(
            f"{name!r} is not a device map; choose from {', '.join(DEVICE_MAPS)}. For a single "
            "device name it as the device (--device)."
        )
    if device != "auto":
        raise InputError(
            f"The device {device!r} and the device map {name!r} both say where the model goes; "
            "give one of them."
        )
    need("accelerate", f"A device map ({name})")


def choose_device(name: str) -> Any:
    """A device by name.

    Args:
        name: Such as "cpu", "cuda:1" or "mps"; "auto" takes the accelerator, if there is one.

    Returns:
        The `torch.device`.

    Raises:
        InputError: There is no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"There is no device {name!r} here: {error}") from error
    return device
