"""The questions about the scenes of the embedded model, as a task of lmms-eval."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pore.data.sources import from_scenes
from pore.evaluation.answers import is_right

if TYPE_CHECKING:
    import datasets
    import PIL.Image


def questions(asked: datasets.Dataset) -> datasets.Dataset:
    """The questions that a data set names, with their pictures.

    Args:
        asked: Rows of `split`, a split of the scenes, and `questions`, how many of it.

    Returns:
        Rows of `image`, `question`, `answer`, `kind` and `third`.
    """
    import datasets

    rows = [
        {
            "image": {"bytes": _png(sample.load_image())},
            "question": sample.question,
            "answer": sample.answer,
            "kind": sample.kind,
            "third": sample.third,
        }
        for row in asked
        for sample in from_scenes(row["split"], row["questions"])
    ]
    text = datasets.Value("string")
    names = ("question", "answer", "kind", "third")
    features = datasets.Features({"image": datasets.Image(), **dict.fromkeys(names, text)})
    return datasets.Dataset.from_list(rows, features=features)


def _png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def picture(doc: Mapping[str, Any]) -> list[PIL.Image.Image]:
    """The picture that a question is about."""
    return [doc["image"]]


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether an answer is right, in all and for the third of the picture that it is about."""
    right = float(is_right(results[0], doc["answer"]))
    scores = {"accuracy": right}
    if doc["third"] is not None:
        scores[f"accuracy_{doc['third']}"] = right
    return scores
