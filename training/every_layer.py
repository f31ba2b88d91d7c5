"""The bias of every layer of the decoder, and where its attention finds what is asked about."""

from __future__ import annotations

from typing import Any

import numpy as np
from attention_rows import Rows
from kept_objects import budgets, shares
from offline_corrections import FIXED, Correction, LayerRows, explained_by_position, halves, span

MIDDLE = 1
"""Which of the three budgets is used to count objects: a quarter of the tokens."""


def crosswise(correction: Correction, rows: LayerRows) -> Any:
    """Scores of every question by a correction that was fitted to the other half."""
    scores = np.empty(rows.null.shape)
    one, other = halves(len(scores))
    for fitted_to, used_on in ((one, other), (other, one)):
        scores[used_on] = correction(rows[fitted_to])(rows[used_on])
    return scores


def every_layer(rows: Rows) -> list[dict[str, Any]]:
    """For every layer, from records of all: spans, and the share of objects that is kept."""
    n = rows.patches.shape[1]
    keep = budgets(n)[MIDDLE]
    found = []
    for i in range(rows.attention.shape[1]):
        here = LayerRows(rows.attention[:, i], rows.plain[:, i], rows.null[:, i], rows.text[:, i])
        kept = {
            name: round(
                100 * float(shares(crosswise(FIXED[name], here), rows.patches, keep).mean()), 1
            )
            for name in ("none", "geometric mean", "without RoPE")
        }
        found.append(
            {
                "layer": i,
                "span": round(span(here.mean), 2),
                "geometric_span": round(span(np.exp(here.log_mean)), 2),
                "visual_share": round(float(here.scores.sum(-1).mean()), 3),
                "explained_by_position": explained_by_position(here),
                "kept": kept,
            }
        )
    return found
