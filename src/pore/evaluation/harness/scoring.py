"""Who scores a task of lmms-eval, as its own settings say, before a model is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pore.evaluation.harness.benchmarks import BENCHMARKS, OTHERS, not_scored_here

# What published tables show of a task; of other tasks the first metric counts.
KNOWN = {one.task: one for one in (*BENCHMARKS, *OTHERS)}

_SERVER, _JUDGE = re.compile("submission"), re.compile("gpt|judge|llm", re.IGNORECASE)

# Scorers of MMBench that ask OpenAI which letter an answer means, and without a key draw one.
_DRAWS = re.compile(r"mmbench\w*_eval$")

_INSTEAD = "mmbench_en_dev_static, llava_mmbench and llava_mmbench_cn read it by rules"


def refusal(task: str, config: Mapping[str, Any]) -> str | None:
    """Why a sweep has no score of a task.

    Args:
        task: Its name.
        config: Its settings, functions by their names.

    Returns:
        A sentence or two; None if it has one.
    """
    known, metrics = KNOWN.get(task), _metrics(config)
    kind = config.get("output_type", "generate_until")
    if kind != "generate_until":
        return (
            f"{task} asks for {kind}, such as the likelihood of given answers, and a pruned model "
            "is asked for answers alone (generate_until)."
        )
    if known is not None and known.metric is None:
        return " ".join(not_scored_here([task]))
    if metrics and all(_SERVER.search(name) for name in metrics):
        return (
            f"{task} only writes a file for somebody else to score "
            f"({_measures(metrics)}), and has no score here."
        )
    if not _has_key() and any(map(_DRAWS.search, metrics.values())):
        return (
            f"{task} asks OpenAI which letter an answer means where that is not clear, and without "
            f"a key (OPENAI_API_KEY) takes one by chance; {_INSTEAD}."
        )
    if not _has_key() and known is not None and known.scored == "judge":
        return f"{' '.join(not_scored_here([task]))} Set OPENAI_API_KEY."
    return None


def warning(task: str, config: Mapping[str, Any]) -> str | None:
    """What to know of who scores a task that has a score.

    Args:
        task: Its name.
        config: Its settings, functions by their names.

    Returns:
        A sentence; None if it is scored on this machine.
    """
    known, metrics = KNOWN.get(task), _metrics(config)
    if known is not None:
        return next(iter(not_scored_here([task])), None)
    judged = [
        name
        for name, scorer in metrics.items()
        if _JUDGE.search(name) and not scorer.endswith("static")
    ]
    if not judged:
        return None
    return (
        f"{task} is scored by a judge, as its metrics say ({_measures(judged)}): a model that may "
        "want a key, costs money, and gives another score another day."
    )


def _metrics(config: Mapping[str, Any]) -> dict[str, str]:
    """The names of a task's metrics, each with the name of what makes one number of it."""
    listed = [one for one in config.get("metric_list") or () if isinstance(one, Mapping)]
    found = {}
    for one in listed:
        scorer = one.get("aggregation")
        # Read without its functions, a file has nodes of YAML in their places.
        found[str(one.get("metric"))] = str(getattr(scorer, "value", scorer))
    return found


def _measures(metrics: Iterable[str]) -> str:
    return ", ".join(metrics)


def _has_key() -> bool:
    name = "AZURE_API_KEY" if os.environ.get("API_TYPE") == "azure" else "OPENAI_API_KEY"
    return bool(os.environ.get(name))
