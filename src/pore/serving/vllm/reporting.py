"""What a vLLM server prunes with, among its metrics: the series `pore_info`, as of `pore serve`.

The process that answers requests also counts their placeholders, and shows the metrics. Where
several processes answer (`--api-server-count`), vLLM has them write metrics to files, for which a
gauge does and Prometheus' own kind for such facts does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pore.engine.pruner import Pruner


def report(model: str | Sequence[str], pruner: Pruner | None) -> None:
    """Set the gauge, which is 1; done again, it changes nothing.

    Args:
        model: What is served, the first of its names.
        pruner: The method; None where requests say what is kept.
    """
    name = "by request" if pruner is None else pruner.name
    settings = "" if pruner is None else repr(pruner)
    model = model if isinstance(model, str) else model[0]
    _gauge().labels(model=model, method=name, settings=settings).set(1)


@cache
def _gauge() -> Any:
    from prometheus_client import Gauge

    labels = ["model", "method", "settings"]
    text = "What is served, and how it is pruned."
    return Gauge("pore_info", text, labelnames=labels, multiprocess_mode="mostrecent")
