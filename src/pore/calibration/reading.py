"""Reads from a model the attention that the stages of a method, or a guide's user, divide by P."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pore._compat.arguments import MASK
from pore.bias.where import Where
from pore.engine.pruner import Pruner
from pore.engine.readers import LastToken, LayerAttention
from pore.engine.stages import Stage
from pore.engine.watching import keep_all, read_stages
from pore.errors import CalibrationError, InputError
from pore.families.registry import images_of
from pore.layout import Image, Layout
from pore.methods.guides import GUIDE, GUIDED
from pore.methods.guiding import guide
from pore.tensors.attention import Normalize

RANKS_BY_A_LAYER = "FastV"
"""The host's name in files of a single layer: the method that ranks by one layer's attention."""


class Reading(NamedTuple):
    """What was read for a batch.

    Attributes:
        images: Its I images.
        valid: (I, t) bool, False where a smaller image is filled up.
        curves: For every stage, (I, t) numbers.
        distance: (I, t) tokens from every visual token to the last one of its prompt.
        place: (I, t, 2) relative row and column of every token; None without a grid.
        heads: For every stage, (I, H, t) the same for every head; None if not asked for.
    """

    images: Sequence[Image]
    valid: Tensor
    curves: Sequence[Tensor]
    distance: Tensor
    place: Tensor | None = None
    heads: Sequence[Tensor] | None = None

    @classmethod
    def of(
        cls, layout: Layout, curves: Sequence[Tensor], heads: Sequence[Tensor] | None = None
    ) -> Reading:
        """What was read for a batch with this layout."""
        where = Where(layout)
        try:
            place = where.place
        except InputError:
            place = None
        return cls(layout.images, layout.valid, curves, where.distance, place, heads)


class Reader(NamedTuple):
    """Reads the curves of a batch, for all stages at once.

    Attributes:
        host: Name of the method that they are for.
        where: Whose attention is read, in words.
        stages: For every stage, its fields of the provenance.
        settings: What else the curves depend on, in words.
        read: Reads a model with its inputs.
    """

    host: str
    where: str
    stages: Sequence[Mapping[str, Any]]
    settings: str
    read: Callable[[nn.Module, Mapping[str, Any]], Reading]


def stages_reader(host: str, stages: Sequence[Stage], heads: bool = False) -> Reader:
    """A reader of the attention that some stages divide by P.

    Args:
        host: Name of their method.
        stages: The stages, each with a reader that says what it `measures`.
        heads: Whether to read every head separately.

    Raises:
        CalibrationError: Heads are wanted, but a stage does not read the last token's attention.
    """
    if heads:
        _ = [_last_token(stage) for stage in stages]
    layers = [cast(int, stage.reads_layer) for stage in stages]
    return Reader(
        host,
        f"decoder layer {' or '.join(map(str, layers))}",
        [
            {"layer": layer + 1, "normalize": measured_by(stage)}
            for layer, stage in zip(layers, stages, strict=True)
        ],
        "heads" if heads else "",
        partial(_read_stages, name=host, stages=stages, heads=heads),
    )


def guide_reader(max_new_tokens: int) -> Reader:
    """A reader of the importance that a guide gives to visual tokens.

    Args:
        max_new_tokens: Longest answer of the guiding model.
    """

    def read(model: nn.Module, inputs: Mapping[str, Any]) -> Reading:
        _check_images(model, inputs)
        made = guide(model, inputs, max_new_tokens=max_new_tokens)
        tokens = inputs.get(MASK)
        if tokens is None:
            tokens = torch.ones_like(inputs["input_ids"])
        return Reading.of(Layout.of(made.images, tokens.bool()), [made.importance])

    whose, settings = "the guiding model", f"answers of {max_new_tokens}"
    return Reader(GUIDED, whose, [{"normalize": GUIDE}], settings, read)


def layer_stage(layer: int, normalize: Normalize = "prompt") -> Stage:
    """A stage that reads the attention of the last text token in `layer` − 1."""
    return Stage(layer, keep_all, LastToken(normalize))


def measured_by(stage: Stage) -> str | None:
    """The word for what a stage's reader measures; None if no position bias divides it."""
    return getattr(stage.attention, "measures", None)


def without_bias(host: Pruner) -> Pruner:
    """The host without its own bias, which would otherwise be divided out of what is read.

    Args:
        host: A method.

    Raises:
        InputError: The method does not rank by attention.
    """
    if not host.reweightable:
        known = ", ".join(name for name, kind in Pruner.registry.items() if kind.reweightable)
        raise InputError(
            f"{host.name} does not rank by text-visual attention, so it has no position bias to "
            f"measure; calibrate for one of {known}."
        )
    return replace(host, reweight=None)  # type: ignore[type-var]


def attention_stages(host: Pruner) -> list[Stage]:
    """The stages of a host that read attention which a position bias divides.

    Args:
        host: A method.

    Returns:
        The stages, in their order.

    Raises:
        CalibrationError: There is none.
    """
    stages = [s for s in host.stages() if isinstance(s, Stage) and measured_by(s) is not None]
    if not stages:
        raise CalibrationError(
            f"With these settings {host.name} reads no attention of the model that it prunes, or "
            "not in a layer that is known before, so there is nothing to measure here. For SGL, "
            "calibrate the guiding model with pore.calibrate_guide; for FrameFusion, FastV before "
            "the layer that it pruned (run.report); for others, fit P to the mean of what they "
            "rank by, with PositionBias.fit."
        )
    return stages


@torch.inference_mode()
def attention_rows(
    model: nn.Module, inputs: Mapping[str, Any], stages: Sequence[Stage], name: str = ""
) -> tuple[Layout, tuple[Tensor, ...]]:
    """What stages read for an unpruned batch; nothing after the last reading is computed.

    Args:
        model: A supported model that is not pruned; it is left as it was.
        inputs: The processor's output, on the model's device; every prompt has an image.
        stages: Stages that read attention.
        name: Their method, for messages.

    Returns:
        The layout of the batch's I images, and for every stage their attention, (I, t), at least
        float32; without meaning where the layout is not `valid`.

    Raises:
        InputError: A prompt has no image, or ends with one.
    """
    _check_images(model, inputs)
    layout, found = read_stages(model, inputs, name, stages)
    curves = (
        read if stage.curve is None else stage.curve(read)
        for stage, read in zip(stages, found, strict=True)
    )
    return layout, tuple(curves)


def _read_stages(
    model: nn.Module,
    inputs: Mapping[str, Any],
    name: str,
    stages: Sequence[Stage],
    heads: bool,
) -> Reading:
    if not heads:
        return Reading.of(*attention_rows(model, inputs, stages, name))
    told = [replace(stage, attention=_ByHead(_last_token(stage))) for stage in stages]
    layout, found = attention_rows(model, inputs, told, name)
    return Reading.of(layout, [each.mean(1) for each in found], found)


@dataclass(frozen=True)
class _ByHead:
    """Reads what `LastToken` averages over the heads."""

    reader: LastToken

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, H, t) attention of the last token."""
        return attention.weights(attention.last, normalize=self.reader.normalize)[:, :, 0]


def _last_token(stage: Stage) -> LastToken:
    if type(stage.attention) is not LastToken:
        raise CalibrationError(
            "Heads can be read separately if a method ranks by the attention of the last text "
            "token, as FastV and PyramidDrop do; this method reads something else. Leave heads out."
        )
    return stage.attention


def _check_images(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse a prompt without an image."""
    rows = {image.row for image in images_of(model, inputs)}
    without = set(range(len(inputs["input_ids"]))) - rows
    if without:
        raise InputError(f"The prompt of sample {min(without)} has no image to look at.")
