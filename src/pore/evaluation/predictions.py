"""`predictions.jsonl`: what was answered to every question, under every setting."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pore._files import append, shown, write_atomic
from pore._videos import VideoFile
from pore.data.samples import Sample
from pore.evaluation.batches import Skipped
from pore.evaluation.outcome import Answer, Named
from pore.plotting.labels import UNPRUNED

_FIELDS = (
    *("id", "image", "question", "answers", "prediction", "score", "right", "metric"),
    *("kind", "third", "visual_tokens", "skipped"),
)


class Predictions:
    """A file with a line for every question under every setting, written batch by batch.

    A run writes it anew: answers that were kept from an interrupted run come first, and then those
    that are given now.

    Args:
        folder: The folder of the results.

    Attributes:
        path: The file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "predictions.jsonl"
        self._begun = False

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write some lines.

        Args:
            lines: As from `answered` and `not_asked`.

        Raises:
            OSError: They cannot be written.
        """
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if self._begun:
            append(self.path, text)
        else:
            write_atomic(self.path, text)
            self._begun = True


def answered(
    named: Named, metric: str, samples: Sequence[Sample], answers: Sequence[Answer]
) -> Iterable[dict[str, Any]]:
    """The lines of questions that were asked.

    Args:
        named: The setting.
        metric: The name of the rule by which answers are scored.
        samples: The questions.
        answers: The answer to each.

    Yields:
        A line for each.
    """
    for sample, answer in zip(samples, answers, strict=True):
        image = sample.image.path if isinstance(sample.image, VideoFile) else sample.image
        yield _line(
            named,
            id=answer.id,
            image=shown(image) if isinstance(image, (str, Path)) else None,
            question=answer.question,
            answers=list(sample.accepted or (answer.expected,)),
            prediction=answer.given,
            score=answer.points,
            right=answer.right,
            metric=metric if answer.iou is None else "iou",
            kind=answer.kind,
            third=answer.third,
            visual_tokens=sum(map(len, answer.kept)) + answer.extra,
        )


def not_asked(named: Named, skipped: Iterable[Skipped]) -> Iterable[dict[str, Any]]:
    """The lines of samples that could not be asked.

    Args:
        named: The setting.
        skipped: The samples.

    Yields:
        A line for each.
    """
    for one in skipped:
        yield _line(named, id=one.id, skipped=one.reason)


def _line(named: Named, **more: Any) -> dict[str, Any]:
    """A line, with the same keys and types as any other, as readers of tables want them."""
    method, correction, keep = named
    budget = None if keep is None or method == UNPRUNED else str(keep)
    setting = {"method": method, "reweight": correction, "keep": budget}
    return setting | dict.fromkeys(_FIELDS) | {"answers": []} | more
