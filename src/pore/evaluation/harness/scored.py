"""What lmms-eval logs of a document, read as the units that a benchmark's score is made of."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from pore.evaluation.units import Units

Entries = Sequence[Mapping[str, Any]]

# MMBench's questions in other orders of their options have numbers that are this much higher.
_ORDER = 1_000_000


def units_of(entries: Sequence[Any], value: float) -> Units | None:
    """The units that a benchmark's score is made of.

    Args:
        entries: What lmms-eval logs of every document for the metric, documents in their order;
            None for documents that it does not count.
        value: The score that the benchmark's own scorer made of them.

    Returns:
        The units; None if they are not known, or do not make this score.
    """
    counted = [entry for entry in entries if entry is not None]
    if not counted or not all(isinstance(entry, Mapping) for entry in counted):
        return None
    for needed, read in _KNOWN:
        if needed <= counted[0].keys():
            for scale in (1.0, 100.0):
                found = read(counted, scale)
                if abs(found.value - value) <= 1e-6 * max(1.0, abs(value)):
                    return found
    return None


def _f1(entries: Entries, scale: float) -> Units:
    """POPE: questions; F1 is the mean over the splits, where documents name one."""
    above, below = [], []
    for entry in entries:
        right, said = entry["ground_truth"], entry["prediction"]
        both = right == said == "yes"
        above.append(scale * 2.0 * both)
        below.append(2.0 * both + ({right, said} == {"yes", "no"}))
    parts = tuple(str(entry.get("category", "")) for entry in entries)
    return Units(tuple(above), tuple(below), parts)


def _images(entries: Entries, scale: float) -> Units:
    """MME: images; a category has accuracy plus the share of images with both answers right."""
    images: dict[tuple[str, str], list[float]] = {}
    for entry in entries:
        image = (str(entry["category"]), str(entry["question_id"]))
        images.setdefault(image, []).append(float(entry["score"]))
    above = (
        scale * (sum(scores) / len(scores) + (sum(scores) == len(scores)))
        for scores in images.values()
    )
    return Units(tuple(above), (1.0,) * len(images), tuple(name for name, _ in images), "sum")


def _orders(entries: Entries, scale: float) -> Units:
    """MMBench: questions; one counts if it was answered rightly in every order of its options."""
    scorer = import_module("lmms_eval.tasks.mmbench.en_utils").mmbench_evaluator
    questions: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        questions.setdefault(int(entry["index"]) % _ORDER, []).append(dict(entry))
    with redirect_stdout(io.StringIO()):  # it prints its tables at every call
        hits = [
            scorer.eval_result(orders, eval_method="static")[0] for orders in questions.values()
        ]
    return Units.of_scores([scale * float(hit) for hit in hits])


def _categories(entries: Entries, scale: float) -> Units:
    """MMStar: questions; the mean over the categories counts."""
    scores = tuple(scale * float(entry["score"]) for entry in entries)
    parts = tuple(str(entry["l2_category"]) for entry in entries)
    return Units(scores, (1.0,) * len(scores), parts)


# By what a document's entry holds.
_KNOWN: tuple[tuple[frozenset[str], Callable[[Entries, float], Units]], ...] = (
    (frozenset({"l2_category", "score"}), _categories),
    (frozenset({"question_id", "ground_truth", "prediction"}), _f1),
    (frozenset({"question_id", "category", "score"}), _images),
    (frozenset({"index", "A", "prediction", "L2-category"}), _orders),
)
