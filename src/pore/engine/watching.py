"""Watching a model that nothing is dropped of: the stages of a method read, and that is all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pore.engine.pruner import Pruner
from pore.engine.readers import LayerAttention
from pore.engine.run import Run
from pore.engine.stages import Selection, Stage, View
from pore.families.registry import family_of
from pore.layout import Layout


class Watcher(Pruner):
    """A pruner that keeps everything, and tells what its stages read.

    Args:
        name: The method that the stages are of, for messages.
        stages: Stages with a reader; of their rules, nothing is used.
        told: Called with the number of a stage, the attention of its layer, and what its reader
            took from that.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[Stage],
        told: Callable[[int, LayerAttention, Any], None],
    ) -> None:
        self._name = name
        self._stages = stages
        self._told = told

    @property
    def name(self) -> str:  # type: ignore[override] # no string, so that it is not registered
        return self._name

    def stages(self) -> list[Stage]:
        return [
            replace(stage, rule=keep_all, attention=partial(self._read, number), padding=False)
            for number, stage in enumerate(self._stages)
        ]

    def _read(self, number: int, attention: LayerAttention) -> Any:
        reader = self._stages[number].attention
        assert reader is not None
        found = reader(attention)
        self._told(number, attention, found)
        return found


def keep_all(view: View) -> Selection:
    """The rule of a stage that drops nothing."""
    return Selection(view.layout.valid)


@torch.inference_mode()
def read_stages(
    model: nn.Module, inputs: Mapping[str, Any], name: str, stages: Sequence[Stage]
) -> tuple[Layout, list[Any]]:
    """What stages read of a batch in the unpruned model, computing nothing that comes after.

    Of the last layer that is read, the attention itself, the output projection and the MLP do not
    run, nor do later layers, the final norm and the head. PyTorch lets a hook leave a forward by an
    exception only; a decoder cut short would still run the whole of its last layer.

    Args:
        model: A supported model that is not pruned; it is left as it was.
        inputs: What the processor makes, on the model's device, every prompt with an image.
        name: The method that the stages are of, for messages.
        stages: Stages with a reader, at least one.

    Returns:
        The layout of the batch, and what the reader of every stage took.

    Raises:
        InputError: A prompt ends with an image.
    """
    found: dict[int, Any] = {}
    layout: Layout | None = None

    def told(number: int, attention: LayerAttention, read: Any) -> None:
        nonlocal layout
        layout, found[number] = attention.layout, read
        if len(found) == len(stages):
            raise _AllRead

    with Run(Watcher(name, stages, told), model, history=1), suppress(_AllRead):
        family_of(model).base(model)(**inputs, use_cache=False)
    assert layout is not None
    return layout, [found[number] for number in range(len(stages))]


class _AllRead(Exception):
    """Leaves a forward once the last stage has read."""
