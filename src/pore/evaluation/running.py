"""Asking a model questions, pruned and unpruned, through plain calls of `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from pore.bench.results import Spread
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.engine.run import unpruned
from pore.evaluation.batches import Batches
from pore.evaluation.boxes import expected
from pore.evaluation.effort import Effort, pruned_efforts, unpruned_efforts
from pore.evaluation.guided import stretches
from pore.evaluation.metrics import EXACT, Metric, judged
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.work import Progress
from pore.identity import names_of, weights_of

# Samples in the batch that `time_some` measures on, and measurements per method.
_TIMED, _ROUNDS = 8, 5


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample] | Batches,
    pruner: Pruner | None = None,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    max_bad: float = 0.01,
    metric: Metric = EXACT,
    part: range | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Ask a model questions, and compare its greedy answers with the right ones.

    An answer is scored by a metric: by default it is right if it equals one of the accepted ones
    after both are normalised (`answers.normalise`). Where a box is asked for, it is right if it
    overlaps that by half (`boxes`).

    Args:
        model: A supported vision-language model of transformers.
        processor: Its processor.
        samples: Samples with answers; `Batches`, if several methods are to share their preparation.
        pruner: The method (SGL's guide a `guided.Guiding`), or None for the unpruned model.
        batch_size: Samples in one batch; not used with `Batches`, which have their own.
        max_new_tokens: Longest answer.
        max_bad: The share of bad samples up to which they are skipped, as in `Batches`, which have
            their own.
        metric: The rule by which answers are scored (`metrics.METRICS`); not used with `Batches`,
            which have their own.
        part: The numbers of the batches to ask, if not all.
        progress: Called after every batch with the number of samples in it.

    Returns:
        One answer for every good sample, in their order, and the skipped samples, those of the part
        alone. If processes share `Batches`, answers to those of this one.

    Raises:
        ModelStateError: The model is pruned.
        PoreError: Too many samples are bad, or the method does not fit the model.
    """
    unpruned(model)  # a pruned model's answers would not be those of `pruner`
    batches = samples
    if not isinstance(batches, Batches):
        batches = Batches(
            model, processor, batches, batch_size=batch_size, max_bad=max_bad, metric=metric
        )
    part = range(len(batches)) if part is None else part
    asked: list[int] = []
    given: list[str] = []
    efforts: list[Effort] = []
    with torch.inference_mode(), batches.encoding(pruner):
        for one, numbers in stretches(pruner, batches, batches.own(part, pruner)):
            with nullcontext() if one is None else one(model) as run:
                for i in numbers:
                    inputs = batches.of_method(i, pruner)
                    if inputs:
                        asked += batches.numbers(i)
                        if run is None:
                            efforts += unpruned_efforts(model, inputs)
                        tokens = model.generate(
                            **inputs, max_new_tokens=max_new_tokens, do_sample=False
                        )
                        new = tokens[:, inputs["input_ids"].shape[1] :]
                        given += processor.batch_decode(new, skip_special_tokens=True)
                        if progress is not None:
                            progress(len(new))
            if run is not None:
                efforts += pruned_efforts(run.report)
    samples, planned = batches.samples, batches.of(part)
    if progress is not None and len(asked) < len(planned):
        progress(len(planned) - len(asked))
    return Outcome(
        pruner,
        tuple(
            _answer(samples[number], text, effort, batches.metric)
            for number, text, effort in zip(asked, given, efforts, strict=True)
        ),
        skipped=tuple(
            batches.skipped[number]
            for number in planned
            if number in batches.skipped and number not in asked
        ),
        asked=asked_model(model),
        metric=batches.metric.name,
    )


def _answer(sample: Sample, text: str, effort: Effort, metric: Metric) -> Answer:
    return Answer(
        id=sample.id,
        question=sample.question,
        expected=expected(sample),
        given=text.strip(),
        **judged(sample, text, metric)._asdict(),
        kind=sample.kind,
        third=sample.third,
        kept=effort.kept,
        flops=effort.flops,
        extra=effort.extra,
        mean_tokens=effort.mean_tokens,
    )


def asked_model(model: Any) -> dict[str, str | None]:
    """Which model is asked, for `Outcome.asked`."""
    return {**names_of(model), "weights": weights_of(model)}


def time_prefill(
    model: Any,
    batches: Batches,
    pruners: Sequence[Pruner | None],
    *,
    count: int = 2,
    rounds: int = 5,
    progress: Progress | None = None,
) -> list[Spread]:
    """Measure the prefill of every method, from pixels to the logits of the first token.

    Methods take turns within each round, so that a machine that slows down slows all of them, and
    each runs once before anything is measured.

    Args:
        model: The model.
        batches: Inputs; the first `count` batches that have any are used.
        pruners: The methods; None is the unpruned model.
        count: Batches per measurement.
        rounds: Measurements per method.
        progress: Called after every batch with the number of samples in it.

    Returns:
        For each method, the time per sample in milliseconds, once for every round, without the time
        of guides.
    """
    made = ((i, batches.inputs(i)) for i in range(len(batches)))
    inputs = dict(islice(((i, batch) for i, batch in made if batch), count))
    samples = sum(len(batch["input_ids"]) for batch in inputs.values())
    smaller = {
        n: {i: batches.of_method(i, pruner) for i in inputs}
        for n, pruner in enumerate(pruners)
        if pruner is not None and pruner.resizes
    }
    seconds: list[list[float]] = [[] for _ in pruners]
    for measured in [False] + [True] * rounds:
        for n, (times, pruner) in enumerate(zip(seconds, pruners, strict=True)):
            spent, own = 0.0, smaller.get(n, inputs)
            for one, numbers in stretches(pruner, batches, list(inputs)):
                with torch.inference_mode(), nullcontext() if one is None else one(model):
                    _synchronise(model)
                    began = time.perf_counter()
                    for i in numbers:
                        model(**own[i], use_cache=True, logits_to_keep=1)
                    _synchronise(model)
                    spent += time.perf_counter() - began
            if measured:
                times.append(spent)
            if progress is not None:
                progress(samples)
    return [Spread(tuple(1e3 * one / samples for one in times)) for times in seconds]


def time_some(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    pruners: Sequence[Pruner | None],
    progress: Progress | None = None,
) -> list[Spread]:
    """Measure the prefill of every method on the first few samples, one batch of them.

    Args:
        model: The model.
        processor: Its processor.
        samples: The samples, all of them good.
        pruners: The methods; None is the unpruned model.
        progress: Called with the number of samples just measured, `timed_samples` in all.

    Returns:
        As `time_prefill`.
    """
    batches = Batches(model, processor, samples[:_TIMED], batch_size=_TIMED)
    return time_prefill(model, batches, pruners, count=1, rounds=_ROUNDS, progress=progress)


def timed_samples(samples: int, settings: int) -> int:
    """How many samples `time_some` runs, over all settings."""
    return min(samples, _TIMED) * (_ROUNDS + 1) * settings


def _synchronise(model: Any) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
