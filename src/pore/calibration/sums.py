"""The sums that a calibration keeps: exact, mergeable, saved."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import operator
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from pore._files import write_atomic
from pore._saved.parsing import read_json
from pore._saved.seals import check, content, sealed_text
from pore.bias.position_bias import Kind, PositionBias
from pore.bias.provenance import Provenance
from pore.data.prompts import prompt_template
from pore.errors import CalibrationError, ProfileError
from pore.identity import picture_of
from pore.layout import Layout
from pore.methods.guides import Guide

if TYPE_CHECKING:
    from pore.calibration.host import HostCalibration
    from pore.data.samples import Sample


_log = logging.getLogger(__name__)


_SCHEMA = "pore.calibration"


_HOST_SCHEMA = "pore.host_calibration"


_VERSION = 1


_MAX_BYTES = 256 << 20


_MAX_POSITIONS = 1 << 20


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


def _units(rows: np.ndarray) -> np.ndarray:
    """Attention from 0 to 2³⁰ in units of 2⁻⁶², rounded once, as integers of any size."""
    whole = np.floor(rows)
    rest = np.rint(np.ldexp(rows - whole, _BITS)).astype(np.int64).astype(object)
    units: np.ndarray = (whole.astype(np.int64).astype(object) << _BITS) + rest
    return units


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


_Decoded = TypeVar("_Decoded", "Calibration", "HostCalibration")


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
    stage = found if isinstance(found, Calibration) else found.stages[0]
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
