"""Weights in few bits: what transformers quantises while it loads a model, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pore.errors import InputError


@dataclass(frozen=True)
class _Kind:
    """A way to quantise weights.

    Attributes:
        package: The module that must be installed.
        config: Makes the config for transformers.
    """

    package: str
    config: Callable[[], Any]


def _bitsandbytes(**bits: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**bits)


def _quanto() -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# Those of bitsandbytes have the names that `transformers serve` gives them, and its settings.
_KINDS: Mapping[str, _Kind] = {
    "bnb-8bit": _Kind("bitsandbytes", lambda: _bitsandbytes(load_in_8bit=True)),
    "bnb-4bit": _Kind(
        "bitsandbytes",
        lambda: _bitsandbytes(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    ),
    "torchao-int8": _Kind("torchao", _torchao),
    "quanto-int8": _Kind("optimum.quanto", _quanto),
}

QUANTIZED = tuple(_KINDS)
"""Names of the ways to quantise weights."""


def quantization(name: str, config: Any) -> Any:
    """What transformers is to quantise a model's weights by.

    Args:
        name: One of `QUANTIZED`.
        config: The config of the checkpoint.

    Returns:
        The config of the quantisation.

    Raises:
        InputError: There is no such way, its library is not installed, or the checkpoint holds
            quantised weights already.
    """
    if name not in _KINDS:
        raise InputError(
            f"{name!r} is no way to quantise weights; choose from {', '.join(QUANTIZED)}."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            "The weights of this checkpoint are quantised already; load it without quantising "
            f"them again ({name})."
        )
    kind = _KINDS[name]
    for package in (kind.package, "accelerate"):
        need(package, f"Quantising weights ({name})")
    return kind.config()


def need(package: str, what: str) -> None:
    """Refuse to go on without a package of the extra `interop`.

    Args:
        package: The module.
        what: What needs it, as the beginning of a sentence.

    Raises:
        InputError: It is not installed.
    """
    try:
        found = find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it is not there
        found = False
    if not found:
        raise InputError(f"{what} needs {package}: pip install 'pore-vlm[interop]'.")
