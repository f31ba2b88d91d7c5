"""How one setting is timed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pore._compat.caches import cache_argument
from pore.bench.clock import Clock
from pore.bench.results import Spread, Timing
from pore.bench.setup import random_inputs
from pore.bench.workload import Workload
from pore.changes import Changes
from pore.cost.flops import Flops, model_flops
from pore.cost.shapes import ModelShape
from pore.engine.prefill import TowerWork
from pore.engine.pruner import Pruner
from pore.engine.run import unpruned
from pore.errors import InputError
from pore.families.base import Family
from pore.families.registry import family_of, images_of

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class OneRun:
    """The measurements of one run, as in `Timing`."""

    prefill: float
    ttft: float
    decode: float | None
    peak_memory: int | None
    cache: int


class Runner:
    """Runs one model on one workload, and times it."""

    def __init__(
        self, model: nn.Module, workload: Workload, inputs: dict[str, Any] | None = None
    ) -> None:
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1:
            raise InputError(
                f"The model lies on {len(devices)} devices; speed is measured on one. Load it "
                "without device_map, or on a device that it fits on as a whole."
            )
        unpruned(model)
        self.model = model
        self.family: Family = family_of(model)
        self.device = devices.pop()
        of_model: Any = model
        self.dtype: torch.dtype = of_model.dtype  # not that of packed weights
        self.workload = workload
        self.inputs = inputs or random_inputs(model, workload, self.device, self.dtype)
        self._clock = Clock(self.device)

    @property
    def prefill(self) -> dict[str, Any]:
        """The inputs of the prefill, whose mask covers the prompt alone."""
        return {
            **self.inputs,
            "attention_mask": self.inputs["attention_mask"][:, : self.workload.prompt],
        }

    def run(self, setting: contextlib.AbstractContextManager[Any]) -> OneRun:
        """One run inside a context, which is entered before the clock starts."""
        with setting, torch.inference_mode(), no_gc():
            return self._run()

    def _run(self) -> OneRun:
        from transformers import DynamicCache

        model, clock = self.model, self._clock
        config: Any = model.config
        decoder = self.family.decoder(model)
        cache = DynamicCache(config=config.text_config)
        named = cache_argument(model.forward, cache)
        mask, prompt = self.inputs["attention_mask"], self.workload.prompt
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        marks: list[Any] = []
        with Changes() as changes:
            # Around the pruner's hooks, so that its work in the decoder is part of the prefill.
            changes.before(decoder, lambda *_: marks.append(clock.mark()), prepend=True)
            changes.after(decoder, lambda *_: marks.append(clock.mark()))
            start = clock.now()
            logits = model(
                **self.prefill,
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
            # From a mask, models with positions on several axes count those of all its tokens.
            seen = {} if self.family.mrope else {"attention_mask": mask[:, : prompt + step]}
            logits = model(
                input_ids=token,
                **seen,
                **named,
                use_cache=True,
            ).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        end = clock.now()
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        return OneRun(
            prefill=clock.between(*marks),
            ttft=first - start,
            decode=(end - begin) / steps if steps else None,
            peak_memory=peak,
            cache=size,
        )

    def unpruned_flops(self, shape: ModelShape) -> Flops | None:
        """The FLOPs of one sample without pruning; None if they are not known."""
        if not shape.decoder.known:
            return None
        images = [image for image in images_of(self.model, self.prefill) if image.row == 0]
        work = TowerWork.of(shape, images)
        tokens = (self.workload.prompt,) * shape.decoder.layers
        return model_flops(shape, tokens, images=work.images, projected=work.projected)

    def cost(self, pruner: Pruner) -> tuple[tuple[int, ...], Flops | None]:
        """The tokens that enter every decoder layer under a pruner, and the FLOPs of one sample.

        FLOPs are None if they are not known.
        """
        run = pruner(self.model)
        self.run(run)
        samples = run.report.samples
        tokens = tuple(map(max, zip(*(sample.tokens for sample in samples), strict=True)))
        costs = [sample.cost for sample in samples if sample.cost is not None]
        return tokens, max(costs, key=lambda cost: cost.total, default=None)


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    was = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was:
            gc.enable()


def timing(runs: Sequence[OneRun]) -> Timing:
    """All runs of a setting, put together."""
    peaks = [one.peak_memory for one in runs if one.peak_memory is not None]
    decode = tuple(one.decode for one in runs if one.decode is not None)
    return Timing(
        prefill=Spread(tuple(one.prefill for one in runs)),
        ttft=Spread(tuple(one.ttft for one in runs)),
        decode=Spread(decode) if decode else None,
        peak_memory=max(peaks, default=None),
        cache=runs[-1].cache,
    )


def interleaved(
    runner: Runner,
    contexts: Mapping[str, Callable[[], contextlib.AbstractContextManager[Any]]],
    progress: Progress | None,
) -> dict[str, list[OneRun]]:
    """Run all settings in turn, again and again: A B C A B C ..."""
    runs: dict[str, list[OneRun]] = {name: [] for name in contexts}
    rounds = runner.workload.warmup + runner.workload.repeats
    done = 0
    for number in range(rounds):
        gc.collect()
        for name, context in contexts.items():
            if progress is not None:
                progress(done, rounds * len(contexts), name)
            run = runner.run(context())
            done += 1
            if number >= runner.workload.warmup:
                runs[name].append(run)
    return runs


def in_turn(works: Sequence[Callable[[], object]], runner: Runner) -> list[Spread]:
    """Time several functions in turn, again and again; the times are in milliseconds."""
    clock, workload = Clock(runner.device), runner.workload
    took: list[list[float]] = [[] for _ in works]
    with torch.inference_mode():
        for number in range(workload.warmup + workload.repeats):
            gc.collect()
            for times, work in zip(took, works, strict=True):
                with no_gc():
                    start = clock.now()
                    work()
                    end = clock.now()
                if number >= workload.warmup:
                    times.append(end - start)
    return [Spread(tuple(times)) for times in took]
