"""What the prompts of an evaluation took, prompt by prompt and on average, and the file of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pore._files import write_atomic
from pore._saved.seals import sealed_text
from pore.evaluation.harness.asking import Reply

SCHEMA = "pore.harness"


@dataclass(frozen=True, order=True)
class Asked:
    """What one prompt of a task took.

    Attributes:
        task: The task.
        doc: Number of the document in its data set.
        visual_tokens: Visual tokens that the prompt came with.
        visual_tokens_left: Visual tokens that reached the last layer.
        mean_visual_tokens: Visual tokens averaged over the decoder layers.
        flops: FLOPs of the prefill (true count), or None if the model's sizes are not known.
        unpruned_flops: The same without pruning.
        input_tokens: Tokens of the prompt, visual ones among them.
        output_tokens: Tokens of the answer.
    """

    task: str
    doc: int
    visual_tokens: int
    visual_tokens_left: int
    mean_visual_tokens: float
    flops: int | None
    unpruned_flops: int | None
    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, task: str, doc: int, reply: Reply) -> Asked:
        """What the prompt of a reply took."""
        effort = reply.effort
        return cls(
            task=task,
            doc=doc,
            visual_tokens=effort.seen,
            visual_tokens_left=effort.left,
            mean_visual_tokens=effort.mean_tokens,
            flops=effort.flops,
            unpruned_flops=effort.unpruned_flops,
            input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens,
        )


_AVERAGED = (
    "visual_tokens",
    "visual_tokens_left",
    "mean_visual_tokens",
    "flops",
    "unpruned_flops",
    "input_tokens",
    "output_tokens",
)


def averages(asked: Sequence[Asked]) -> dict[str, Any]:
    """What prompts took on average.

    Args:
        asked: One or more prompts.

    Returns:
        `prompts`, their number; the mean of every number of `Asked` by its name, None where one is
        not known; and `flops_saved`, the share of the unpruned FLOPs that was saved.
    """
    means: dict[str, Any] = {"prompts": len(asked)}
    for name in _AVERAGED:
        values = [getattr(one, name) for one in asked]
        means[name] = None if None in values else sum(values) / len(values)
    flops, before = means["flops"], means["unpruned_flops"]
    means["flops_saved"] = None if flops is None else 1 - flops / before
    return means


def write_report(path: str | Path, about: dict[str, Any], asked: Sequence[Asked]) -> Path:
    """Write what an evaluation took.

    Args:
        path: The JSON file.
        about: The model and the method; versions, commit and hardware.
        asked: The prompts.

    Returns:
        The file.
    """
    tasks: dict[str, list[Asked]] = {}
    for one in sorted(asked, key=lambda one: (one.task, one.doc)):
        tasks.setdefault(one.task, []).append(one)
    document = {
        "schema": SCHEMA,
        "version": 1,
        **about,
        "flops_count": "true",
        "tasks": {task: averages(own) for task, own in tasks.items()},
        "prompts": [asdict(one) for own in tasks.values() for one in own],
    }
    return write_atomic(path, sealed_text(document))
