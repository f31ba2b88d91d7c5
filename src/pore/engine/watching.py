"""Watching a model without dropping anything: the stages of a method only read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore.engine.pruner import Pruner
from pore.engine.readers import LayerAttention
from pore.engine.run import Run
from pore.engine.stages import Selection, Stage, View
from pore.families.registry import family_of
from pore.layout import Layout


class Watcher(Pruner):
    """A pruner that keeps everything and reports what its stages read.

    Args:
        name: The method that the stages belong to, for messages.
        stages: Stages with a reader; their rules are not used.
        told: Called with the number of a stage, the attention of its layer, and the result of its
            reader.
        viewed: Called with the number of a stage and what its rule would see.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[Stage],
        told: Callable[[int, LayerAttention, Any], None] | None = None,
        viewed: Callable[[int, View], None] | None = None,
    ) -> None:
        self._name = name
        self._stages = stages
        self._told = told
        self._viewed = viewed

    @property
    def name(self) -> str:  # type: ignore[override] # no string, so that it is not registered
        return self._name

    def stages(self) -> list[Stage]:
        return [
            replace(
                stage,
                rule=partial(self._keep, number),
                attention=partial(self._read, number),
                padding=False,
            )
            for number, stage in enumerate(self._stages)
        ]

    def _keep(self, number: int, view: View) -> Selection:
        if self._viewed is not None:
            self._viewed(number, view)
        return keep_all(view)

    def _read(self, number: int, attention: LayerAttention) -> Any:
        reader = self._stages[number].attention
        assert reader is not None
        found = reader(attention)
        if self._told is not None:
            self._told(number, attention, found)
        return found


def keep_all(view: View) -> Selection:
    """The rule of a stage that drops nothing."""
    return Selection(view.layout.valid)


@torch.inference_mode()
def read_stages(
    model: nn.Module, inputs: Mapping[str, Any], name: str, stages: Sequence[Stage]
) -> tuple[Layout, list[Any]]:
    """Read a batch with the readers of stages in the unpruned model, and stop there.

    Of the last layer that is read, the attention itself, the output projection and the MLP do not
    run, nor do later layers, the final norm and the head. In PyTorch, a hook can leave a
    forward only by an exception; a decoder with fewer layers would still run its whole last layer.

    Args:
        model: A supported model that is not pruned; it is left as it was.
        inputs: The processor's output, on the model's device; every prompt has an image.
        name: The method that the stages belong to, for messages.
        stages: Stages with a reader, at least one.

    Returns:
        The layout of the batch, and the result of every stage's reader.

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


@torch.inference_mode()
def read_corrected(
    model: nn.Module, inputs: Mapping[str, Any], name: str, stage: Stage
) -> tuple[Layout, Tensor, Tensor]:
    """The attention by which a stage ranks, before and after its correction, in the unpruned model.

    Nothing after the stage is computed.

    Args:
        model: A supported model that is not pruned; it is left as it was.
        inputs: The processor's output, on the model's device; every prompt has an image.
        name: The method that the stage belongs to, for messages.
        stage: A stage that reads attention.

    Returns:
        The layout of the batch's I images; and their attention without the correction and with it,
        each (I, t), without meaning where the layout is not `valid`. Both are the same where the
        stage has no correction.

    Raises:
        InputError: A prompt ends with an image.
        ProfileMismatchError: The correction is for images of another number of tokens.
    """
    found: list[Tensor] = []
    layout: Layout | None = None

    def viewed(_: int, view: View) -> None:
        nonlocal layout
        layout = view.layout
        read = view.attention if stage.curve is None else stage.curve(view.attention)
        found.append(view.corrected(read))
        raise _AllRead

    # A correction may have the layer itself read otherwise, so that each needs a forward.
    for one in [stage] if stage.correction is None else [replace(stage, correction=None), stage]:
        watcher = Watcher(name, [one], viewed=viewed)
        with Run(watcher, model, history=1), suppress(_AllRead):
            family_of(model).base(model)(**inputs, use_cache=False)
    assert layout is not None
    return layout, found[0], found[-1]


class _AllRead(Exception):
    """Leaves a forward once the last stage has read."""
