"""What `Calibration.diagnose` says about a real language model's recorded attention, as a table.

    python training/diagnoses.py --folder runs/smollm2

It reads the calibration records that `attention_rows.py` wrote. It uses no test question, so that
the verdicts can be compared with what P does on test questions
(docs/results-real-language-model.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from attention_rows import LAYERS, load, records_of
from offline_corrections import halves

from pore.calibration.diagnosing import of_positions

KINDS = ("exponential", "spline", "empirical")


def verdicts(folder: Path, tokens: int, kind: str) -> list[str]:
    """The verdict on a form of P at every recorded layer, a quarter of the tokens kept."""
    attention = load(records_of(folder, tokens, "calibration")).attention
    found: list[str] = []
    for layer in range(len(LAYERS)):
        scores = attention[:, layer].astype(np.float64).mean(1)
        both = [(len(each), scores[each].mean(0)) for each in halves(len(scores))]
        mean, spread = scores.mean(0), scores.std(0, ddof=1)
        found.append(of_positions(mean, spread, both, kind, 0.25).verdict)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[144, 576])
    options = parser.parse_args()
    print("| tokens | P |", " | ".join(f"K = {layer + 1}" for layer in LAYERS), "|")
    print("|---|---|", "---|" * len(LAYERS), sep="")
    for tokens in options.tokens:
        for kind in KINDS:
            print(f"| {tokens} | {kind} |", " | ".join(verdicts(options.folder, tokens, kind)), "|")


if __name__ == "__main__":
    main()
