"""Questions of one's own, asked under one setting after the other and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pore._processes import Processes
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.evaluation.batches import Batches
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.results import SurveySettings
from pore.evaluation.running import asked_model, evaluate
from pore.evaluation.store import Store, kept_under
from pore.evaluation.work import Progress


class OwnQuestions:
    """Samples with answers, prepared once; answers that are in the folder already are used.

    Args:
        model: The model.
        processor: Its processor.
        samples: The samples.
        out: The folder of the job; answers go into its folder `answers`.
        settings: Size of a batch, longest answer and share of bad samples to skip.
        processes: Those that share the batches; the first reads and writes the folder.

    Attributes:
        batches: The samples as inputs of the model.
        store: The answers that are kept, to all samples at once.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        out: Path,
        settings: SurveySettings,
        processes: Processes = Processes(),  # noqa: B008
    ) -> None:
        self.model, self.processor, self._settings = model, processor, settings
        self._folder = out / "answers"
        self.batches = Batches(
            model,
            processor,
            samples,
            batch_size=settings.batch_size,
            max_bad=settings.max_bad,
            processes=processes,
        )
        self.batches.sift()
        self.store = Store(self._folder, kept_under(model, processor, self.batches, settings))

    def ask(
        self,
        pruner: Pruner | None,
        advance: Progress,
        part: range | None = None,
        **more: Any,
    ) -> Outcome:
        """The answers under a setting: those that are kept, or else the model is asked.

        Args:
            pruner: The method, or None for the unpruned model.
            advance: Called with the number of further samples that are done.
            part: The numbers of the batches to ask, if not all; their answers are kept by
                themselves.
            **more: What is kept with the answers, by name.

        Returns:
            The answers.
        """
        batches, store = self.batches, self.store
        if part is None:
            part = range(len(batches))
        else:
            store = Store(self._folder, store.conditions | {"batches": [part.start, part.stop]})
        planned, alone = batches.of(part), batches.processes.alone
        good = [batches.samples[number] for number in planned if number not in batches.skipped]
        answers = alone(lambda: store.load(pruner, good))
        if answers is None:
            answers = self._asked(pruner, advance, part)
            alone(lambda: store.save(pruner, answers, **more))
        else:
            advance(len(planned))
        skipped = tuple(batches.skipped[number] for number in planned if number in batches.skipped)
        return Outcome(pruner, answers, skipped=skipped, asked=asked_model(self.model))

    def _asked(self, pruner: Pruner | None, advance: Progress, part: range) -> tuple[Answer, ...]:
        """Ask the model; every process asks the batches that are its own."""
        batches = self.batches

        def ask() -> tuple[Answer, ...]:
            return evaluate(
                self.model,
                self.processor,
                batches,
                pruner,
                max_new_tokens=self._settings.max_new_tokens,
                part=part,
                progress=advance,
            ).answers

        found = [iter(one) for one in batches.meet(ask)]
        return tuple(
            next(found[batches.whose(i, pruner)]) for i in part for _ in batches.numbers(i)
        )
