"""Questions of one's own, asked under one setting after the other and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.evaluation.batches import Batches
from pore.evaluation.outcome import Outcome
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
    ) -> None:
        self.model, self.processor, self._settings = model, processor, settings
        self._folder = out / "answers"
        self.batches = Batches(
            model, processor, samples, batch_size=settings.batch_size, max_bad=settings.max_bad
        )
        self.batches.sift()
        self.store = Store(self._folder, kept_under(model, processor, self.batches, settings))

    def ask(self, pruner: Pruner | None, advance: Progress, part: range | None = None) -> Outcome:
        """The answers under a setting: those that are kept, or else the model is asked.

        Args:
            pruner: The method, or None for the unpruned model.
            advance: Called with the number of further samples that are done.
            part: The numbers of the batches to ask, if not all; their answers are kept by
                themselves.

        Returns:
            The answers.
        """
        batches, store = self.batches, self.store
        planned = range(len(batches.samples))
        if part is not None:
            planned = batches.of(part)
            store = Store(self._folder, store.conditions | {"batches": [part.start, part.stop]})
        good = [batches.samples[number] for number in planned if number not in batches.skipped]
        kept = store.load(pruner, good)
        if kept is not None:
            advance(len(planned))
            skipped = tuple(batches.skipped[n] for n in planned if n in batches.skipped)
            return Outcome(pruner, kept, skipped=skipped, asked=asked_model(self.model))
        asked = evaluate(
            self.model,
            self.processor,
            batches,
            pruner,
            max_new_tokens=self._settings.max_new_tokens,
            part=part,
            progress=advance,
        )
        store.save(pruner, asked.answers)
        return asked
