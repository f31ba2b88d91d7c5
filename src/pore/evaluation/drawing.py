"""Figures that several evaluations draw: in a file, and again for a phone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pore import plotting
from pore.evaluation.records import Record
from pore.evaluation.results import Figure


def over_flops(records: Sequence[Record], path: Path, taught: int | None = None) -> Figure | None:
    """Draw accuracy over FLOPs.

    Args:
        records: The records.
        path: The file.
        taught: As in `pore.plotting.labels.marks`.

    Returns:
        The figure; None where no FLOPs are known.

    Raises:
        OSError: The file cannot be written.
    """
    if all(record["flops"] is None for record in records):
        return None
    draw = partial(plotting.accuracy_over_flops, records, taught)
    path = plotting.save(draw(), path)
    return Figure("Accuracy over FLOPs", path, plotting.to_png(draw(narrow=True)))
