"""The mean attention Ā over a data set, which the position bias P is fitted to.

The stages of a host method read the attention of the unpruned model, each what it would divide by
P, and keep everything. Only the vision tower and the decoder up to the last of these attentions
run: once query and key of that layer are known, the forward is stopped. Of FastV's layer K − 1
itself the attention kernel, the output projection and the MLP do not run; nor do the layers from K
on, the final norm and the language model head.

Attention is summed in whole multiples of 2⁻⁶², its squares in multiples of 2⁻¹²⁴, by integers of
any size. So the sums depend on what the model computes of each sample and on nothing else: not on
order, shards, merges or interruptions; and the variance has no cancellation. What a host reads need
not be a share: sums over heads, text tokens or layers are summed just so, as long as they are from
0 to 2³⁰.

What the model computes of a sample is the same to the last bit only in a batch of the same make-up:
in another one, kernels add in another order. Where samples fall into other batches, as with another
`batch_size`, or with shards or a `limit` that do not end with a batch, the mean moves by rounding.
Measured on the embedded model, Ā of a position moves by up to 2e-6 of its value in float32 and 7e-3
in bfloat16, and an exponential P by up to 1e-7 and 2e-3. With `batch_size=1` nothing moves.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import logging
import math
import operator
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from pore._files import write_atomic
from pore._json import read_json
from pore._private import execution_device
from pore._sealed import check, content, seal, sealed_text
from pore.attention import LayerAttention, Normalize
from pore.bias import Kind, PositionBias, Provenance
from pore.errors import (
    CalibrationError,
    InputError,
    ProfileError,
    ScoreError,
    StaleCheckpointError,
)
from pore.families import family_of, identity
from pore.guiding import GUIDE, GUIDED, Guide, guide
from pore.identity import forget, picture_of
from pore.layout import Image, Layout
from pore.methods.fastv import FastV
from pore.prompts import build_inputs, processor_settings, prompt_template
from pore.pruner import Pruner, Run, Selection, Stage, View, unpruned

if TYPE_CHECKING:
    from rich.progress import Progress

    from pore.samples import Sample

_log = logging.getLogger(__name__)

_SCHEMA = "pore.calibration"
_HOST_SCHEMA = "pore.host_calibration"
_VERSION = 1
_MAX_BYTES = 256 << 20
_MAX_POSITIONS = 1 << 20
_MAX_STAGES = 1 << 10
_BITS = 62  # fractions in multiples of 2^-62 fit an int64
_LARGEST = 1 << 30
_CONDITIONS = (
    *("model", "revision", "weights", "config", "host", "layer", "normalize"),
    *("processor", "template"),
)
_LATER = ("weights", "config")
"""Conditions that older files do not know."""
_CONTENT_BYTES, _ID_BYTES = 8, 4
_MARK_BYTES = _CONTENT_BYTES + _ID_BYTES
_EARLY = 50
_MOSTLY_BAD = 0.5


class BadSample(NamedTuple):
    """A sample that was skipped.

    Attributes:
        id: The sample's id.
        reason: What was wrong with it.
    """

    id: str
    reason: str


@dataclass(frozen=True)
class Calibration:
    """Sums over a data set of the attention on every visual position, and how they came about.

    Attributes:
        provenance: The conditions of the measurement, its date and source.
        dtype: The model's floating type, such as "float32".
        passes: For each pass over samples that is in here, a digest of the samples in order.
        seen: Samples gone through, bad ones included.
        count: Images whose attention is in the sums.
        bad: The samples skipped, with the reason.
        grid: Rows and columns of the visual tokens, where known.
        sums: For each of the N positions the sum of the attention, in units of 2⁻⁶²; empty before
            the first image.
        squares: The sum of its square, in units of 2⁻¹²⁴.
        samples: Of every sample gone through, 8 bytes for its picture and prompt and 4 for its id,
            in order; None where it is unknown, as in files of an older pore.
    """

    provenance: Provenance
    dtype: str
    passes: tuple[str, ...]
    seen: int = 0
    count: int = 0
    bad: tuple[BadSample, ...] = field(default=(), repr=False)
    grid: tuple[int, int] | None = None
    sums: tuple[int, ...] = field(default=(), repr=False)
    squares: tuple[int, ...] = field(default=(), repr=False)
    samples: bytes | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def mean(self) -> Tensor:
        """Ā of every position, of shape (N,), float64.

        Raises:
            CalibrationError: No image was measured.
        """
        count = self._counted() << _BITS
        return torch.tensor([total / count for total in self.sums], dtype=torch.float64)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the attention over images, (N,) float64; NaN for one image.

        Raises:
            CalibrationError: No image was measured.
        """
        count = self._counted()
        if count == 1:
            return torch.full((len(self),), torch.nan, dtype=torch.float64)
        scale = (count * (count - 1)) << (2 * _BITS)
        return torch.tensor(
            [
                math.sqrt((count * square - total * total) / scale)
                for total, square in zip(self.sums, self.squares, strict=True)
            ],
            dtype=torch.float64,
        )

    @property
    def sem(self) -> Tensor:
        """Standard error of the mean, (N,) float64; NaN for one image.

        Raises:
            CalibrationError: No image was measured.
        """
        return self.std / math.sqrt(self._counted())

    def band(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The confidence band of the mean at each position, images taken as independent.

        Args:
            level: Confidence, between 0 and 1.

        Returns:
            Lower and upper bound, each (N,) float64, from the normal distribution.

        Raises:
            CalibrationError: No image was measured, or `level` is no confidence.
        """
        if not 0 < level < 1:
            raise CalibrationError(f"A confidence lies between 0 and 1, {level} does not.")
        reach = self.sem * statistics.NormalDist().inv_cdf((1 + level) / 2)
        return self.mean - reach, self.mean + reach

    def fit(self, kind: Kind = "exponential") -> PositionBias:
        """The position bias that fits the mean attention, with its provenance.

        Args:
            kind: Form of the curve, as in `PositionBias.fit`.

        Returns:
            The bias.

        Raises:
            CalibrationError: No image was measured.
            PoreError: The curve cannot be fitted; see `PositionBias.fit`.
        """
        provenance = replace(self.provenance, samples=self._counted())
        return PositionBias.fit(self.mean, kind, grid=self.grid, provenance=provenance)

    def merge(self, other: Calibration) -> Calibration:
        """The calibration over the samples of both: exact, and the same in any order.

        Files of an older pore do not say which weights and samples they are of. They are merged
        with a warning, and the union does not say it either.

        Args:
            other: A calibration of other samples under the same conditions.

        Returns:
            The union. It can be merged on, but no longer resumed.

        Raises:
            CalibrationError: The conditions differ, or both hold the same sample: of one id, with
                one picture and one question. Where ids differ, a warning is logged.
        """
        differences = _differences(self, other)
        if differences:
            raise CalibrationError(
                "These calibrations were made under different conditions and cannot be merged: "
                + "; ".join(differences)
                + "."
            )
        if set(self.passes) & set(other.passes):
            raise CalibrationError(
                "These calibrations hold the same samples, which would count twice; split the "
                "data into shards, and merge each once."
            )
        _check_overlap(self.samples, other.samples)
        known = {name: _of_both(self, other, name) for name in ("processor", *_LATER)}
        samples = None
        if self.samples is not None and other.samples is not None:
            samples = b"".join(sorted(_split(self.samples) + _split(other.samples)))
        if samples is None or known["weights"] is None:
            _log.warning("Of what is merged, a part is of unknown weights or samples.")
        sources = {
            source
            for one in (self, other)
            if one.provenance.source is not None
            for source in one.provenance.source.split("; ")
        }
        both = [one for one in (self, other) if one.count]
        return replace(
            self,
            provenance=replace(
                self.provenance,
                source="; ".join(sorted(sources)) or None,
                date=max(filter(None, (self.provenance.date, other.provenance.date)), default=None),
                **known,
            ),
            passes=tuple(sorted(self.passes + other.passes)),
            seen=self.seen + other.seen,
            count=self.count + other.count,
            bad=tuple(sorted(self.bad + other.bad)),
            grid=both[0].grid if both else None,
            sums=tuple(map(sum, zip(*(one.sums for one in both), strict=True))),
            squares=tuple(map(sum, zip(*(one.squares for one in both), strict=True))),
            samples=samples,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the calibration to a JSON file, whole or not at all.

        Args:
            path: The file; missing folders are made.

        Returns:
            The path written.

        Raises:
            OSError: It cannot be written.
        """
        return write_atomic(path, sealed_text(self._document()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote, or a checkpoint; trusted in nothing.

        Args:
            path: The file.

        Returns:
            The calibration.

        Raises:
            CalibrationError: There is no such file, or it is damaged, too large, of another
                version or something else altogether.
        """
        return _load(path, _decode)

    def _document(self) -> dict[str, Any]:
        samples = None if self.samples is None else base64.b64encode(self.samples).decode()
        return {"schema": _SCHEMA, "version": _VERSION, **asdict(self), "samples": samples}

    def _counted(self) -> int:
        if self.count == 0:
            raise CalibrationError(
                "No image was measured, so there is no mean attention."
                + _reasons(self.bad, "The samples were bad")
            )
        return self.count

    def _including(
        self,
        samples: Sequence[Sample],
        marks: bytes,
        measured: Sequence[tuple[Layout | Guide, np.ndarray]],
        bad: Sequence[BadSample],
    ) -> Calibration:
        """With one more batch of samples, of which `marks` tell, some measured and some bad."""
        state = replace(
            self,
            passes=(_digest(self.passes[0], samples),),
            samples=None if self.samples is None else self.samples + marks,
            seen=self.seen + len(samples),
            bad=(*self.bad, *bad),
        )
        for layout, rows in measured:
            grid = layout.images[0].grid
            if not state.count:
                nothing = (0,) * rows.shape[1]
                state = replace(state, grid=grid, sums=nothing, squares=nothing)
            if rows.shape[1] != len(state) or grid != state.grid:
                raise CalibrationError(
                    f"The images so far have {len(state)} visual tokens on the grid {state.grid}, "
                    f"and one of {', '.join(s.id for s in samples)} has {rows.shape[1]} on "
                    f"{grid}. A position bias is of one grid: calibrate with images of one size."
                )
            units = _units(rows)
            state = replace(
                state,
                count=state.count + len(units),
                sums=tuple(map(operator.add, state.sums, units.sum(0))),
                squares=tuple(map(operator.add, state.squares, (units * units).sum(0))),
            )
        return state


@dataclass(frozen=True)
class HostCalibration:
    """The calibrations of all stages of a host method that read attention, from one pass.

    Attributes:
        stages: One for every such stage, in the order of `host.stages()`.
    """

    stages: tuple[Calibration, ...]

    @property
    def seen(self) -> int:
        """Samples gone through, bad ones included."""
        return self.stages[0].seen

    @property
    def count(self) -> int:
        """Images whose attention is in the sums."""
        return self.stages[0].count

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """The samples skipped, with the reason."""
        return self.stages[0].bad

    def fit(self, kind: Kind = "exponential") -> tuple[PositionBias, ...]:
        """The position bias of every stage, for the host's `reweight`.

        Args:
            kind: Form of the curves, as in `PositionBias.fit`.

        Returns:
            One bias for every stage.

        Raises:
            CalibrationError: No image was measured.
            PoreError: A curve cannot be fitted; see `PositionBias.fit`.
        """
        biases = []
        for stage in self.stages:
            try:
                biases.append(stage.fit(kind))
            except (ProfileError, ScoreError) as error:
                layer = stage.provenance.layer
                where = "the model that guides" if layer is None else f"decoder layer {layer - 1}"
                raise type(error)(f"What is read of {where}: {error}") from error
        return tuple(biases)

    def merge(self, other: HostCalibration) -> HostCalibration:
        """The calibration over the samples of both; see `Calibration.merge`.

        Args:
            other: A calibration of other samples under the same conditions.

        Returns:
            The union.

        Raises:
            CalibrationError: The conditions differ, or both hold the same pass over samples.
        """
        if len(self.stages) != len(other.stages):
            raise CalibrationError(
                f"These calibrations have {len(self.stages)} and {len(other.stages)} stages, so "
                "they are of different hosts and cannot be merged."
            )
        pairs = zip(self.stages, other.stages, strict=True)
        return HostCalibration(tuple(one.merge(another) for one, another in pairs))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the calibration to a JSON file, whole or not at all.

        Args:
            path: The file; missing folders are made. With one stage it is a `Calibration` file.

        Returns:
            The path written.

        Raises:
            OSError: It cannot be written.
        """
        if len(self.stages) == 1:
            return self.stages[0].save(path)
        stages = [seal(stage._document()) for stage in self.stages]
        document = {"schema": _HOST_SCHEMA, "version": _VERSION, "stages": stages}
        return write_atomic(path, sealed_text(document))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HostCalibration:
        """Read what `save` or `Calibration.save` wrote, or a checkpoint; trusted in nothing.

        Args:
            path: The file.

        Returns:
            The calibration.

        Raises:
            CalibrationError: There is no such file, or it is damaged, too large, of another
                version or something else altogether.
        """
        return _load(path, _decode_host)

    def _including(
        self,
        samples: Sequence[Sample],
        marks: bytes,
        measured: Sequence[tuple[Layout | Guide, np.ndarray]],
        bad: Sequence[BadSample],
    ) -> HostCalibration:
        """With one more batch of samples, of which `marks` tell, some measured and some bad."""
        return HostCalibration(
            tuple(
                stage._including(
                    samples, marks, [(layout, rows[i]) for layout, rows in measured], bad
                )
                for i, stage in enumerate(self.stages)
            )
        )


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


class _Reader(NamedTuple):
    """What reads the curves of a batch.

    Attributes:
        host: Name of the method that they are for.
        where: Whose attention that is, in words.
        read: Gives the images and, for every stage, (I, t) numbers.
    """

    host: str
    where: str
    read: Callable[..., tuple[Layout | Guide, tuple[Tensor, ...]]]


def _through(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    *,
    reader: _Reader,
    stages: Sequence[Mapping[str, Any]],
    batch_size: int,
    checkpoint: str | os.PathLike[str] | None,
    every: int,
    max_bad: float,
    progress: bool,
    limit: int | None,
    source: str | None,
    settings: str = "",
) -> HostCalibration:
    """One pass over the samples; `stages` says in provenance what is read, `settings` how."""
    _check_arguments(batch_size, every, max_bad, limit)
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    forget(model)  # a pass over the data is worth a pass over the weights
    origin = Provenance(
        **identity(model),
        host=reader.host,
        processor=processor_settings(processor),
        template=prompt_template(processor),
        date=datetime.date.today().isoformat(),
        source=source,
    )
    state = start = HostCalibration(
        tuple(
            Calibration(
                provenance=replace(origin, **stage),
                dtype=str(dtype).removeprefix("torch."),
                passes=(settings,),
                samples=b"",
            )
            for stage in stages
        )
    )
    known = [n for n in (operator.length_hint(samples, -1), limit) if n is not None and n >= 0]
    total = min(known, default=None)
    stream = islice(samples, limit)
    marks = partial(_marks, _tokens(processor))
    if checkpoint is not None and Path(checkpoint).exists():
        state = _resume(checkpoint, start, stream, marks)
    saved = state.seen
    device = _device(model)

    def keep() -> None:
        nonlocal saved
        if checkpoint is not None and state.seen > saved:
            state.save(checkpoint)
            saved = state.seen

    try:
        with _evaluation(model), _bar(progress, total, state) as bar:
            while batch := list(islice(stream, batch_size)):
                measured, bad = _measure(model, processor, batch, reader, device, dtype)
                if not (measured or state.count) and any(b.reason == _NOT_FINITE for b in bad):
                    raise ScoreError(
                        f"Attention of {reader.where} is NaN or infinite from the start; look for "
                        "overflow (fp16 where the model needs bf16?), damaged weights or bad "
                        "inputs."
                    )
                for one in bad:
                    _log.warning("Skipped the sample %s: %s", one.id, one.reason)
                state = state._including(batch, marks(batch), measured, bad)
                _check_bad(state, max_bad, total)
                bar.update(bar.task_ids[0], completed=state.seen, bad=len(state.bad))
                if state.seen - saved >= every:
                    keep()
    except KeyboardInterrupt:
        keep()
        where = (
            "nothing was kept; give a checkpoint to be able to go on"
            if checkpoint is None
            else f"their sums are in {os.fspath(checkpoint)}: make the same call again to go on"
        )
        message = f"Calibration was interrupted after {state.seen} samples; {where}."
        raise KeyboardInterrupt(message) from None
    except BaseException:
        keep()
        raise
    keep()
    if state.seen == 0:
        raise CalibrationError("There is no sample to calibrate on.")
    state.stages[0]._counted()
    _check_bad(state, max_bad, state.seen)
    return state


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
    stages = [
        s for s in host.stages() if isinstance(s, Stage) and hasattr(s.attention, "normalize")
    ]
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
    return [(cast(int, s.probed), s.attention.normalize) for s in attention_stages(host)]  # type: ignore[union-attr]


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


_NOT_FINITE = "its attention is NaN or infinite"


def _measure(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    reader: _Reader,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[tuple[Layout | Guide, np.ndarray]], list[BadSample]]:
    """Attention (S, I, t) of the good samples by batch, and the bad ones, which spoil no other."""
    good, bad = [], []
    for sample in samples:
        try:
            good.append(replace(sample, image=sample.load_image()))
        except InputError as error:
            bad.append(BadSample(sample.id, str(error)))
    if not good:
        return [], bad
    try:
        inputs = build_inputs(processor, good, device, dtype)
        layout, attention = reader.read(model, inputs)
    except InputError as error:
        if len(good) == 1:
            return [], [*bad, BadSample(good[0].id, str(error))]
        measured = []
        for sample in good:
            one, refused = _measure(model, processor, [sample], reader, device, dtype)
            measured += one
            bad += refused
        return measured, bad
    if not bool(layout.valid.all()):
        raise CalibrationError(
            f"The images of {', '.join(sample.id for sample in good)} have different numbers of "
            "visual tokens. A position bias is of one grid: calibrate with images of one size."
        )
    if any(curve.shape != layout.valid.shape for curve in attention):
        raise CalibrationError(
            f"The stages of {reader.host} read {[tuple(curve.shape) for curve in attention]} of "
            f"visual tokens of shape {tuple(layout.valid.shape)}; the reader, or the stage's "
            "curve, must give one number for every token."
        )
    rows = np.stack([curve.to("cpu", torch.float64).numpy() for curve in attention])
    finite = np.isfinite(rows).all(axis=(0, 2))
    if (rows[:, finite] < 0).any() or (rows[:, finite] > _LARGEST).any():
        raise CalibrationError(
            f"What {reader.host} reads is no attention: it runs from {rows[:, finite].min():g} to "
            f"{rows[:, finite].max():g}, where 0 to 2^30 can be."
        )
    spoiled = {image.row for image, fine in zip(layout.images, finite, strict=True) if not fine}
    bad += [BadSample(good[row].id, _NOT_FINITE) for row in sorted(spoiled)]
    keep = [image.row not in spoiled for image in layout.images]
    return ([(layout, rows[:, keep])] if any(keep) else []), bad


def _units(rows: np.ndarray) -> np.ndarray:
    """Attention from 0 to 2³⁰ in units of 2⁻⁶², rounded once, as integers of any size."""
    whole = np.floor(rows)
    rest = np.rint(np.ldexp(rows - whole, _BITS)).astype(np.int64).astype(object)
    units: np.ndarray = (whole.astype(np.int64).astype(object) << _BITS) + rest
    return units


def _check_arguments(batch_size: int, every: int, max_bad: float, limit: int | None) -> None:
    for name, value in (("batch_size", batch_size), ("every", every), ("limit", limit)):
        if value is not None and (type(value) is not int or value < 1):
            raise CalibrationError(f"{name} must be a whole number of at least 1, not {value!r}.")
    if not 0 <= max_bad <= 1:
        raise CalibrationError(f"max_bad is a share from 0 to 1, not {max_bad!r}.")


def _check_bad(state: HostCalibration, max_bad: float, total: int | None) -> None:
    """Fail when too many samples are bad, or will be whatever follows."""
    bad = len(state.bad)
    hopeless = total is not None and bad > max_bad * total
    mostly = state.seen >= _EARLY and bad > max(max_bad, _MOSTLY_BAD) * state.seen
    if hopeless or mostly:
        raise CalibrationError(
            f"{bad} of {state.seen} samples are bad, more than the share max_bad={max_bad:g} "
            "allows; mend the data, or raise max_bad." + _reasons(state.bad, "They are")
        )


def _reasons(bad: Sequence[BadSample], opening: str) -> str:
    if not bad:
        return ""
    listed = "; ".join(f"{one.id}: {one.reason}" for one in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f" {opening}: {listed}{more}"


def _digest(before: str, samples: Sequence[Sample]) -> str:
    """The digest of samples gone through, each with id and question, after those `before`."""
    for sample in samples:
        text = "\0".join((before, sample.id, sample.question))
        before = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return before


def _tokens(processor: Any) -> str:
    """How a processor's tokenizer reads: the token ids of the template."""
    ids = processor.tokenizer(prompt_template(processor))["input_ids"]
    return json.dumps(ids)


def _marks(tokens: str, samples: Sequence[Sample]) -> bytes:
    """Of every sample what `Calibration.samples` holds."""

    def short(size: int, *texts: str) -> bytes:
        text = json.dumps(texts).encode()
        return hashlib.blake2b(text, digest_size=size).digest()

    return b"".join(
        short(_CONTENT_BYTES, tokens, sample.question, picture_of(sample.image))
        + short(_ID_BYTES, sample.id)
        for sample in samples
    )


def _split(samples: bytes) -> list[bytes]:
    return [samples[i : i + _MARK_BYTES] for i in range(0, len(samples), _MARK_BYTES)]


def _check_overlap(one: bytes | None, other: bytes | None) -> None:
    """Refuse samples that are in both, and say where only their ids differ."""
    if one is None or other is None:
        return
    same = len(set(_split(one)) & set(_split(other)))
    if same:
        raise CalibrationError(
            f"These calibrations share {same} samples, which would count twice; split the data "
            "into shards that have no sample in common, and merge each once."
        )
    pictures, others = ({mark[:_CONTENT_BYTES] for mark in _split(own)} for own in (one, other))
    if twice := len(pictures & others):
        _log.warning(
            "What is merged shares %d samples by picture and question, though not by id; they "
            "count twice.",
            twice,
        )


def _resume(
    checkpoint: str | os.PathLike[str],
    start: HostCalibration,
    stream: Iterator[Sample],
    marks: Callable[[Sequence[Sample]], bytes],
) -> HostCalibration:
    """The state in a checkpoint, if it is of this call; `stream` then stands at what is left."""
    name = os.fspath(checkpoint)
    away = f"Give another checkpoint, or delete {name} to begin anew."
    try:
        state = HostCalibration.load(checkpoint)
    except CalibrationError as error:
        raise CalibrationError(f"{error} {away}") from error
    differences = []
    if len(start.stages) != len(state.stages):
        differences = [f"there are {len(start.stages)} stages here and {len(state.stages)} there"]
    for one, other in zip(start.stages, state.stages, strict=False):
        differences += [each for each in _differences(one, other) if each not in differences]
    if differences:
        raise StaleCheckpointError(
            f"The checkpoint {name} was made under other conditions than this call has: "
            + "; ".join(differences)
            + f". {away}"
        )
    done = list(islice(stream, state.seen))
    first = state.stages[0]
    if first.passes != (_digest(start.stages[0].passes[0], done),):
        raise StaleCheckpointError(
            f"The checkpoint {name} has gone through {state.seen} samples that are not the first "
            "ones of this call (fewer, others, in another order, or with answers of another "
            f"length). {away}"
        )
    if first.samples is not None and (here := marks(done)) != first.samples:
        pairs = zip(done, _split(here), _split(first.samples), strict=True)
        ids = [sample.id for sample, mark, before in pairs if mark != before]
        raise StaleCheckpointError(
            f"The checkpoint {name} has gone through samples of the same ids and questions, but "
            f"{len(ids)} of them have another picture now, or other tokens: {', '.join(ids[:3])}"
            f"{', ...' if len(ids) > 3 else ''}. {away}"
        )
    _log.info("Going on after %d samples, from %s", state.seen, name)
    return state


def _of_both(one: Calibration, other: Calibration, condition: str) -> Any:
    """A condition as far as two calibrations that agree on it both know it."""
    a, b = (getattr(each.provenance, condition) for each in (one, other))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {key: value for key, value in a.items() if key in b}
    return a if b is not None else None


def _differences(one: Calibration, other: Calibration) -> list[str]:
    """What differs in the conditions of two calibrations, in words.

    What older files do not know, a condition or a setting in one, is passed over.
    """
    pairs = []
    for name in _CONDITIONS:
        a, b = getattr(one.provenance, name), getattr(other.provenance, name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys = [key for key in sorted(a.keys() & b.keys()) if a[key] != b[key]]
            a, b = ({key: settings[key] for key in keys} for settings in (a, b))
        if name not in _LATER or None not in (a, b):
            pairs.append((name, a, b))
    pairs.append(("dtype", one.dtype, other.dtype))
    if one.count and other.count:
        pairs.append(("positions", len(one), len(other)))
        pairs.append(("grid", one.grid, other.grid))
    return [f"{name} is {a!r} here and {b!r} there" for name, a, b in pairs if a != b]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards every module in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device: torch.device = embeddings.weight.device
    if device.type == "meta":  # offloaded by accelerate, which knows where it will compute
        device = execution_device(embeddings)
    return device


def _bar(progress: bool, total: int | None, state: HostCalibration) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    from pore._text import Screen

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f} samples/s")

    console = Screen(stderr=True)
    bar = Progress(
        TextColumn("Calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[bad]} bad", markup=False),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    bar.add_task("", total=total, completed=state.seen, bad=len(state.bad))
    return bar


_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "schema": str,
    "version": int,
    "provenance": dict,
    "dtype": str,
    "passes": list,
    "seen": int,
    "count": int,
    "bad": list,
    "grid": (list, type(None)),
    "sums": list,
    "squares": list,
    "samples": (str, type(None)),
}


_HOST_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "schema": str,
    "version": int,
    "stages": list,
}
_Decoded = TypeVar("_Decoded", Calibration, HostCalibration)


def _load(path: str | os.PathLike[str], decode: Callable[[Any], _Decoded]) -> _Decoded:
    name = os.fspath(path)
    try:
        found = decode(read_json(path, _MAX_BYTES))
    except OSError as error:
        raise CalibrationError(
            f"Cannot read the calibration {name}: {error.strerror or error}."
        ) from error
    except ValueError as error:
        raise CalibrationError(f"{name} is no calibration, or damaged: {error}") from error
    stage = found.stages[0] if isinstance(found, HostCalibration) else found
    if stage.samples is None or stage.provenance.weights is None:
        _log.warning(
            "%s does not say which weights and pictures it is of, as files of an older pore do "
            "not; that they are those at hand cannot be checked.",
            name,
        )
    return found


def _check_fields(
    found: Any, schema: str, fields: Mapping[str, type | tuple[type, ...]]
) -> dict[str, Any]:
    """Refuse what has not just these fields."""
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise ValueError(f'there is no "schema": "{schema}".')
    if found.get("version") != _VERSION:
        raise ValueError(
            f"it is of version {str(found.get('version'))[:40]}, and this pore reads version "
            f"{_VERSION}."
        )
    found = content(found)
    if schema == _SCHEMA:
        found.setdefault("samples", None)  # older files have none
    if found.keys() != fields.keys():
        raise ValueError(
            f"missing or unknown fields: {', '.join(sorted(found.keys() ^ fields.keys()))[:200]}."
        )
    for name, types in fields.items():
        if not isinstance(found[name], types) or isinstance(found[name], bool):
            raise ValueError(f"the field {name} is of a wrong type.")
    return cast("dict[str, Any]", found)


def _decode_host(document: Any) -> HostCalibration:
    """The calibration of a host from JSON of any origin, or ValueError."""
    if isinstance(document, dict) and document.get("schema") == _SCHEMA:
        return HostCalibration((_decode(document),))
    found = _check_fields(document, _HOST_SCHEMA, _HOST_FIELDS)
    if not 1 <= len(found["stages"]) <= _MAX_STAGES:
        raise ValueError(f"there must be 1 to {_MAX_STAGES} stages.")
    stages = tuple(map(_decode, found["stages"]))
    passes = {(s.passes, s.seen, s.count, s.bad, s.grid, len(s), s.samples) for s in stages}
    if len(passes) != 1:
        raise ValueError("its stages have not seen the same samples.")
    check(document)
    return HostCalibration(stages)


def _decode(document: Any) -> Calibration:
    """A calibration from JSON of any origin, or ValueError."""
    if isinstance(document, dict) and document.get("schema") == _HOST_SCHEMA:
        raise ValueError("it is of several stages; read it with HostCalibration.load.")
    found = _check_fields(document, _SCHEMA, _FIELDS)
    bad, grid = found["bad"], found["grid"]
    if not all(isinstance(digest, str) for digest in found["passes"]) or not found["passes"]:
        raise ValueError("passes must be digests.")
    for one in bad:
        if not (isinstance(one, list) and len(one) == 2 and all(isinstance(x, str) for x in one)):
            raise ValueError("bad must be pairs of id and reason.")
    if grid is not None and not (len(grid) == 2 and all(type(side) is int for side in grid)):
        raise ValueError("grid must be two whole numbers.")
    if not (found["count"] >= 0 and len(bad) <= found["seen"]):
        raise ValueError("the counts contradict each other.")
    _check_sums(found["sums"], found["squares"], found["count"], grid)
    try:
        provenance = Provenance(**found["provenance"])
    except (TypeError, ProfileError) as error:
        raise ValueError(f"its provenance: {error}") from error
    measured = Calibration(
        provenance=provenance,
        dtype=found["dtype"],
        passes=tuple(found["passes"]),
        seen=found["seen"],
        count=found["count"],
        bad=tuple(BadSample(*one) for one in bad),
        grid=None if grid is None else cast("tuple[int, int]", tuple(grid)),
        sums=tuple(found["sums"]),
        squares=tuple(found["squares"]),
        samples=_decode_samples(found["samples"], found["seen"]),
    )
    check(document)
    return measured


def _decode_samples(samples: str | None, seen: int) -> bytes | None:
    if samples is None:
        return None
    decoded = base64.b64decode(samples, validate=True)
    if len(decoded) != _MARK_BYTES * seen:
        raise ValueError("samples must tell of every sample gone through.")
    return decoded


def _check_sums(sums: list[Any], squares: list[Any], count: int, grid: list[int] | None) -> None:
    """Refuse sums that `count` values from 0 to 2³⁰ cannot have."""
    if len(sums) != len(squares) or bool(sums) != bool(count) or len(sums) > _MAX_POSITIONS:
        raise ValueError("sums and squares must have one number for every position.")
    if grid is not None and (min(grid) < 1 or grid[0] * grid[1] != len(sums)):
        raise ValueError("the grid does not have as many positions as there are sums.")
    largest = _LARGEST << _BITS
    for total, square in zip(sums, squares, strict=True):
        if not (type(total) is int and type(square) is int and 0 <= total <= count * largest):
            raise ValueError("a sum is no sum of attention.")
        if not total * total <= count * square <= count * total * largest:
            raise ValueError("a sum of squares does not go with its sum.")
