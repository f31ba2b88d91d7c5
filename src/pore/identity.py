"""Identifies a model or a picture by its content, because another one can have the same name.

A model is its weights and its config. The fingerprint of weights depends on every byte of them: if
one weight changes, it always changes; if more do, it stays the same only with a chance of about
2⁻⁶⁴. It is the same on every device, and for weights that accelerate has offloaded. How attention
is computed, and settings that only shape the output, do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pore._compat.modules import unwrapped
from pore._compat.weights import adapter_states, commit, loaded_weights, plain_parts, version_of
from pore._files import open_regular
from pore._images import open_image
from pore._videos import Video, VideoFile
from pore.embedded import EMBEDDED, EMBEDDED_VIDEO, embedded_model, embedded_video_model

# The folder of a model in the cache of the hub.
_CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([^/]+)$")

_BLOCK = 1 << 15
"""How many words of 8 bytes are summed into one."""

# Number of blocks at a time: as many as a CPU's cache holds, or enough to keep a GPU busy.
_AT_A_TIME = {"cpu": 4, "cuda": 512}


# Odd numbers with random-looking bits, as int64: multiplying by one can be undone, so two words
# never give the same product, and every bit spreads over the whole word.
_KEY, _FIRST, _SECOND = 0x1E3779B97F4A7C15, 0x7F51AFD7ED558CCD, 0x44CEB9FE1A85EC53


# Settings that do not change what the model computes from its inputs, or that show elsewhere: in
# the weights (the number format, quantisation) or in the generation config (what ends an answer).
_IRRELEVANT = frozenset(
    (
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)


class _Mark(NamedTuple):
    """Stays equal as long as a tensor does not change.

    Attributes:
        tensor: The tensor object.
        version: How often it was changed, as PyTorch counts.
        address: Where its data lies.
    """

    tensor: weakref.ref[Tensor]
    version: int
    address: int


_known: weakref.WeakKeyDictionary[nn.Module, tuple[list[_Mark], str | None]] = (
    weakref.WeakKeyDictionary()
)


def weights_of(model: nn.Module) -> str | None:
    """The fingerprint of a model's weights: number formats and a digest, as "bfloat16:5f3c...".

    It covers the names, number formats, shapes and bytes of all parameters and saved buffers, and
    which adapters are active. So weights converted to another format have another fingerprint.

    A model's weights are read once, and again when PyTorch has counted a change of one. It does not
    count changes through `.data`, nor changes of offloaded weights: `forget` such a model.

    Args:
        model: A model of transformers, which may be wrapped by torch.compile or peft.

    Returns:
        The fingerprint, or None if weights exist only on the meta device.
    """
    model = unwrapped(model)
    marks = _marks(model)
    before, fingerprint = _known.get(model, (None, None))
    if marks is None or before is None or not _unchanged(before, marks):
        fingerprint = _read(model)
        if marks is not None:
            _known[model] = marks, fingerprint
    adapters = adapter_states(model)
    if fingerprint is None or not adapters:
        return fingerprint
    formats, _, digest = fingerprint.partition(":")
    return f"{formats}:{_digest(digest, adapters)}"


def forget(model: nn.Module) -> None:
    """Let the weights of a model be read again when its fingerprint is next asked for.

    Args:
        model: The model.
    """
    _known.pop(unwrapped(model), None)


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints can belong to the same weights.

    With different number formats they can: nothing tells how a checkpoint was converted.

    Args:
        one: A fingerprint from `weights_of`.
        other: Another one.
    """
    return one == other or one.partition(":")[0] != other.partition(":")[0]


def config_of(model: nn.Module) -> dict[str, Any]:
    """The settings in a model's config that decide what it computes.

    Args:
        model: A model of transformers.

    Returns:
        Values as JSON holds them, by a name such as "text_config.rope_parameters.rope_theta".
    """
    config: Any = unwrapped(model).config
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    return dict(sorted(_flat(settings)))


def names_of(model: nn.Module) -> dict[str, str | None]:
    """The names of a checkpoint.

    Of a local folder only the last part is given, so that nothing about the machine is revealed.

    Args:
        model: A model of transformers.

    Returns:
        `model`, the hub id, folder name, "embedded" or "embedded-video" (None for a model that was
        not loaded), and
        `revision`, the commit on the hub if it is known: transformers from 5.18 on does not note
        it, but `pore.data.loading.load_model` does.
    """
    config: Any = model.config
    name, revision = getattr(config, "name_or_path", "") or None, commit(config)
    if name is not None and Path(name).is_dir():
        path = Path(name).resolve()
        shipped = {embedded_model(): EMBEDDED, embedded_video_model(): EMBEDDED_VIDEO}
        names = {Path(folder).resolve(): known for folder, known in shipped.items()}
        name = names.get(path, path.name)
        cached = _CACHED.search(path.as_posix())
        if cached:
            owner, repository, snapshot = cached.groups()
            name, revision = f"{owner}/{repository}", revision or snapshot
    return {"model": name, "revision": revision}


def identity(model: nn.Module) -> dict[str, Any]:
    """Identifies a model, so that a position bias, a calibration or answers can say their origin.

    Args:
        model: A model of transformers.

    Returns:
        What `names_of` returns, and `weights`, a fingerprint, and `config`, settings; see
        `weights_of` and `config_of`.
    """
    return {**names_of(model), "weights": weights_of(model), "config": config_of(model)}


def at_hand(model: nn.Module) -> dict[str, Any]:
    """The same for `PositionBias.check`, which computes the content only if it is needed."""
    return {
        **names_of(model),
        "weights": partial(weights_of, model),
        "config": partial(config_of, model),
    }


def picture_of(image: Any) -> str:
    """The fingerprint of a picture: of a file's bytes, or of the visible pixels of a loaded image.

    That of a video is of the pixels of its frames, and of when they were.

    Args:
        image: As in `Sample.image`.

    Returns:
        A digest; or a word ("none", "unreadable") if no picture can be read, so that a repaired
        picture counts as another one.
    """
    if image is None:
        return "none"
    if isinstance(image, VideoFile):
        files = sorted(image.path.iterdir()) if image.path.is_dir() else [image.path]
        parts = f"{image.frames} " + "".join(f"{file.name} {_file(file)} " for file in files)
        return hashlib.blake2b(os.fsencode(parts), digest_size=16).hexdigest()
    if isinstance(image, Video):
        times = f"{image.numbers} {image.rate} ".encode()
        frames = "".join(map(picture_of, image.frames)).encode()
        return hashlib.blake2b(times + frames, digest_size=16).hexdigest()
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).hexdigest()
    if isinstance(image, (str, os.PathLike)):
        return _file(Path(image))
    try:
        seen = open_image(image)
    except Exception:  # decoders of damaged files raise all kinds of errors
        return "unreadable"
    head = f"{seen.size} ".encode()
    return hashlib.blake2b(head + seen.tobytes(), digest_size=16).hexdigest()


def _file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_regular(path) as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError:
        return "unreadable"
    return digest.hexdigest()


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if name in _IRRELEVANT or name.startswith("_"):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def _marks(model: nn.Module) -> list[_Mark] | None:
    """The marks of all weights; None if PyTorch does not count changes of one of them."""
    marks = []
    for tensors in (model.parameters(), model.buffers()):
        for part in (part for tensor in tensors for part in plain_parts(tensor)):
            version = version_of(part)
            if version is None:
                return None
            marks.append(_Mark(weakref.ref(part), version, part.data_ptr()))
    return marks


def _unchanged(before: list[_Mark], marks: list[_Mark]) -> bool:
    return len(before) == len(marks) and all(
        one.tensor() is other.tensor() and one[1:] == other[1:]
        for one, other in zip(before, marks, strict=True)
    )


def _read(model: nn.Module) -> str | None:
    digest = hashlib.blake2b(digest_size=16)
    formats: set[str] = set()
    # Tied weights have several names, and are read once. Offloaded ones come and go, so the id of
    # one that is gone may belong to another by now.
    seen: dict[int, tuple[weakref.ref[Tensor], bytes]] = {}
    for name, tensor in loaded_weights(model):
        parts = plain_parts(tensor)
        if any(part.device.type == "meta" for part in parts):
            return None
        known = seen.get(id(tensor))
        if known is None or known[0]() is not tensor:
            known = seen[id(tensor)] = weakref.ref(tensor), b"".join(map(_content, parts))
        kinds = [str(part.dtype).removeprefix("torch.") for part in parts]
        formats.update(kinds)
        head = json.dumps([name, kinds, [list(part.shape) for part in parts]])
        digest.update(head.encode() + b"\0" + known[1])
    return f"{'+'.join(sorted(formats))}:{digest.hexdigest()}"


@torch.no_grad()
def _content(tensor: Tensor) -> bytes:
    """A few bytes that stand for a tensor's bytes, whatever its device and strides."""
    data = tensor.detach()
    if data.device.type not in _AT_A_TIME:  # other devices may lack integers of 64 bits
        data = data.cpu()
    data = data.contiguous().reshape(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    tail = bytes(data[whole:].tolist())
    words = data[:whole]
    words = (words.clone() if words.storage_offset() % 8 else words).view(torch.int64)
    keys = torch.arange(1, _BLOCK + 1, device=words.device) * _KEY
    blocks = words[: len(words) // _BLOCK * _BLOCK].view(-1, _BLOCK)
    step = _AT_A_TIME[words.device.type]
    sums: list[int] = []
    for start in range(0, len(blocks), step):
        sums += _mixed(blocks[start : start + step], keys).tolist()
    rest = words[blocks.numel() :]
    sums.append(int(_mixed(rest, keys[: len(rest)])))
    return struct.pack(f"<{len(sums)}q", *sums) + tail


def _mixed(words: Tensor, keys: Tensor) -> Tensor:
    """The sum, modulo 2⁶⁴, of words that are mixed with their places by reversible steps."""
    mixed = words + keys
    mixed *= _FIRST
    mixed ^= (mixed >> 32) & 0xFFFFFFFF
    mixed *= _SECOND
    mixed ^= (mixed >> 29) & 0x7FFFFFFFF
    return mixed.sum(-1)


def _digest(*values: Any) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
