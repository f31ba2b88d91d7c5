"""Questions of one's own, asked under one setting after the other and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pore._processes import Processes
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.evaluation.batches import Batches
from pore.evaluation.boxes import expected
from pore.evaluation.circumstances import surroundings
from pore.evaluation.metrics import judged
from pore.evaluation.outcome import Answer, Named, Outcome
from pore.evaluation.predictions import Predictions, answered, not_asked
from pore.evaluation.results import SurveySettings
from pore.evaluation.running import asked_model, evaluate
from pore.evaluation.store import Store, are_of, kept_under, plain, read_answers, scored_by
from pore.evaluation.work import Progress


class OwnQuestions:
    """Samples with answers, prepared once; answers that are in the folder already are used.

    What was answered is kept after every batch. Methods that draw by chance are asked all of their
    batches anew, since a draw depends on those before, and so is a setting that processes share.

    Args:
        model: The model.
        processor: Its processor.
        samples: The samples.
        out: The folder of the job; answers go into its folder `answers`. None to keep nothing.
        settings: Size of a batch, longest answer, metric and share of bad samples to skip.
        processes: Those that share the batches; the first reads and writes the folder.
        predictions: Where every answer is written for people; None for nowhere.

    Attributes:
        batches: The samples as inputs of the model.
        store: The answers that are kept, to all samples at once.
        so_far: The answers under the setting that is being asked.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        out: Path | None,
        settings: SurveySettings,
        processes: Processes = Processes(),  # noqa: B008
        predictions: Predictions | None = None,
    ) -> None:
        self.model, self.processor, self._settings = model, processor, settings
        self._folder = None if out is None else out / "answers"
        self._predictions = predictions
        self.so_far: tuple[Answer, ...] = ()
        self.batches = Batches(
            model,
            processor,
            samples,
            batch_size=settings.batch_size,
            max_bad=settings.max_bad,
            processes=processes,
            metric=settings.metric,
        )
        self.batches.sift()
        conditions: dict[str, Any] = {}
        about: dict[str, Any] = {}
        if out is not None:
            conditions = kept_under(model, processor, self.batches, settings)
            # What tasks of lmms-eval in the same sweep have imported takes no part in these.
            here = surroundings(model.device, apart_from=("lmms-eval", "datasets"))
            about = {"metric": settings.metric.name, "circumstances": here}
        self.store = Store(self._folder, conditions, scored_by(self.batches), about)

    def ask(
        self,
        pruner: Pruner | None,
        advance: Progress,
        part: range | None = None,
        *,
        named: Named | None = None,
        **more: Any,
    ) -> Outcome:
        """The answers under a setting: those that are kept, or else the model is asked.

        Args:
            pruner: The method, or None for the unpruned model.
            advance: Called with the number of further samples that are done.
            part: The numbers of the batches to ask, if not all; their answers are kept by
                themselves.
            named: What the setting is called in `predictions.jsonl`, if not by the method itself.
            **more: What is kept with the answers, by name.

        Returns:
            The answers.
        """
        batches, store = self.batches, self.store
        if part is None:
            part = range(len(batches))
        else:
            here = store.conditions | {"batches": [part.start, part.stop]}
            store = Store(self._folder, here, store.scoring, store.about)
        named = Outcome(pruner, ()).named if named is None else named
        alone, self.so_far = batches.processes.alone, ()
        good = [batches.samples[number] for number in self._good(part)]
        kept = alone(lambda: store.load(pruner, good))
        made, written = store.about.get("circumstances", {}), {}
        if kept is not None:
            answers, written = self._scored(kept[0], good), kept[1]
            made = written.get("circumstances", {})
            self._tell(named, part, answers)
            advance(len(batches.of(part)))
        else:
            if batches.processes.size > 1 or (pruner is not None and pruner.draws):
                answers = self._shared(pruner, advance, part)
                self._tell(named, part, answers)
            else:
                answers = self._resumed(pruner, advance, part, store, named)
        skipped = self._skipped(part)
        if written.get("scoring") != store.scoring:  # new, or scored by another rule before
            more |= {"skipped": list(map(list, skipped)), "circumstances": made}
            alone(lambda: store.save(pruner, answers, **more))
        if self._predictions is not None and skipped:
            told = self._predictions
            alone(lambda: told.add(not_asked(named, skipped)))
        return Outcome(
            pruner,
            answers,
            skipped=skipped,
            asked=asked_model(self.model),
            metric=batches.metric.name,
            circumstances=made,
        )

    def _good(self, part: range) -> list[int]:
        return [number for number in self.batches.of(part) if number not in self.batches.skipped]

    def _skipped(self, part: range) -> tuple[Any, ...]:
        known = self.batches.skipped
        return tuple(known[number] for number in self.batches.of(part) if number in known)

    def _scored(self, answers: Sequence[Answer], samples: Sequence[Sample]) -> tuple[Answer, ...]:
        """Kept answers, scored by the right ones of today."""
        return tuple(
            replace(
                answer,
                expected=expected(sample),
                kind=sample.kind,
                third=sample.third,
                **judged(sample, answer.given, self.batches.metric)._asdict(),
            )
            for answer, sample in zip(answers, samples, strict=True)
        )

    def _tell(self, named: Named, part: range, answers: Sequence[Answer]) -> None:
        """Write answers for people."""
        if self._predictions is None:
            return
        told, metric = self._predictions, self.batches.metric.name
        samples = [self.batches.samples[number] for number in self._good(part)]
        lines = answered(named, metric, samples, answers)
        self.batches.processes.alone(lambda: told.add(lines))

    def _resumed(
        self, pruner: Pruner | None, advance: Progress, part: range, store: Store, named: Named
    ) -> tuple[Answer, ...]:
        """Ask batch by batch; those that an interrupted run has asked are not asked again."""
        batches, journal = self.batches, store.journal(pruner)
        for i in part:
            own = range(i, i + 1)
            samples = [batches.samples[number] for number in self._good(own)]
            kept = _kept(journal.batches.get(i), samples)
            if kept is None:
                answers = self._asked(pruner, advance, own)
                journal.add(i, list(map(plain, answers)))
            else:
                answers = self._scored(kept, samples)
                advance(len(batches.of(own)))
            self._tell(named, own, answers)
            self.so_far += answers
        return self.so_far

    def _asked(self, pruner: Pruner | None, advance: Progress, part: range) -> tuple[Answer, ...]:
        """Ask the model."""
        return evaluate(
            self.model,
            self.processor,
            self.batches,
            pruner,
            max_new_tokens=self._settings.max_new_tokens,
            part=part,
            progress=advance,
        ).answers

    def _shared(self, pruner: Pruner | None, advance: Progress, part: range) -> tuple[Answer, ...]:
        """Ask the model; every process asks the batches that are its own."""
        batches = self.batches
        found = [iter(one) for one in batches.meet(lambda: self._asked(pruner, advance, part))]
        return tuple(
            next(found[batches.whose(i, pruner)]) for i in part for _ in batches.numbers(i)
        )


def _kept(entries: Any, samples: Sequence[Sample]) -> tuple[Answer, ...] | None:
    """The answers to these samples in a line of a journal; None if there are none, or others."""
    try:
        answers = None if entries is None else read_answers(entries)
    except (KeyError, TypeError):
        return None
    return answers if answers is not None and are_of(answers, samples) else None
