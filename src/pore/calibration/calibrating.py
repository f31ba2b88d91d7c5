"""Calibration: from a model and samples to a position bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast, overload

from torch import nn
from typing_extensions import Unpack

from pore.calibration.host import HostCalibration
from pore.calibration.passes import Options, Pass
from pore.calibration.reading import (
    RANKS_BY_A_LAYER,
    attention_stages,
    guide_reader,
    layer_stage,
    stages_reader,
    without_bias,
)
from pore.calibration.sums import Calibration
from pore.data.samples import Sample
from pore.engine.limits import check_layer
from pore.engine.pruner import Pruner
from pore.engine.run import unpruned
from pore.errors import CalibrationError, check_options
from pore.families.registry import family_of
from pore.tensors.attention import Normalize


@overload
def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    layer: int,
    *,
    normalize: Normalize | None = None,
    heads: bool = False,
    **options: Unpack[Options],
) -> Calibration: ...


@overload
def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    *,
    host: Pruner,
    heads: bool = False,
    **options: Unpack[Options],
) -> HostCalibration: ...


def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    layer: int | None = None,
    *,
    host: Pruner | None = None,
    normalize: Normalize | None = None,
    heads: bool = False,
    **options: Unpack[Options],
) -> Calibration | HostCalibration:
    """Average over samples the attention that a host method divides by P (arXiv 2508.17807, Eq. 3).

    With `layer`, this is the text-visual attention of layer K − 1, by which FastV ranks. With a
    `host`, it is what each of its stages ranks by; one pass over the unpruned model reads all:

        biases = pore.calibrate(model, processor, samples, host=host).fit()

    Runs the vision tower and the decoder up to the last attention that is read, on the model's
    device and in its dtype. The model is left as it was, even after an exception or interruption.

    With `checkpoint`, the whole state is written every `every` samples and when the pass ends, for
    whatever reason. The same call then continues where it stopped and gives the same result. A call
    is the same if the weights, the config, the processor and the template are the same, and the
    samples have the same pictures, questions and ids; names of models and paths do not matter.

    Args:
        model: A supported vision-language model of transformers, not pruned.
        processor: Its processor, with the settings and the chat template that you will use later.
        samples: Samples with one image each, in an order that is the same in every call.
        layer: K, the 0-based layer that will be the first pruned one: short for
            `host=FastV(layer=K, normalize=normalize)`.
        host: The method that P is for, with the settings that you will use later; give either this
            or `layer`. Its budget matters only if its stages depend on it; its `reweight` is
            ignored.
        normalize: With `layer`, what the softmax runs over: the whole "prompt" (the default) or
            the "visual" tokens of the image. Prune with the same.
        heads: Whether to keep the sums of every head as well, for `fit_heads`. Only for methods
            that rank by the attention of the last token, and for images of one size.
        **options: How to go through the samples.

            batch_size: Samples in one forward.
            checkpoint: JSON file of the state, read if it is there. The result's `load` reads it.
            every: Samples between two checkpoints, rounded up to whole batches.
            max_bad: The share of bad samples (no readable image, refused by the processor,
                attention not finite) up to which they are skipped.
            progress: Whether to show progress, rate and time left where stderr is a terminal.
            limit: Use at most this many samples, from the first.
            source: The data set, for the provenance.
            distributed: Whether the processes of `torch.distributed`, each of which makes this
                call, share the samples. All get the same result, that of a single process; the
                first writes the checkpoint, after every `every` samples of each process.
            until: Asked after 100 samples, and whenever their number has grown by a quarter, with
                the `HostCalibration` so far; True ends the pass, as after the last sample.
            actors: `pore.calibration.actors.Actors` of Ray that measure the samples, each with the
                same model that it loads itself. The result is that of a single process.

    Returns:
        The sums over all good images, with the bad samples listed: one `Calibration` for a layer;
        for a host, one for each of its stages.

    Raises:
        UnsupportedModelError: pore does not know the model's family, or it takes no images.
        ModelStateError: The model is pruned.
        BudgetError: `layer`, or a layer of the host, is out of range.
        InputError: The processor has no chat template, or the host does not rank by attention.
        CalibrationError: An argument is out of range; more than `max_bad` of the samples are bad,
            or all; what the host reads is not attention, or not of separate heads; the checkpoint
            is damaged, or (`StaleCheckpointError`) was made with other conditions or samples.
        ScoreError: `normalize` is unknown, or attention is NaN or infinite from the start.
        KeyboardInterrupt: Raised again, with a message that says how to continue.
    """
    if (layer is None) == (host is None):
        raise CalibrationError("Say what to calibrate for: either a layer or a host method.")
    if host is not None and normalize is not None:
        raise CalibrationError(f"{host.name} decides what is normalised; leave normalize out.")
    check_options("calibrate", options, Options)
    through = Pass(**options).through
    model = unpruned(model)
    family = family_of(model)
    if host is None:
        layer = cast(int, layer)
        stage = layer_stage(layer, normalize or "prompt")
        check_layer(layer, family, model)
        reader = stages_reader(RANKS_BY_A_LAYER, [stage], heads)
        return through(model, processor, samples, reader).stages[0]
    host = without_bias(host)
    host.check(model, family)
    reader = stages_reader(host.name, attention_stages(host), heads)
    return through(model, processor, samples, reader)


def calibrate_guide(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    *,
    max_new_tokens: int,
    **options: Unpack[Options],
) -> Calibration:
    """Average over samples what SGL divides by P: the `Guide.importance` of the guiding model.

        bias = pore.calibrate_guide(small, processor, samples, max_new_tokens=32).fit()
        pruner = pore.SGL(keep=64, layer=12, guide=guide, reweight=bias)

    The model answers every sample. Everything else is as in `calibrate`.

    Args:
        model: The small vision-language model, not pruned.
        processor: As in `calibrate`.
        samples: As in `calibrate`.
        max_new_tokens: Longest answer, the same as for the guides that you will use later. A
            checkpoint made with another number is refused.
        **options: As in `calibrate`; attention that is not finite is an error at once.

    Returns:
        The sums over all good images, with the bad samples listed.

    Raises:
        UnsupportedModelError: pore does not know the model's family, or it takes no images.
        ModelStateError: The model is pruned.
        InputError: The processor has no chat template.
        CalibrationError: As in `calibrate`.
        ScoreError: Attention holds NaN or infinity.
        KeyboardInterrupt: Raised again, with a message that says how to continue.
    """

    reader = guide_reader(max_new_tokens)
    check_options("calibrate_guide", options, Options)
    return Pass(**options).through(unpruned(model), processor, samples, reader).stages[0]
