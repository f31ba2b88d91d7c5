"""The result of one batch of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pore.calibration.seen import one_by_one
from pore.calibration.table import Rows

if TYPE_CHECKING:
    from pore.data.samples import Sample


class BadSample(NamedTuple):
    """A sample that was skipped.

    Attributes:
        id: The sample's id.
        reason: What was wrong with it.
    """

    id: str
    reason: str


class Batch(NamedTuple):
    """The result of some samples that follow those already processed.

    Attributes:
        samples: The samples.
        marks: A mark of each sample, see `pore.calibration.seen`.
        read: What was read for their images, grouped by size.
        bad: The samples that were skipped.
    """

    samples: Sequence[Sample]
    marks: bytes
    read: Sequence[Rows]
    bad: Sequence[BadSample]

    def halves(self, rows: Rows) -> np.ndarray:
        """(n,) which half of the data every image is in.

        Picture and question decide this, so that it does not depend on the order of the samples.

        Args:
            rows: What was read for the images.
        """
        marks = one_by_one(self.marks)
        return np.array([marks[sample][0] & 1 for sample in rows.sample], dtype=int)


def reasons(bad: Sequence[BadSample], opening: str) -> str:
    """Why the first bad samples are bad, as a sentence; empty if there are none."""
    if not bad:
        return ""
    listed = "; ".join(f"{one.id}: {one.reason}" for one in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f" {opening}: {listed}{more}"
