"""Compare corrections of the position bias on recorded attention of a real language model.

    python training/compare_corrections.py --rows runs/smollm2/rows --tokens 144 576 --out out.json

Everything that is chosen is chosen on calibration questions; test questions are scored once.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attention_rows import LAYERS, Rows, load
from kept_objects import budgets, result, shares

from corrections import (
    CHOSEN,
    CURVES,
    FIXED,
    Correction,
    Floats,
    LayerRows,
    at_layer,
    best_curve,
    best_strength,
    divided,
    held_out_error,
)
from pore.bias import PositionBias
from pore.errors import ProfileError


def span(curve: Floats) -> float:
    """Mean over the last twelfth of the positions over that of the first."""
    twelfth = len(curve) // 12
    return float(curve[-twelfth:].mean() / curve[:twelfth].mean())


def about_curve(rows: LayerRows, kind: Any) -> dict[str, Any]:
    """What can be told of a fit from calibration questions alone."""
    try:
        fitted = PositionBias.fit(rows.mean, kind)
    except ProfileError as error:
        return {"refused": str(error)}
    values = fitted.values.numpy()
    return {
        "r2": round(fitted.r2 or 0.0, 3),
        "span": round(span(values), 2),
        "last_over_first": round(fitted.growth, 2),
        "greatest_over_least": round(float(values.max() / values.min()), 2),
        "held_out_error": round(held_out_error(rows, kind), 4),
    }


def spread_follows_mean(rows: LayerRows) -> float:
    """Slope of ln(standard deviation over questions) on ln(mean), over positions.

    Where attention is P times what a token is worth, the standard deviation is in proportion to the
    mean, and the slope is 1; where position adds to attention, it is 0.
    """
    scores = rows.scores.astype(np.float64)
    slope: float = np.polyfit(np.log(scores.mean(0)), np.log(scores.std(0)), 1)[0]
    return round(float(slope), 2)


def explained_by_position(rows: LayerRows) -> float:
    """Share of the variance of ln A within an image that the position explains.

    It needs no labels: it can be told of any model and any pictures.
    """
    logs = np.log(rows.scores.astype(np.float64))
    logs -= logs.mean(1, keepdims=True)
    return round(float(logs.mean(0).var() / logs.var()), 3)


def chosen(
    calibration: LayerRows, patches: Any, n: int
) -> tuple[dict[str, Correction], dict[str, Any]]:
    """Corrections whose settings calibration questions decide, and what they decided."""

    def judge(scores: Floats, questions: Any) -> float:
        each = [shares(scores, patches[questions], keep).mean() for keep in budgets(n)]
        return float(np.mean(each))

    kind = best_curve(calibration)
    made: dict[str, Correction] = {"least held-out error": partial(divided, kind=kind)}
    settings: dict[str, Any] = {"least held-out error": kind}
    for name, options in CHOSEN.items():
        try:
            settings[name] = best_strength(calibration, options, judge)
        except ProfileError:
            continue
        made[name] = options[settings[name]]
    return made, settings


def compare(calibration: Rows, test: Rows) -> dict[str, Any]:
    """All corrections at all layers and budgets, for one size of picture."""
    n = test.patches.shape[-1]
    found: dict[str, Any] = {}
    for layer in LAYERS:
        known, asked = at_layer(calibration, layer), at_layer(test, layer)
        more, settings = chosen(known, calibration.patches, n)
        results: dict[str, Any] = {}
        for name, correction in {**FIXED, **more}.items():
            try:
                scores = correction(known)(asked)
            except ProfileError as error:
                results[name] = {"refused": str(error)}
                continue
            results[name] = {
                str(keep): result(scores, asked.scores, test.patches, keep) for keep in budgets(n)
            }
        found[f"K = {layer + 1}"] = {
            "measured_span": round(span(known.mean), 2),
            "measured_greatest_over_least": round(float(known.mean.max() / known.mean.min()), 2),
            "visual_share": round(float(known.scores.sum(-1).mean()), 3),
            "spread_follows_mean": spread_follows_mean(known),
            "explained_by_position": explained_by_position(known),
            "geometric_span": round(span(np.exp(known.log_mean)), 2),
            "curves": {kind: about_curve(known, kind) for kind in CURVES},
            "settings": settings,
            "results": results,
        }
    return {"calibration": len(calibration), "test": len(test), "layers": found}


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description="Compare corrections of the position bias.")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[144, 576])
    parser.add_argument("--test", default="test", help="split that is scored")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {}
    for tokens in arguments.tokens:
        calibration = load(arguments.rows / f"{tokens}-calibration")
        test = load(arguments.rows / f"{tokens}-{arguments.test}")
        found[str(tokens)] = compare(calibration, test)
        show(tokens, found[str(tokens)])
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def show(tokens: int, found: dict[str, Any]) -> None:
    """Print the tables of one size."""
    print(f"\n{tokens} visual tokens, {found['calibration']} and {found['test']} questions")
    for name, layer in found["layers"].items():
        print(f"\n{name}: span {layer['measured_span']}, settings {layer['settings']}")
        print("  ", layer["curves"])
        for correction, by_keep in layer["results"].items():
            if "refused" in by_keep:
                print(f"  {correction:28} refused")
                continue
            cells = [
                f"{r['kept']:5.1f} {r['difference']:+5.1f} ± {r['half_width']:3.1f} "
                f"({'/'.join(f'{t:.0f}' for t in r['thirds'].values())})"
                for r in by_keep.values()
            ]
            print(f"  {correction:28}", " | ".join(cells))


if __name__ == "__main__":
    main()
