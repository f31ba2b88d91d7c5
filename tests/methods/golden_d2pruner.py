"""Golden files of D²Pruner: a port of it, which is not its authors'."""

from __future__ import annotations

from typing import Any

import torch

import pore
from helpers.golden_models import Worst
from pore.bias.position_bias import PositionBias
from pore.bias.where import Where
from pore.engine.stages import View
from pore.layout import Image, Layout

_RUN = {"drop", "pivot_ratio", "threshold", "prefix"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    params, tensors, worst = file.params, file.tensors, Worst()
    assert params.keys() == {"level", "seed", "runs"}, params.keys()
    kept = {f"{run['prefix']}kept" for run in params["runs"]}
    known = {"attn_score", "bias", "features", "debiased"} | kept
    assert tensors.keys() == known, tensors.keys() ^ known
    mean, features = tensors["bias"], tensors["features"][None]
    n = len(mean)
    divisor = mean.double() + 1e-7  # as the port has it; P alone has no scale
    bias = PositionBias.fit(divisor, "empirical")
    layout = Layout.of([Image(0, 0, range(n))], torch.ones(1, n, dtype=torch.bool))
    scores = bias.correct(tensors["attn_score"][None], Where(layout))
    worst.compare((scores[0] / divisor.mean()).float(), tensors["debiased"])
    for run in params["runs"]:
        assert run.keys() == _RUN, run.keys()
        pruner = pore.D2Pruner(
            max(1, int(n * (1.0 - run["drop"]))),
            reweight=bias,
            pivots=run["pivot_ratio"],
            threshold=run["threshold"],
        )
        view = View(layout, features, None, None, torch.Generator(), norm=lambda x: x)
        made = pruner.choose(view, scores)
        assert made.keep[0].nonzero()[:, 0].tolist() == tensors[f"{run['prefix']}kept"].tolist()
    return worst.value
