"""The weights of a model as its checkpoint would hold them: offloaded, quantised, with adapters.

accelerate, torchao and peft each keep weights, or what changes them, where `parameters()` does not
show them, and none has a public function that reads them all. This file also knows where a config
keeps the commit of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def commit(config: Any) -> str | None:
    """The revision on the hub of a checkpoint, as its config was told.

    Up to transformers 5.17 `from_pretrained` writes it to `_commit_hash`; `note_commit` does so
    too. None if neither did.
    """
    found: str | None = getattr(config, "_commit_hash", None)
    return found


def note_commit(config: Any, revision: str) -> None:
    """Note in a config the revision it was loaded from; `to_dict` omits `_commit_hash`."""
    config._commit_hash = revision


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place: `_version`; None if it is not counted."""
    return None if tensor.is_inference() else tensor._version


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors in a tensor: itself, unless it wraps others, as quantised ones do.

    With `__tensor_flatten__` they tell torch.compile the names of these parts.
    """
    wrapped: Any = tensor
    if not hasattr(wrapped, "__tensor_flatten__"):
        return [tensor]
    names, _ = wrapped.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(wrapped, name))]


def execution_device(module: nn.Module) -> torch.device:
    """The device on which accelerate computes a module whose weights it has offloaded.

    `_hf_hook` is accelerate's hook on the module; its weights are on "meta" until it is called.
    """
    hooked: Any = module
    return torch.device(hooked._hf_hook.execution_device)


def loaded_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a checkpoint of a model would hold, by name; offloaded weights are read one by one.

    `_hf_hook` is accelerate's hook on a module whose weights it has offloaded; they are on "meta"
    until it is called.
    """
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            continue
        path, _, own = name.rpartition(".")
        if tensor.device.type != "meta" or not hasattr(model.get_submodule(path), "_hf_hook"):
            yield name, tensor
            continue
        from accelerate.utils import align_module_device, has_offloaded_params

        module = model.get_submodule(path)
        if not has_offloaded_params(module):
            yield name, tensor
            continue
        with align_module_device(module, torch.device("cpu")):
            yield name, getattr(module, own)


def adapter_states(model: nn.Module) -> list[Any]:
    """For every layer with peft adapters: which are active, and the weight of each."""
    found: list[Any] = []
    for name, module in model.named_modules():
        layer: Any = module
        # Models of transformers have methods of this name, layers of peft a property.
        if isinstance(off := getattr(layer, "disable_adapters", None), bool):
            scaling = {key: str(value) for key, value in getattr(layer, "scaling", {}).items()}
            found.append([name, off, list(layer.active_adapters), scaling])
    return found
