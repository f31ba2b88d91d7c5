"""`pore evaluate --method`: one method at several budgets, with P and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore._progress import progress
from pore.cli.options import method_of
from pore.cli.printing import print_results, say

if TYPE_CHECKING:
    from pore.cli.evaluate_options import Options
    from pore.data.samples import Sample
    from pore.engine.corrections import Correction
    from pore.engine.pruner import Pruner
    from pore.evaluation.guided import Guiding
    from pore.evaluation.outcome import Outcome

# How many samples the RoPE prior counts the text tokens of.
_COUNTED = 64


def is_guided(method: str) -> bool:
    """Whether a method of this name takes a model that guides it."""
    from pore.methods.registry import methods

    return any(kind.guided for name, kind in methods().items() if name.lower() == method.lower())


def ask_one(
    options: Options,
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    keeps: Sequence[int | float],
    guide: tuple[Any, Any] | None,
) -> None:
    """Ask the unpruned model and a method at every budget, without P and with it; print both.

    Args:
        options: The options of the command.
        model: The model.
        processor: Its processor.
        samples: The questions.
        keeps: The budgets.
        guide: The model that guides the method, and its processor; None for the model itself.
    """
    from pore.evaluation.differences import compare
    from pore.evaluation.findings import footnotes, skips
    from pore.evaluation.guided import Guiding
    from pore.evaluation.outcome import records_of
    from pore.evaluation.reweighting import biases_named

    guiding = None
    if is_guided(options.method):
        guiding = Guiding(
            *(guide or (model, processor)),
            max_new_tokens=options.max_new_tokens,
            itself=guide is None,
        )
    some = samples[:_COUNTED]
    biases = biases_named(options.reweight, options.allow or (), model, processor, some)
    pruners = _pruners(options, model, keeps, biases, guiding)
    outcomes = _outcomes(options, model, processor, samples, pruners)
    records = records_of(outcomes)
    written = () if options.out is None else _write(options, model, outcomes)
    print_results(records)
    say(*skips(records), *footnotes(records))
    if biases is not None:
        hosts = {outcome.keep: outcome for outcome in outcomes[1:] if outcome.reweight is None}
        for with_p in outcomes[1:]:
            if with_p.reweight is not None and with_p.keep in hosts:
                say(str(compare(hosts[with_p.keep], with_p, seed=options.seed)))
    if written:
        say(f"Wrote {' and '.join(map(str, written))}.")


def _write(options: Options, model: Any, outcomes: Sequence[Outcome]) -> tuple[Path, ...]:
    """Write the results of all settings so far."""
    from pore.cli.about import command_line
    from pore.evaluation.circumstances import circumstances
    from pore.evaluation.files import Results, write_results
    from pore.evaluation.outcome import questions_of, records_of

    assert options.out is not None
    made = circumstances(model.device, options.seed, command_line())
    return write_results(options.out, Results(made, questions_of(outcomes), records_of(outcomes)))


def _pruners(
    options: Options,
    model: Any,
    keeps: Sequence[int | float],
    biases: Sequence[Correction] | None,
    guiding: Guiding | None,
) -> list[Pruner | None]:
    """None for the unpruned model, then the method at every budget, without P and then with P.

    Without P it is left out if it cannot do without.
    """
    from pore.evaluation.reweighting import with_and_without

    pruners: list[Pruner | None] = [None]
    for keep in keeps:
        pruner = method_of(options, model, keep, guide=guiding)
        pruners += with_and_without(pruner, biases)
    return pruners


def _outcomes(
    options: Options,
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    pruners: Sequence[Pruner | None],
) -> list[Outcome]:
    """The results of every setting, over the questions that all of them answered."""
    from pore.evaluation.batches import Batches
    from pore.evaluation.outcome import common
    from pore.evaluation.running import evaluate as ask
    from pore.evaluation.running import time_prefill
    from pore.evaluation.work import Work

    batches = Batches(
        model, processor, samples, batch_size=options.batch_size, max_bad=options.max_bad
    )
    outcomes: list[Outcome] = []
    with progress() as told:
        work = Work(len(samples) * len(pruners), told)
        work.start("looking at the samples")
        batches.sift()
        work.start("asking")
        for pruner in pruners:
            outcomes.append(
                ask(
                    model,
                    processor,
                    batches,
                    pruner,
                    max_new_tokens=options.max_new_tokens,
                    progress=work.done(1.0),
                )
            )
            if options.out is not None:  # so that they are kept if a later one fails
                _write(options, model, outcomes)
        outcomes = common(outcomes)
        if options.timing:
            work.start("timing the prefill")
            times = time_prefill(model, batches, pruners, count=1)
            outcomes = [replace(o, prefill_ms=ms) for o, ms in zip(outcomes, times, strict=True)]
    return outcomes
