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
        store: The answers that are kept.
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
        self.batches = Batches(
            model, processor, samples, batch_size=settings.batch_size, max_bad=settings.max_bad
        )
        self.batches.sift()
        self.store = Store(out / "answers", kept_under(model, processor, self.batches, settings))

    def ask(self, pruner: Pruner | None, advance: Progress) -> Outcome:
        """The answers under a setting: those that are kept, or else the model is asked.

        Args:
            pruner: The method, or None for the unpruned model.
            advance: Called with the number of further samples that are done.

        Returns:
            The answers.
        """
        batches = self.batches
        kept = self.store.load(pruner, batches.good)
        if kept is not None:
            advance(len(batches.samples))
            skipped = tuple(batches.skipped[number] for number in sorted(batches.skipped))
            return Outcome(pruner, kept, skipped=skipped, asked=asked_model(self.model))
        longest = self._settings.max_new_tokens
        asked = evaluate(
            self.model, self.processor, batches, pruner, max_new_tokens=longest, progress=advance
        )
        self.store.save(pruner, asked.answers)
        return asked
