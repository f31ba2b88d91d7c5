"""`pore evaluate --method`: one method at several budgets, with P and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore._progress import progress
from pore.cli.options import method_of, metric_of
from pore.cli.printing import note, print_results, say

if TYPE_CHECKING:
    from pore.bench.results import Spread
    from pore.cli.evaluate_options import Options
    from pore.data.samples import Sample
    from pore.engine.corrections import Correction
    from pore.engine.pruner import Pruner
    from pore.evaluation.differences import Difference
    from pore.evaluation.outcome import Outcome
    from pore.evaluation.records import Record
    from pore.evaluation.work import Work

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
    from pore.evaluation.work import Work

    guiding = None
    if is_guided(options.method):
        guiding = Guiding(
            *(guide or (model, processor)),
            max_new_tokens=options.max_new_tokens,
            itself=guide is None,
        )
    some = samples[:_COUNTED]
    biases = biases_named(options.reweight, options.allow or (), model, processor, some)
    more = {"guide": guiding, **sizes_asked(options, model, processor, some)}
    pruners = _pruners(options, model, keeps, biases, more)
    with progress() as told:
        job = _Job(options, model, processor, samples, Work(len(samples) * len(pruners), told))
        try:
            outcomes = job.outcomes(pruners)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(job.interrupted(pruners)) from error
    records = records_of(outcomes)
    written = () if options.out is None else job.write(outcomes)
    print_results(records)
    say(*skips(records), *footnotes(records))
    hosts = {outcome.keep: outcome for outcome in outcomes[1:] if outcome.reweight is None}
    differences = [
        compare(hosts[with_p.keep], with_p, seed=options.seed)
        for with_p in outcomes[1:]
        if with_p.reweight is not None and with_p.keep in hosts
    ]
    say(*map(str, differences))
    if options.out is not None:
        # Without a pair to compare, the page says what pruning costs.
        shown = differences or [
            compare(outcomes[0], pruned, seed=options.seed) for pruned in outcomes[1:]
        ]
        written = (*written, _write_page(options, model, records, shown))
        note(f"Wrote {' and '.join(map(str, written))}.")


def _write_page(
    options: Options, model: Any, records: Sequence[Record], differences: Sequence[Difference]
) -> Path:
    from pore.cli.about import about
    from pore.evaluation.page import write_single

    assert options.out is not None
    told = about(
        options.model,
        model,
        calibration=", ".join(options.reweight or ()),
        test=str(options.samples),
        seed=options.seed,
    )
    return write_single(records, differences, told, options.out)


def sizes_asked(
    options: Options, model: Any, processor: Any, samples: Sequence[Sample]
) -> dict[str, Any]:
    """What --average has to know of images that differ in their number of tokens.

    Args:
        options: The options of the command.
        model: The model.
        processor: Its processor.
        samples: The questions.

    Returns:
        Arguments of `pore.methods.making.make`; none where images have one size.
    """
    from pore.evaluation.batches import Batches
    from pore.evaluation.sizes import ImageSizes, images_asked
    from pore.families.registry import family_of

    if not options.average or family_of(model).common_grid(model) is not None:
        return {}
    some = samples[:_COUNTED]
    batches = Batches(model, processor, some, batch_size=options.batch_size, max_bad=1)
    return {"visual": ImageSizes.of(model, images_asked(batches)).usual, "shares": True}


def _pruners(
    options: Options,
    model: Any,
    keeps: Sequence[int | float],
    biases: Sequence[Correction] | None,
    more: Mapping[str, Any],
) -> list[Pruner | None]:
    """None for the unpruned model, then the method at every budget, without P and then with P.

    Without P it is left out if it cannot do without.
    """
    from pore.evaluation.reweighting import with_and_without

    pruners: list[Pruner | None] = [None]
    for keep in keeps:
        pruner = method_of(options, model, keep, **more)
        pruners += with_and_without(pruner, biases)
    return pruners


class _Job:
    """Asks one setting after the other; with a folder, what was asked before is taken from there.

    Args:
        options: The options of the command.
        model: The model.
        processor: Its processor.
        samples: The questions.
        work: The progress.
    """

    def __init__(
        self,
        options: Options,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        work: Work,
    ) -> None:
        from pore.cli.about import command_line
        from pore.evaluation.circumstances import circumstances
        from pore.evaluation.own import OwnQuestions
        from pore.evaluation.predictions import Predictions
        from pore.evaluation.results import SurveySettings
        from pore.identity import forget

        forget(model)  # so that a change of the weights since the last call is noticed
        self._options, self._work = options, work
        self._made = circumstances(model.device, options.seed, command_line())
        settings = SurveySettings(
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            max_bad=options.max_bad,
            metric=metric_of(options),
        )
        work.start("looking at the samples")
        out = options.out
        told = None if out is None else Predictions(out)
        self._questions = OwnQuestions(model, processor, samples, out, settings, predictions=told)
        self._done: list[Outcome] = []

    def outcomes(self, pruners: Sequence[Pruner | None]) -> list[Outcome]:
        """The results of every setting, over the questions that all of them answered."""
        from pore.evaluation.outcome import common
        from pore.evaluation.running import time_prefill
        from pore.evaluation.store import kept_times

        questions, out = self._questions, self._options.out
        for pruner in pruners:
            self._work.start(f"asking: {_words(pruner)}")
            self._done.append(questions.ask(pruner, self._work.done(1.0)))
            if out is not None:  # so that they are kept if a later one fails
                self.write(self._done)
        found = common(self._done)
        if not self._options.timing:
            return found
        self._work.start("timing the prefill")

        def measured() -> list[Spread]:
            return time_prefill(questions.model, questions.batches, pruners, count=1)

        here = {**questions.store.conditions, "device": str(questions.model.device)}
        times = (
            measured() if out is None else kept_times(out / "timing.json", here, pruners, measured)
        )
        return [replace(o, prefill=spent) for o, spent in zip(found, times, strict=True)]

    def write(self, outcomes: Sequence[Outcome]) -> tuple[Path, ...]:
        """Write the results of all settings so far."""
        from pore.evaluation.files import Results, write_results
        from pore.evaluation.outcome import questions_of, records_of

        assert self._options.out is not None
        results = Results(self._made, questions_of(outcomes), records_of(outcomes))
        return write_results(self._options.out, results)

    def interrupted(self, pruners: Sequence[Pruner | None]) -> str:
        """What is known where a run is interrupted; the tables of what is done are printed."""
        from pore.evaluation.outcome import Outcome, common, records_of

        done, out = self._done, self._options.out
        if done and out is None:
            print_results(records_of(common(done)))
        said = [f"{len(done)} of {len(pruners)} settings are done."]
        part = self._questions.so_far
        if len(done) < len(pruners) and part:
            pruner, n = pruners[len(done)], len(self._questions.batches.good)
            own = Outcome(pruner, part, metric=self._questions.batches.metric.name)
            low, high = own.ci
            said.append(
                f"{_words(pruner)} has answered {len(part)} of {n} questions, "
                f"{100 * own.accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}] so far."
            )
        if out is None:
            said.append("With --out FOLDER nothing is lost, and the same command goes on.")
        else:
            said.append(f"What was answered is kept in {out}: the same command goes on from there.")
        return " ".join(said)


def _words(pruner: Pruner | None) -> str:
    """A setting as messages name it, such as "FastV + PoRe, keep 25 %"."""
    from pore.evaluation.outcome import Outcome
    from pore.plotting.labels import budget_label

    one = Outcome(pruner, ())
    return (
        one.label
        if pruner is None or one.keep is None
        else f"{one.label}, {budget_label(one.keep)}"
    )
