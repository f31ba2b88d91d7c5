"""Draw the accuracy of all methods over what they cost, for comparison.md.

    python docs/all_methods_figure.py

Reads the two files of results that comparison.md names, which asked the same questions, and writes
`docs/images/all-methods.png`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import pore
from pore import plotting
from pore.embedded import TAUGHT_LAYER, embedded_model
from pore.evaluation.files import read_records
from pore.evaluation.outcome import Outcome
from pore.families.registry import shape_of

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
AGAIN = {"unpruned", "Random"}  # asked in both runs, with the same answers


def main() -> None:
    """Draw it."""
    records = read_records(RESULTS / "embedded-2100-all.json")
    sweep = json.loads((RESULTS / "embedded-2100-further.json").read_text(encoding="utf-8"))
    shape = shape_of(AutoConfig.from_pretrained(embedded_model()))
    records += [record(row, shape) for row in sweep["rows"] if row["method"] not in AGAIN]
    figure = plotting.accuracy_over_flops(records, TAUGHT_LAYER)
    plotting.save(figure, DOCS / "images" / "all-methods.png")


def record(row: dict[str, Any], shape: Any) -> dict[str, Any]:
    """The row of a sweep as a result of one setting."""
    cell = row["benchmarks"]["samples"]
    kind = pore.methods()[row["method"]]
    pruner = kind.usual(row["keep"], shape)
    assert pruner is not None
    return {
        **row,
        "accuracy": cell["value"] / 100,
        "ci": [end / 100 for end in cell["ci"]],
        "acts_in": Outcome(pruner, ()).acts_in,
        "looks_at": pruner.looks_at,
    }


if __name__ == "__main__":
    main()
