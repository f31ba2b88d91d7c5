"""Calibrating: from a model and samples to a position bias."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from pore.calibration.host import HostCalibration
from pore.calibration.passes import _Reader, _through
from pore.calibration.sums import Calibration
from pore.engine.pruner import Pruner
from pore.engine.readers import LayerAttention
from pore.engine.run import Run, unpruned
from pore.engine.stages import Selection, Stage, View
from pore.errors import CalibrationError, InputError
from pore.families.registry import family_of
from pore.layout import Image, Layout
from pore.methods.fastv import FastV
from pore.methods.guides import GUIDE, GUIDED, Guide
from pore.methods.guiding import guide
from pore.tensors.attention import Normalize

if TYPE_CHECKING:
    from pore.data.samples import Sample


@overload
def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    layer: int,
    *,
    normalize: Normalize | None = None,
    batch_size: int = 8,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    max_bad: float = 0.01,
    progress: bool = True,
    limit: int | None = None,
    source: str | None = None,
) -> Calibration: ...


@overload
def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    *,
    host: Pruner,
    batch_size: int = 8,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    max_bad: float = 0.01,
    progress: bool = True,
    limit: int | None = None,
    source: str | None = None,
) -> HostCalibration: ...


def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    layer: int | None = None,
    *,
    host: Pruner | None = None,
    normalize: Normalize | None = None,
    batch_size: int = 8,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    max_bad: float = 0.01,
    progress: bool = True,
    limit: int | None = None,
    source: str | None = None,
) -> Calibration | HostCalibration:
    """Average over samples what a host method divides by P (arXiv 2508.17807, Eq. 3).

    For `layer`, the text-visual attention of layer K − 1, as FastV ranks by it. For another `host`,
    what each of its stages ranks by, all stages in one pass over the unpruned model:

        biases = pore.calibrate(model, processor, samples, host=host).fit()

    Runs the vision tower and the decoder as far as the last attention read, on the model's device
    and in its dtype. The model is left as it was, also by an exception or an interruption.

    With `checkpoint`, the state is written whole every `every` samples and whenever the pass ends,
    by whatever end. The same call then goes on where it stopped and gives the same result. It is
    the same where the weights, the config, the processor and the template are, and where samples
    have the same pictures, questions and ids, wherever they lie and whatever they are called.

    Args:
        model: A supported vision-language model of transformers, not pruned.
        processor: Its processor, with the settings and the chat template of later use.
        samples: Samples with an image each, in an order that is the same at every call.
        layer: K, the 0-based layer that will be the first pruned one: short for
            `host=FastV(layer=K, normalize=normalize)`.
        host: The method that P is for, with the settings of later use; give it or `layer`. Its
            budget counts only where its stages depend on it, and its `reweight` not at all.
        normalize: With `layer`, what the softmax runs over: the whole "prompt" (as if left out) or
            the "visual" tokens of the image. Prune with the same.
        batch_size: Samples in one forward.
        checkpoint: JSON file of the state, read if it is there. The result's `load` reads it.
        every: Samples between two checkpoints, rounded up to whole batches.
        max_bad: The share of bad samples (no readable image, refused by the processor, attention
            not finite) up to which they are skipped.
        progress: Whether to show progress, rate and time left where stderr is a terminal.
        limit: At most so many samples, from the first.
        source: The data set, for the provenance.

    Returns:
        The sums over all good images, with the bad samples listed: one `Calibration` for a layer,
        for a host one for each of its stages.

    Raises:
        UnsupportedModelError: The model is of no family that pore knows, or has no images.
        ModelStateError: The model is pruned.
        BudgetError: `layer`, or a layer of the host, is out of range.
        InputError: The processor has no chat template, or the host does not rank by attention.
        CalibrationError: An argument is out of range; more than `max_bad` of the samples are bad,
            or all; images have different grids; the host reads what is no attention; the
            checkpoint is damaged, or (`StaleCheckpointError`) of other conditions or samples.
        ScoreError: `normalize` is unknown, or attention is NaN or infinite from the start.
        KeyboardInterrupt: Passed on, with a message that says how to go on.
    """
    if (layer is None) == (host is None):
        raise CalibrationError("Say what to calibrate for: either a layer or a host method.")
    model = unpruned(model)
    family = family_of(model)
    if host is None:
        host = FastV(keep=1.0, layer=cast(int, layer), normalize=normalize or "prompt")
    elif normalize is not None:
        raise CalibrationError(f"What is normalised is up to {host.name}; leave normalize away.")
    host = _plain(host)
    host.check(model, family)
    measured = _measured(host)
    layers = " or ".join(str(probed) for probed, _ in measured)
    state = _through(
        model,
        processor,
        samples,
        reader=_Reader(host.name, f"decoder layer {layers}", partial(attention_rows, host=host)),
        stages=[{"layer": probed + 1, "normalize": word} for probed, word in measured],
        batch_size=batch_size,
        checkpoint=checkpoint,
        every=every,
        max_bad=max_bad,
        progress=progress,
        limit=limit,
        source=source,
    )
    return state if layer is None else state.stages[0]


def calibrate_guide(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    max_bad: float = 0.01,
    progress: bool = True,
    limit: int | None = None,
    source: str | None = None,
) -> Calibration:
    """Average over samples what SGL divides by P: `Guide.importance` of the model that guides.

        bias = pore.calibrate_guide(small, processor, samples, max_new_tokens=32).fit()
        pruner = pore.SGL(keep=64, layer=12, guide=guide, reweight=bias)

    The model answers every sample. All else is as in `calibrate`.

    Args:
        model: The small vision-language model, not pruned.
        processor: As in `calibrate`.
        samples: As in `calibrate`.
        max_new_tokens: Longest answer, as the guides of later use have it. A checkpoint made with
            another is refused.
        batch_size: Samples that are answered together.
        checkpoint: As in `calibrate`.
        every: As in `calibrate`.
        max_bad: As in `calibrate`; attention that is not finite is an error at once.
        progress: As in `calibrate`.
        limit: As in `calibrate`.
        source: As in `calibrate`.

    Returns:
        The sums over all good images, with the bad samples listed.

    Raises:
        UnsupportedModelError: The model is of no family that pore knows, or has no images.
        ModelStateError: The model is pruned.
        InputError: The processor has no chat template.
        CalibrationError: As in `calibrate`.
        ScoreError: Attention holds NaN or infinity.
        KeyboardInterrupt: Passed on, with a message that says how to go on.
    """

    def read(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Guide, tuple[Tensor, ...]]:
        _check_images(inputs["input_ids"], family_of(model).images(model, inputs))
        made = guide(model, inputs, max_new_tokens=max_new_tokens)
        return made, (made.importance,)

    return _through(
        unpruned(model),
        processor,
        samples,
        reader=_Reader(GUIDED, "the model that guides", read),
        stages=[{"normalize": GUIDE}],
        batch_size=batch_size,
        checkpoint=checkpoint,
        every=every,
        max_bad=max_bad,
        progress=progress,
        limit=limit,
        source=source,
        settings=f"answers of {max_new_tokens}",
    ).stages[0]


def _plain(host: Pruner) -> Pruner:
    """The host without a bias of its own, if it ranks by attention."""
    if not host.reweightable:
        known = ", ".join(name for name, kind in Pruner.registry.items() if kind.reweightable)
        raise InputError(
            f"{host.name} does not rank by text-visual attention, so it has no position bias to "
            f"measure; calibrate for one of {known}."
        )
    return replace(host, reweight=None)  # type: ignore[type-var]


def attention_stages(host: Pruner) -> list[Stage]:
    """The stages of a host whose reading a position bias divides.

    Args:
        host: A method.

    Returns:
        The stages, in their order.

    Raises:
        CalibrationError: There is none.
    """
    stages = [s for s in host.stages() if isinstance(s, Stage) and hasattr(s.attention, "measures")]
    if not stages:
        raise CalibrationError(
            f"With these settings {host.name} reads no attention of the model that it prunes, so "
            "there is nothing to measure here. For SGL, calibrate the model that guides with "
            "pore.calibrate_guide; for others, fit P to the mean of what they rank by, with "
            "PositionBias.fit."
        )
    return stages


def _measured(host: Pruner) -> list[tuple[int, str]]:
    """The layer that every stage reads, and the word for what it takes from it."""
    return [(cast(int, s.reads_layer), s.attention.measures) for s in attention_stages(host)]  # type: ignore[union-attr]


class _Onlooker(Pruner):
    """A host that drops nothing: its stages read and note what they would divide by P."""

    def __init__(self, host: Pruner) -> None:
        self.host = host
        self.layout: Layout | None = None
        self.found: dict[int, Tensor] = {}

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.host.name

    def stages(self) -> list[Stage]:
        return [
            replace(stage, rule=_keep_all, attention=partial(self._note, number), padding=False)
            for number, stage in enumerate(attention_stages(self.host))
        ]

    def _note(self, number: int, attention: LayerAttention) -> None:
        stages = attention_stages(self.host)
        stage = stages[number]
        assert stage.attention is not None
        read = stage.attention(attention)
        self.layout = attention.layout
        self.found[number] = read if stage.curve is None else stage.curve(read)
        if len(self.found) == len(stages):
            raise _Stop


def _keep_all(view: View) -> Selection:
    return Selection(view.layout.valid)


@torch.inference_mode()
def attention_rows(
    model: nn.Module, inputs: Mapping[str, Any], host: Pruner
) -> tuple[Layout, tuple[Tensor, ...]]:
    """What the stages of a host read of a batch, unpruned, computing nothing that comes after.

    Args:
        model: A supported model that is not pruned; it is left as it was.
        inputs: What the processor makes, on the model's device, every prompt with an image.
        host: A method that ranks by attention.

    Returns:
        The layout of the batch's I images, and for every stage their attention, (I, t), at least
        float32; of no meaning where the layout is not `valid`.

    Raises:
        InputError: A prompt has no image, or ends with one.
    """
    family = family_of(model)
    _check_images(inputs["input_ids"], family.images(model, inputs))
    onlooker = _Onlooker(host)
    with Run(onlooker, model, history=1), suppress(_Stop):
        family.base(model)(**inputs, use_cache=False)
    assert onlooker.layout is not None
    return onlooker.layout, tuple(onlooker.found[i] for i in range(len(onlooker.found)))


def _check_images(input_ids: Tensor, images: Sequence[Image]) -> None:
    """Refuse a prompt without an image."""
    without = set(range(len(input_ids))) - {image.row for image in images}
    if without:
        raise InputError(f"The prompt of sample {min(without)} has no image to look at.")


class _Stop(Exception):
    """Ends a forward once the attention is known."""
