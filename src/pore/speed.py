"""What a prefill and a decode step do cost: measured, beside what they should and could cost.

Every pruned setting is timed against the same model unpruned, with the same attention kernel, in
interleaved runs (A B C A B C ...), so that a machine that slows down slows all of them. Each is
also timed against *the attainable*: the same stack run on the shortened sequence by stock modules
and one plain gather, with no pruning code at all. What a setting takes beyond that is what pruning
itself costs.

Times are in milliseconds, sizes in bytes. A run is one batch: vision tower, projector, prefill and
head give the first token; the others are decoded one by one, greedily, over the same cache.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import inspect
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pore._files import write_atomic
from pore._private import attention_name, cache_argument, cache_in, random_model
from pore._sealed import seal
from pore.changes import Changes
from pore.errors import InputError
from pore.families import Family, family_of, names_of
from pore.flops import Flops, model_flops
from pore.pruner import Pruner, check_layer, unpruned
from pore.shapes import ModelShape, llava_config

if TYPE_CHECKING:
    from rich.table import Table

Progress = Callable[[int, int, str], None]
UNPRUNED = "unpruned"


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
        """This divided by another, run by run: runs that were neighbours share their noise."""
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
    """What a setting cost, over all runs.

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
    """What the device reached in two short tests, by which a roofline is drawn.

    Attributes:
        flops: FLOP/s of a large square matrix product in the model's dtype.
        bandwidth: Bytes/s read and written by a large copy.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Roofline:
    """The least milliseconds that the device's rates allow.

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
        name: How tables name it.
        settings: The pruner's settings in words; empty when unpruned.
        tokens: Tokens entering every decoder layer, of the longest sample.
        flops: The true count for one sample.
        timing: What was measured.
        attainable: What the same lengths cost without pruning code; None when unpruned or not
            asked for.
        roofline: What the device's rates allow.
    """

    name: str
    settings: dict[str, str]
    tokens: tuple[int, ...]
    flops: Flops
    timing: Timing
    attainable: Timing | None
    roofline: Roofline


@dataclass(frozen=True)
class Workload:
    """What every run does.

    Attributes:
        batch_size: Prompts that run together.
        text_before: Text tokens before the image.
        visual: Visual tokens.
        text_after: Text tokens behind it.
        new_tokens: Tokens generated for each prompt, the first included.
        repeats: Timed runs of every setting.
        warmup: Runs of every setting before, thrown away.
        seed: Seed of token ids and pixels.
    """

    batch_size: int
    text_before: int
    visual: int
    text_after: int
    new_tokens: int
    repeats: int
    warmup: int
    seed: int

    @property
    def prompt(self) -> int:
        """Tokens of one prompt."""
        return self.text_before + self.visual + self.text_after


@dataclass(frozen=True)
class SpeedResult:
    """A comparison: settings of one model, on one machine, of one workload.

    Attributes:
        model: Name, sizes, dtype, attention implementation and bytes of weights.
        workload: What every run does.
        hardware: The machine.
        versions: Of what took part.
        rates: What the device reached by itself.
        settings: The unpruned model first, then every pruner.
        command: What was run to get this, or None.
        date: When, in UTC.
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
            ideal = setting.attainable
            settings.append(
                {
                    "name": setting.name,
                    "settings": setting.settings,
                    "tokens_per_layer": list(setting.tokens),
                    "flops": setting.flops.to_dict(),
                    **setting.timing.to_dict(),
                    "over_unpruned": setting.timing.over(unpruned),
                    "attainable": None if ideal is None else ideal.to_dict(),
                    "over_attainable": None if ideal is None else setting.timing.over(ideal),
                    "roofline": setting.roofline.to_dict(setting.timing),
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
            path: Where to; missing folders are made.

        Returns:
            The path written.
        """
        return write_atomic(path, self.to_json() + "\n")


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration costs for one batch, beside what it cannot do without.

    Attributes:
        model: As in `SpeedResult`.
        workload: As in `SpeedResult`; nothing is generated.
        hardware: The machine.
        versions: Of what took part.
        layer: K: the attention of layer K - 1 is measured.
        calibration: Milliseconds of the forwards of `pore.calibrate`, without reading, drawing and
            tokenizing samples.
        attainable: Milliseconds of tower, projector and the first K layers by themselves.
        date: When, in UTC.
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
            path: Where to; missing folders are made.

        Returns:
            The path written.
        """
        return write_atomic(path, json.dumps(seal(self.to_dict()), indent=2) + "\n")


# -- building ---------------------------------------------------------------------------------


def build(
    shape: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
) -> nn.Module:
    """A LLaVA of random weights, to measure speed without a checkpoint.

    Weights are made on the device in the dtype, by repeating a short random block, so that 7B
    parameters take seconds. Its answers mean nothing.

    Args:
        shape: A name for `pore.shapes.llava_config`, such as "llava-1.5-7b" or "llava-1024x12".
        device: Where to build it.
        dtype: Of the weights.
        attention: "sdpa", "eager", "flash_attention_2" or another that transformers knows.
        seed: Seed of the weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        UnsupportedModelError: The name stands for no shape.
        InputError: The attention implementation cannot be used here.
    """
    from transformers import LlavaForConditionalGeneration

    config = llava_config(shape)
    try:
        with torch.device(device):
            model = random_model(LlavaForConditionalGeneration, config, dtype, attention)
    except (ImportError, ValueError) as error:
        raise InputError(f"{shape} cannot be built with attention {attention!r}: {error}") from None
    generator = torch.Generator().manual_seed(seed)
    # A prime length: rows of a matrix do not repeat.
    block = (torch.randn(1_048_573, generator=generator) * 0.02).to(device, dtype)
    for module in model.modules():
        norm = type(module).__name__.lower().endswith("norm")
        for name, parameter in module.named_parameters(recurse=False):
            flat = parameter.data.view(-1)
            if norm or name == "bias":
                flat.fill_(float(name == "weight"))
                continue
            for part in flat.split(len(block)):
                part.copy_(block[: len(part)])
    model.config.name_or_path = f"{shape}, random weights"
    result: nn.Module = model.eval()
    return result


def _inputs(
    model: nn.Module, workload: Workload, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random prompts of one length: text, one image, text."""
    config: Any = model.config
    vision = config.vision_config
    generator = torch.Generator().manual_seed(workload.seed)
    words = [i for i in range(config.text_config.vocab_size) if i != config.image_token_id]
    rows, visual = workload.batch_size, workload.visual

    def text(count: int) -> Tensor:
        drawn = torch.randint(len(words), (rows, count), generator=generator)
        return torch.tensor(words)[drawn]

    image = torch.full((rows, visual), config.image_token_id)
    ids = torch.cat([text(workload.text_before), image, text(workload.text_after)], 1)
    pixels = torch.randn(
        rows, vision.num_channels, vision.image_size, vision.image_size, generator=generator
    )
    # The mask is made for all tokens to come, and each step takes its beginning.
    mask = torch.ones(rows, workload.prompt + workload.new_tokens, dtype=torch.long)
    family = family_of(model)
    named = inspect.signature(family.base(model).forward).parameters
    # Video-LLaVA calls them so in older versions of transformers.
    images = "pixel_values_images" if "pixel_values_images" in named else "pixel_values"
    made = {
        "input_ids": ids.to(device),
        images: pixels.to(device, dtype),
        "attention_mask": mask.to(device),
    }
    types = family.token_types
    if types is not None:  # which processors of such families give
        made[types] = (ids == config.image_token_id).long().to(device)
    return made


# -- the attainable ---------------------------------------------------------------------------


# Decoders by `model_type` whose prefill is no more than what `Attainable` does.
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


class Attainable(Changes):
    """Runs a LLaMA-like decoder on ever shorter sequences, with stock modules and no pruning code.

    Inside the `with` block the decoder's prefill is a plain loop over its layers that takes the
    given positions where a sequence is to become shorter; a decode step is the stock forward over
    the shorter cache. Prompts must have no padding.

    Args:
        decoder: The decoder, with `rotary_emb`, `layers` and `norm`.
        cuts: For each layer where the sequence gets shorter, the (m,) positions it goes on with,
            counted in the sequence that enters that layer. A cut at layer 0 numbers positions anew.
    """

    def __init__(self, decoder: nn.Module, cuts: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._decoder: Any = decoder
        self._cuts = dict(cuts)

    def __enter__(self) -> Attainable:
        super().__enter__()
        self.put(self._decoder, "forward", self._forward)
        return self

    def _forward(self, inputs_embeds: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        decoder, cache = self._decoder, cache_in(kwargs)
        past = cache.get_seq_length()
        if past and attention_name(decoder.config) != "eager":
            # Other kernels need no mask, so that layers with shorter caches are no matter.
            return type(decoder).forward(
                decoder,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask[:, : past + inputs_embeds.shape[1]],
                **kwargs,
            )
        cuts = {} if past else self._cuts
        hidden = inputs_embeds if 0 not in cuts else inputs_embeds[:, cuts[0]]
        positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        rotary = decoder.rotary_emb(hidden, position_ids=positions)
        mask = self._mask(hidden)
        named = cache_argument(decoder.layers[0].forward, cache)
        for i, layer in enumerate(decoder.layers):
            if i > 0 and i in cuts:
                index = cuts[i]
                hidden = hidden[:, index]
                rotary = tuple(table[:, index] for table in rotary)
                mask = self._mask(hidden)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                use_cache=True,
                **named,
            )
        return BaseModelOutputWithPast(decoder.norm(hidden), cache)

    def _mask(self, hidden: Tensor) -> Tensor | None:
        """What the attention needs to be causal: nothing, but for eager."""
        length = hidden.shape[1]
        if length == 1 or attention_name(self._decoder.config) != "eager":
            return None
        closed = torch.finfo(hidden.dtype).min
        return hidden.new_full((length, length), closed).triu(1)[None, None]


def _cuts(tokens: Sequence[int], prompt: int, device: torch.device) -> dict[int, Tensor]:
    """Positions spread evenly: which ones are taken does not change the cost."""
    cuts, before = {}, prompt
    for layer, count in enumerate(tokens):
        if count != before:
            cuts[layer] = torch.linspace(0, before - 1, count, device=device).round().long()
        before = count
    return cuts


# -- timing -----------------------------------------------------------------------------------


class _Clock:
    """Points in time on the device's own line: events of a CUDA stream, else the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def now(self) -> float:
        """Wall clock in ms, when the device is done."""
        self.synchronize()
        return time.perf_counter() * 1e3

    def mark(self) -> Any:
        """A point in time; on CUDA without waiting, so that launches run ahead as ever."""
        if self._device.type != "cuda":
            return self.now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks, once the device is done."""
        if self._device.type != "cuda":
            return float(end - start)
        return float(start.elapsed_time(end))


@dataclass(frozen=True)
class _Sample:
    """One run; as in `Timing`."""

    prefill: float
    ttft: float
    decode: float | None
    peak_memory: int | None
    cache: int


class _Runner:
    """Runs one model on one workload, and times it."""

    def __init__(self, model: nn.Module, workload: Workload) -> None:
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1:
            raise InputError(
                f"The model lies on {len(devices)} devices; speed is measured on one. Load it "
                "without device_map, or on a device where all of it fits."
            )
        unpruned(model)
        self.model = model
        self.family: Family = family_of(model)
        self.device = devices.pop()
        self.dtype = next(model.parameters()).dtype
        self.workload = workload
        self.inputs = _inputs(model, workload, self.device, self.dtype)
        self._clock = _Clock(self.device)

    def run(self, setting: contextlib.AbstractContextManager[Any]) -> _Sample:
        """One run inside a context, which is entered before the clock starts."""
        with setting, torch.inference_mode(), _no_gc():
            return self._run()

    def _run(self) -> _Sample:
        from transformers import DynamicCache

        model, clock, inputs = self.model, self._clock, self.inputs
        config: Any = model.config
        decoder = self.family.decoder(model)
        cache = DynamicCache(config=config.text_config)
        named = cache_argument(model.forward, cache)
        mask, prompt = inputs["attention_mask"], self.workload.prompt
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        marks: list[Any] = []
        with Changes() as changes:
            # Around the hooks of the pruner: what it does in the decoder is part of the prefill.
            changes.before(decoder, lambda *_: marks.append(clock.mark()), prepend=True)
            changes.after(decoder, lambda *_: marks.append(clock.mark()))
            start = clock.now()
            logits = model(
                **{**inputs, "attention_mask": mask[:, :prompt]},
                **named,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            first = clock.now()
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

        steps = self.workload.new_tokens - 1
        begin = clock.now()
        for step in range(1, steps + 1):
            logits = model(
                input_ids=token,
                attention_mask=mask[:, : prompt + step],
                **named,
                use_cache=True,
            ).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        end = clock.now()
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        return _Sample(
            prefill=clock.between(*marks),
            ttft=first - start,
            decode=(end - begin) / steps if steps else None,
            peak_memory=peak,
            cache=size,
        )

    def cost(self, pruner: Pruner) -> tuple[tuple[int, ...], Flops]:
        """Tokens that enter every decoder layer under a pruner and FLOPs of a sample, untimed."""
        run = pruner(self.model)
        self.run(run)
        samples = run.report.samples
        tokens = tuple(map(max, zip(*(sample.tokens for sample in samples), strict=True)))
        costs = [sample.cost for sample in samples if sample.cost is not None]
        return tokens, max(costs, key=lambda cost: cost.total)


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    was = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was:
            gc.enable()


def _timing(samples: Sequence[_Sample]) -> Timing:
    peaks = [s.peak_memory for s in samples if s.peak_memory is not None]
    decode = tuple(s.decode for s in samples if s.decode is not None)
    return Timing(
        prefill=Spread(tuple(s.prefill for s in samples)),
        ttft=Spread(tuple(s.ttft for s in samples)),
        decode=Spread(decode) if decode else None,
        peak_memory=max(peaks, default=None),
        cache=samples[-1].cache,
    )


def device_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """What a device reaches in a large matrix product and a large copy, the best of five.

    Args:
        device: The device.
        dtype: Of the matrices.

    Returns:
        The rates.
    """
    clock = _Clock(device)
    side, count = (2048, 1 << 27) if device.type == "cpu" else (8192, 1 << 30)
    a = torch.ones(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    source = torch.ones(count, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        took = []
        for _ in range(6):
            start = clock.now()
            work()
            took.append((clock.now() - start) / 1e3)
        return min(took[1:])

    return Rates(
        flops=2 * side**3 / best(lambda: torch.matmul(a, a, out=out)),
        bandwidth=2 * count / best(lambda: target.copy_(source)),
    )


def _roofline(runner: _Runner, rates: Rates, flops: Flops, timing: Timing) -> Roofline:
    model, family, batch = runner.model, runner.family, runner.workload.batch_size
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weights = [*family.layers(model), head]
    parameters = [p for module in weights for p in module.parameters()]
    moved = sum(p.nbytes for p in parameters) + timing.cache
    multiplied = 2 * batch * sum(p.numel() for p in parameters if p.dim() > 1)
    return Roofline(
        prefill=batch * flops.decoder / rates.flops * 1e3,
        ttft=batch * flops.total / rates.flops * 1e3,
        decode=max(moved / rates.bandwidth, multiplied / rates.flops) * 1e3,
    )


# -- what is asked for ------------------------------------------------------------------------


def measure(
    model: nn.Module | str,
    pruners: Mapping[str, Pruner] | Sequence[Pruner],
    *,
    batch_size: int = 1,
    text_before: int = 35,
    text_after: int = 20,
    new_tokens: int = 16,
    repeats: int = 10,
    warmup: int = 2,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    seed: int = 0,
    attainable: bool = True,
    command: str | None = None,
    progress: Progress | None = None,
) -> SpeedResult:
    """Time a model unpruned and under pruners, in interleaved runs on random prompts of one image.

    Args:
        model: A model, or the name of a shape to build with random weights.
        pruners: What to compare, by name, or in a sequence to be named after their settings.
        batch_size: Prompts that run together.
        text_before: Text tokens before the image.
        text_after: Text tokens behind it, at least 1.
        new_tokens: Tokens to generate for each prompt, the first included.
        repeats: Timed runs of every setting.
        warmup: Runs of every setting before, thrown away.
        device: Where to build a shape (default: CUDA if there, else the CPU).
        dtype: Of the weights of a shape (default: bfloat16 on CUDA, else float32).
        attention: Attention implementation of a shape (default: "sdpa").
        seed: Seed of prompts and of random weights.
        attainable: Whether to time also the same lengths without pruning code, where the decoder is
            LLaMA-like.
        command: What the user typed, to be written into the result.
        progress: Called before every run with runs done, runs in all, and the setting's name.

    Returns:
        All measurements.

    Raises:
        InputError: A number is out of range, or device, dtype or attention are given for a model
            that has its own.
        ModelStateError: The model is pruned.
        UnsupportedModelError: The sizes of the model are not known, or the shape is none.
        PoreError: A pruner does not fit the model.
    """
    least = {
        "batch_size": (batch_size, 1),
        "text_before": (text_before, 0),
        "text_after": (text_after, 1),
        "new_tokens": (new_tokens, 1),
        "repeats": (repeats, 1),
        "warmup": (warmup, 0),
    }
    for name, (value, bound) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise InputError(f"{name} must be a whole number of at least {bound}, is {value!r}")
    named = _named(pruners)
    if isinstance(model, str):
        model = build(
            model,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32),
            attention=attention or "sdpa",
            seed=seed,
        )
    elif device is not None or dtype is not None or attention is not None:
        raise InputError(
            "device, dtype and attention are for shapes; a loaded model has its own. Load it with "
            "those you want to measure."
        )
    shape = ModelShape.from_config(model.config)
    workload = Workload(
        batch_size, text_before, shape.image_tokens, text_after, new_tokens, repeats, warmup, seed
    )
    runner = _Runner(model, workload)
    decoder: Any = runner.family.decoder(model)
    attainable = attainable and decoder.config.model_type in _LLAMA_LIKE
    tokens = {UNPRUNED: (workload.prompt,) * shape.decoder.layers}
    costs = {UNPRUNED: model_flops(shape, tokens[UNPRUNED])}
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {}
    contexts[UNPRUNED] = contextlib.nullcontext
    for name, pruner in named.items():
        tokens[name], costs[name] = runner.cost(pruner)
        contexts[name] = partial(pruner, model)
        if attainable:
            cuts = _cuts(tokens[name], workload.prompt, runner.device)
            contexts[_attainable(name)] = partial(Attainable, decoder, cuts)
    samples = _interleaved(runner, contexts, progress)
    rates = device_rates(runner.device, runner.dtype)

    settings = []
    for name, counts in tokens.items():
        timing = _timing(samples[name])
        chosen = named.get(name)
        flops = costs[name]
        ideal = samples.get(_attainable(name))
        settings.append(
            SettingResult(
                name=name,
                settings=_settings(chosen) if chosen else {},
                tokens=counts,
                flops=flops,
                timing=timing,
                attainable=_timing(ideal) if ideal else None,
                roofline=_roofline(runner, rates, flops, timing),
            )
        )
    return SpeedResult(
        model=_model(model, shape, runner),
        workload=workload,
        hardware=hardware(runner.device),
        versions=versions(),
        rates=rates,
        settings=tuple(settings),
        command=command,
        date=_now(),
    )


def measure_calibration(
    model: nn.Module,
    layer: int = 2,
    *,
    batch_size: int = 1,
    text_before: int = 35,
    text_after: int = 20,
    repeats: int = 10,
    warmup: int = 2,
    seed: int = 0,
) -> CalibrationResult:
    """Time the forward that calibration makes of a batch, and a bare one of tower and K layers.

    Args:
        model: A model, as loaded or from `build`.
        layer: K, the 0-based index of the first layer to be pruned.
        batch_size: Prompts in one forward.
        text_before: Text tokens before the image.
        text_after: Text tokens behind it, at least 1.
        repeats: Timed runs of each, interleaved.
        warmup: Runs of each before, thrown away.
        seed: Seed of the prompts.

    Returns:
        The measurements.

    Raises:
        BudgetError: The decoder has no such layer to prune.
        InputError: The model lies on several devices.
        ModelStateError: The model is pruned.
        UnsupportedModelError: The sizes of the model are not known.
    """
    from pore.calibration import attention_rows
    from pore.methods import FastV

    shape = ModelShape.from_config(model.config)
    workload = Workload(
        batch_size, text_before, shape.image_tokens, text_after, 0, repeats, warmup, seed
    )
    runner = _Runner(model, workload)
    family, clock = runner.family, _Clock(runner.device)
    check_layer(layer, family, model)
    decoder: Any = family.decoder(model)

    def bare() -> None:
        config, count = decoder.config, decoder.config.num_hidden_layers
        try:
            config.num_hidden_layers = layer
            family.base(model)(**runner.inputs, use_cache=False)
        finally:
            config.num_hidden_layers = count

    works: tuple[Callable[[], object], ...] = (
        partial(attention_rows, model, runner.inputs, FastV(keep=1.0, layer=layer)),
        bare,
    )
    took: tuple[list[float], ...] = ([], [])
    with torch.inference_mode():
        for number in range(warmup + repeats):
            gc.collect()
            for times, work in zip(took, works, strict=True):
                with _no_gc():
                    start = clock.now()
                    work()
                    end = clock.now()
                if number >= warmup:
                    times.append(end - start)
    return CalibrationResult(
        model=_model(model, shape, runner),
        workload=workload,
        hardware=hardware(runner.device),
        versions=versions(),
        layer=layer,
        calibration=Spread(tuple(took[0])),
        attainable=Spread(tuple(took[1])),
        date=_now(),
    )


def _interleaved(
    runner: _Runner,
    contexts: Mapping[str, Callable[[], contextlib.AbstractContextManager[Any]]],
    progress: Progress | None,
) -> dict[str, list[_Sample]]:
    """All settings in turn, again and again: A B C A B C ..."""
    samples: dict[str, list[_Sample]] = {name: [] for name in contexts}
    rounds = runner.workload.warmup + runner.workload.repeats
    done = 0
    for number in range(rounds):
        gc.collect()
        for name, context in contexts.items():
            if progress is not None:
                progress(done, rounds * len(contexts), name)
            sample = runner.run(context())
            done += 1
            if number >= runner.workload.warmup:
                samples[name].append(sample)
    return samples


def _attainable(name: str) -> str:
    return f"{name}, attainable"


def _named(pruners: Mapping[str, Pruner] | Sequence[Pruner]) -> dict[str, Pruner]:
    pairs = (
        list(pruners.items())
        if isinstance(pruners, Mapping)
        else [(_label(pruner), pruner) for pruner in pruners]
    )
    names = {UNPRUNED, *(_attainable(name) for name, _ in pairs)}
    for name, _ in pairs:
        if name in names:
            raise InputError(f"Two settings are named {name!r}; give each its own name.")
        names.add(name)
    return dict(pairs)


def _settings(pruner: Pruner) -> dict[str, str]:
    """The settings of a pruner in words, its method first; a position bias by its kind."""
    words = {"method": pruner.name}
    for item in fields(pruner):  # type: ignore[arg-type]
        value = getattr(pruner, item.name)
        words[item.name] = str(getattr(value, "kind", value))
    return words


def _label(pruner: Pruner) -> str:
    """The method's name with its numbers, and with what else is not its default."""
    words = _settings(pruner)
    parts = []
    for item in fields(pruner):  # type: ignore[arg-type]
        value = getattr(pruner, item.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number or words[item.name] != str(item.default):
            parts.append(f"{item.name}={words[item.name]}")
    return f"{pruner.name}({', '.join(parts)})"


# -- where it was measured --------------------------------------------------------------------


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, as far as speed depends on it.

    Args:
        device: The device of the model.

    Returns:
        Names and sizes, as plain JSON types.
    """
    record: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "peak_memory": "not measured: only CUDA keeps a peak that can be reset for each run",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "peak_memory": "torch.cuda.max_memory_allocated, weights included",
        }
    return record


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that took part, those not installed left out."""
    found = {"python": platform.python_version()}
    for name in ("pore-vlm", "torch", "transformers", "flash-attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _model(model: nn.Module, shape: ModelShape, runner: _Runner) -> dict[str, Any]:
    decoder: Any = runner.family.decoder(model)
    weights = list(model.parameters())
    return {
        "name": names_of(model)["model"],
        "sizes": asdict(shape),
        "parameters": sum(p.numel() for p in weights),
        "weights_bytes": sum(p.nbytes for p in weights),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "attention": attention_name(decoder.config),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


# -- showing ----------------------------------------------------------------------------------


def table(result: SpeedResult) -> Table:
    """A result as a table for the terminal.

    Args:
        result: What `measure` returned.

    Returns:
        One row for each setting; times are medians with quartiles.
    """
    from rich.table import Table

    from pore._text import cell

    model, work = result.model, result.workload
    title = (
        f"{model['name']}, {model['dtype']}, {model['attention']}, batch {work.batch_size}, "
        f"{work.text_before} + {work.visual} + {work.text_after} tokens, "
        f"{result.hardware.get('gpu', result.hardware['cpu'])}"
    )
    caption = f"medians (and quartiles) in ms, of {work.repeats} interleaved runs"
    shown = Table(title=cell(title), caption=caption)
    shown.add_column("setting", overflow="fold")
    shown.add_column("tokens", justify="right", no_wrap=True)
    for header in (
        "TFLOPs",
        "prefill",
        "speed-up",
        "x attainable",
        "first token",
        "decode, a token",
        "cache, MiB",
        "peak, MiB",
    ):
        shown.add_column(header, justify="right")
    unpruned = result.settings[0].timing
    for setting in result.settings:
        timing, ideal = setting.timing, setting.attainable
        peak = timing.peak_memory
        shown.add_row(
            cell(setting.name),
            _steps(setting.tokens),
            f"{setting.flops.total / 1e12:.3g}",
            _cell(timing.prefill),
            _cell(unpruned.prefill.over(timing.prefill), 2),
            "-" if ideal is None else _cell(timing.prefill.over(ideal.prefill), 3),
            _cell(timing.ttft),
            "-" if timing.decode is None else _cell(timing.decode),
            f"{timing.cache / 2**20:,.1f}",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
        )
    return shown


def _cell(spread: Spread, digits: int = 1) -> str:
    return f"{spread.median:.{digits}f}\n({spread.q1:.{digits}f}-{spread.q3:.{digits}f})"


def _steps(tokens: Sequence[int]) -> str:
    """Tokens by layer, a line for each number: `611`, `163 from 2`."""
    parts = [str(tokens[0])]
    for layer in range(1, len(tokens)):
        if tokens[layer] != tokens[layer - 1]:
            parts.append(f"{tokens[layer]} from {layer}")
    return "\n".join(parts)
