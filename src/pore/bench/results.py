"""What a benchmark measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pore._files import write_atomic
from pore._saved.seals import seal
from pore.bench.workload import Workload
from pore.cost.flops import Flops


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing.

    Attributes:
        samples: The measurements, in the order they were made.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the measurements are below."""
        return self._quantile(0.5)

    @property
    def q1(self) -> float:
        """A quarter of the measurements are below."""
        return self._quantile(0.25)

    @property
    def q3(self) -> float:
        """Three quarters of the measurements are below."""
        return self._quantile(0.75)

    def over(self, other: Spread) -> Spread:
        """This divided by another, run by run, as neighbouring runs share their noise."""
        return Spread(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Median, quartiles and all measurements."""
        return {
            "median": self.median,
            "q1": self.q1,
            "q3": self.q3,
            "samples": list(self.samples),
        }

    def _quantile(self, share: float) -> float:
        return float(np.quantile(self.samples, share))


@dataclass(frozen=True)
class Timing:
    """The cost of a setting, over all runs.

    Attributes:
        prefill: Milliseconds that the decoder's layers take for the prompt, without tower,
            projector and head.
        ttft: Milliseconds from the call to the first token: tower, projector, prefill and head.
        decode: Milliseconds for each further token of the batch; None when none was asked for.
        peak_memory: Most bytes allocated on the device during a run, weights included; None where
            the device does not tell.
        cache: Bytes in the key-value cache after the prefill.
    """

    prefill: Spread
    ttft: Spread
    decode: Spread | None
    peak_memory: int | None
    cache: int

    def to_dict(self) -> dict[str, Any]:
        """The measurements as plain JSON types, with units in the names."""
        return {
            "prefill_ms": self.prefill.to_dict(),
            "ttft_ms": self.ttft.to_dict(),
            "decode_ms_per_token": None if self.decode is None else self.decode.to_dict(),
            "peak_memory_bytes": self.peak_memory,
            "cache_bytes": self.cache,
        }

    def over(self, other: Timing) -> dict[str, Any]:
        """Run by run, the times as multiples of another setting's; medians and quartiles."""
        ratios = {"prefill": self.prefill.over(other.prefill), "ttft": self.ttft.over(other.ttft)}
        if self.decode is not None and other.decode is not None:
            ratios["decode"] = self.decode.over(other.decode)
        return {
            name: {"median": ratio.median, "q1": ratio.q1, "q3": ratio.q3}
            for name, ratio in ratios.items()
        }


@dataclass(frozen=True)
class Rates:
    """The rates that a device reached in two short tests, for the roofline.

    Attributes:
        flops: FLOP/s of a large square matrix product in the model's dtype.
        bandwidth: Bytes/s read and written by a large copy.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Roofline:
    """The shortest times, in milliseconds, that the device's rates allow.

    Attributes:
        prefill: The decoder layers' FLOPs (true count, attention not halved) at the rate of a
            large matrix product.
        ttft: The same for all FLOPs up to the first token.
        decode: The larger of two: weights and cache at the rate of a large copy, or FLOPs as above.
    """

    prefill: float
    ttft: float
    decode: float

    def to_dict(self, timing: Timing) -> dict[str, Any]:
        """The bounds, and the share of them that measured medians reach."""
        record = {
            "prefill_ms": self.prefill,
            "prefill_share": self.prefill / timing.prefill.median,
            "ttft_ms": self.ttft,
            "ttft_share": self.ttft / timing.ttft.median,
        }
        if timing.decode is not None:
            record["decode_ms_per_token"] = self.decode
            record["decode_share"] = self.decode / timing.decode.median
        return record


@dataclass(frozen=True)
class SettingResult:
    """One setting: unpruned, or a pruner.

    Attributes:
        name: Its name in tables.
        settings: The pruner's settings in words; empty when unpruned.
        tokens: Tokens entering every decoder layer, of the longest sample.
        flops: The true count for one sample; None if it is not known.
        timing: What was measured.
        attainable: What the same lengths cost without pruning code; None when unpruned or not
            asked for.
        roofline: What the device's rates allow; None if the FLOPs are not known.
    """

    name: str
    settings: dict[str, str]
    tokens: tuple[int, ...]
    flops: Flops | None
    timing: Timing
    attainable: Timing | None
    roofline: Roofline | None


@dataclass(frozen=True)
class SpeedResult:
    """A comparison: settings of one model, on one machine, of one workload.

    Attributes:
        model: Name, sizes (None if FLOPs are not known), dtype, attention implementation and bytes
            of weights.
        workload: What every run does.
        hardware: The machine.
        versions: Versions of Python and of the packages used.
        rates: The rates that the device reached by itself.
        settings: The unpruned model first, then every pruner.
        command: The command line that gave this result, or None.
        date: Date and time in UTC.
    """

    model: dict[str, Any]
    workload: Workload
    hardware: dict[str, Any]
    versions: dict[str, str]
    rates: Rates
    settings: tuple[SettingResult, ...]
    command: str | None
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; times in ms, sizes in bytes, rates per second."""
        unpruned = self.settings[0].timing
        settings = []
        for setting in self.settings:
            flops, ideal, line = setting.flops, setting.attainable, setting.roofline
            settings.append(
                {
                    "name": setting.name,
                    "settings": setting.settings,
                    "tokens_per_layer": list(setting.tokens),
                    "flops": None if flops is None else flops.to_dict(),
                    **setting.timing.to_dict(),
                    "over_unpruned": setting.timing.over(unpruned),
                    "attainable": None if ideal is None else ideal.to_dict(),
                    "over_attainable": None if ideal is None else setting.timing.over(ideal),
                    "roofline": None if line is None else line.to_dict(setting.timing),
                }
            )
        return {
            "schema": "pore.bench",
            "version": 1,
            "date": self.date,
            "command": self.command,
            "hardware": self.hardware,
            "versions": self.versions,
            "model": self.model,
            "workload": asdict(self.workload),
            "rates": {
                "matmul_flops_per_s": self.rates.flops,
                "copy_bytes_per_s": self.rates.bandwidth,
            },
            "settings": settings,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The result as JSON text, with a checksum."""
        return json.dumps(seal(self.to_dict()), indent=indent)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON to a file, whole or not at all.

        Args:
            path: The file; missing folders are made.

        Returns:
            The path written.
        """
        return write_atomic(path, self.to_json() + "\n")


@dataclass(frozen=True)
class CalibrationResult:
    """The cost of calibration for one batch, beside the least that it needs.

    Attributes:
        model: As in `SpeedResult`.
        workload: As in `SpeedResult`; nothing is generated.
        hardware: The machine.
        versions: Versions of Python and of the packages used.
        layer: K; the attention of layer K - 1 is measured.
        calibration: Milliseconds of the forwards of `pore.calibrate`, without reading, drawing and
            tokenizing samples.
        attainable: Milliseconds of tower, projector and the first K layers by themselves.
        date: Date and time in UTC.
    """

    model: dict[str, Any]
    workload: Workload
    hardware: dict[str, Any]
    versions: dict[str, str]
    layer: int
    calibration: Spread
    attainable: Spread
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "schema": "pore.bench.calibration",
            "version": 1,
            "date": self.date,
            "hardware": self.hardware,
            "versions": self.versions,
            "model": self.model,
            "workload": asdict(self.workload),
            "layer": self.layer,
            "calibration_ms": self.calibration.to_dict(),
            "attainable_ms": self.attainable.to_dict(),
            "over_attainable": self.calibration.over(self.attainable).to_dict(),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON to a file, whole or not at all.

        Args:
            path: The file; missing folders are made.

        Returns:
            The path written.
        """
        return write_atomic(path, json.dumps(seal(self.to_dict()), indent=2) + "\n")
