"""How one setting is timed."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.attention import attention_name
from pore._compat.caches import cache_argument, cache_in
from pore.bench.results import Progress, Rates, Roofline, Spread, Timing, Workload
from pore.bench.setup import _inputs
from pore.changes import Changes
from pore.cost.flops import Flops
from pore.engine.pruner import Pruner
from pore.engine.run import unpruned
from pore.errors import InputError
from pore.families.base import Family
from pore.families.registry import family_of

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
