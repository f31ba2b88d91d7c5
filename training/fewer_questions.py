"""How many calibration questions a mean and a geometric mean of the attention need."""

from __future__ import annotations

from typing import Any

import numpy as np
from attention_rows import LAYERS, Rows
from kept_objects import budgets, shares
from offline_corrections import FIXED, LayerRows, at_layer

NUMBERS = (10, 20, 40, 75, 150, 300)
DRAWS = 8
TWENTIETH = 20


def from_few(rows: LayerRows) -> float:
    """Share of the mean attention that comes from the twentieth of questions with most of it.

    It is 0.05 if all questions are alike. It is computed at every position and averaged.
    """
    scores = np.sort(rows.scores.astype(np.float64), 0)
    most = scores[-max(len(scores) // TWENTIETH, 1) :].sum(0)
    return round(float((most / scores.sum(0)).mean()), 3)


def fewer_questions(calibration: Rows, test: Rows) -> dict[str, Any]:
    """By layer, correction and number of questions: the gain over no correction, in points.

    Means over `DRAWS` random choices of that many calibration questions.
    """
    rng = np.random.default_rng(0)
    keeps = budgets(test.patches.shape[1])
    found: dict[str, Any] = {}
    for layer in LAYERS:
        known, asked = at_layer(calibration, layer), at_layer(test, layer)
        plain = [float(shares(asked.scores, test.patches, k).mean()) for k in keeps]
        by_name: dict[str, Any] = {name: {} for name in ("empirical", "geometric mean")}
        for number in (n for n in NUMBERS if n <= len(calibration)):
            draws = [rng.permutation(len(calibration))[:number] for _ in range(DRAWS)]
            for name, by_number in by_name.items():
                scores = [FIXED[name](known[draw])(asked) for draw in draws]
                by_number[str(number)] = [
                    round(
                        100 * (float(np.mean([shares(s, test.patches, k) for s in scores])) - p), 2
                    )
                    for k, p in zip(keeps, plain, strict=True)
                ]
        found[f"K = {layer + 1}"] = by_name
    return found
