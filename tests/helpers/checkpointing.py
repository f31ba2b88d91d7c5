"""Gradient checkpointing, by the names that this transformers has for it."""

from __future__ import annotations

from typing import Any


def turn_on(model: Any, **how: Any) -> None:
    """Turn gradient checkpointing on; `how` is passed to `torch.utils.checkpoint.checkpoint`."""
    _named(model, "enable")(how or None)


def turn_off(model: Any) -> None:
    _named(model, "disable")()


def _named(model: Any, what: str) -> Any:
    """transformers 5.24 calls it activation checkpointing, and says that the other name goes."""
    newer = getattr(model, f"activation_checkpointing_{what}", None)
    return newer or getattr(model, f"gradient_checkpointing_{what}")
