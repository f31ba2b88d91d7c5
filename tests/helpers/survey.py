"""Surveys of some methods with a tiny checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pore
from pore.data.loading import load_model
from pore.data.sources import load_samples
from pore.engine.pruner import Pruner
from pore.errors import BudgetError
from pore.evaluation import survey
from pore.evaluation.results import About, SurveyResult, SurveySettings

SETTINGS = SurveySettings(keeps=(0.5, 0.25), batch_size=4, max_new_tokens=3)


ABOUT = About("tiny <model>", "pore evaluate --all", "cal", "test", {"machine": "a & b"})


@dataclass(frozen=True)
class Fussy(pore.Random):
    """Refuses only when it runs, for a reason that its settings do not show."""

    name: ClassVar[str] = "Fussy"
    experimental: ClassVar[bool] = True

    def _select(self, view: Any) -> Any:
        if self.keep == 4:
            raise BudgetError("not four")
        return super()._select(view)


del Pruner.registry["Fussy"]  # other tests must not see it


def some_methods() -> dict[str, type[Pruner]]:
    """A registry of some methods of every kind, and one that refuses only when it runs."""
    names = ("Downsample", "FastV", "FasterVLM", "PyramidDrop", "Random", "SGL", "Scored")
    return {name: pore.methods()[name] for name in names} | {"Fussy": Fussy}


def run_survey(checkpoint: Path, out: Path, **changes: Any) -> SurveyResult:
    """Ask the methods of the registry nine questions, with P measured on six.

    Args:
        checkpoint: The model's folder.
        out: Folder for the results.
        **changes: Arguments of `survey.run` that differ from the usual ones.

    Returns:
        The outcome.
    """
    model, processor = load_model(str(checkpoint))
    given: dict[str, Any] = {
        "calibration": list(load_samples("embedded:calibration", limit=6)),
        "test": list(load_samples("embedded:test", limit=9)),
        "out": out,
        "settings": SETTINGS,
        "about": ABOUT,
    }
    return survey.run(model, processor, **(given | changes))


def labels(records: Any) -> list[tuple[str, str | None, Any]]:
    """Method, bias and budget of every record."""
    return [(r["method"], r["reweight"], r["keep"]) for r in records]
