"""Makes models with random weights from a config, without touching the caller's random numbers.

`AutoModel.from_config` is public, but sets the data type and kernels of the whole model at once and
initialises every weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def seeded() -> Iterator[None]:
    """Seed torch's random generator of the CPU, and put its state back afterwards.

    `torch.manual_seed` would seed the generators of other devices too, and `fork_rng` restores only
    those that are named.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def from_config(
    kind: Any, config: Any, dtype: torch.dtype, attention: dict[str, str], experts: str | None
) -> Any:
    """A model of a class, with the random weights that its class initialises.

    The auto classes build a model with `_from_config`.

    Args:
        kind: The class of the model.
        config: Its config.
        dtype: Type of its weights.
        attention: The attention kernel of every part: "" for the whole, or a name of
            `sub_configs`.
        experts: The implementation of a mixture of experts; None leaves the choice to transformers.
    """
    return kind._from_config(
        config, dtype=dtype, attn_implementation=attention, experts_implementation=experts
    )


def experts_name(config: Any) -> str | None:
    """The implementation of a model's experts, such as "grouped_mm": `_experts_implementation`."""
    name: str | None = getattr(config, "_experts_implementation", None)
    return name


def random_model(kind: Any, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """A model whose parameters are left as they were allocated.

    The auto classes build a model with `_from_config`, in a dtype and with an attention kernel;
    `no_init_weights` saves the minutes that initialising 7B parameters takes.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return kind._from_config(config, dtype=dtype, attn_implementation=attention)
