"""Compare corrections of the position bias on recorded attention of a real language model.

    python training/compare_corrections.py --folder runs/smollm2 \
        --out benchmarks/results/real-language-model.json

The folder is the one in which the model was built and its attention recorded. All choices are made
on calibration questions; test questions are only scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import size_forms
import smollm2
import torch
from attention_rows import EVERY, FIRST, LAYERS, Rows, load, records_of
from every_layer import every_layer
from fewer_questions import fewer_questions, from_few
from kept_objects import budgets, result, shares
from offline_corrections import (
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
    explained_by_position,
    held_out_error,
    span,
    spread_follows_mean,
)
from real_language_model import SIZES, about_of

from pore.bench.setup import hardware, versions
from pore.bias import PositionBias
from pore.errors import ProfileError

SURELY = 2.576 / 1.96
"""From half the width of a 95 % interval to that of a 99 % one."""


def command_line() -> str:
    """The command as it was given."""
    return " ".join(["python", *sys.argv])


def about_curve(rows: LayerRows, kind: Any) -> dict[str, Any]:
    """What calibration questions alone tell about a fit."""
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


def curve(values: Floats) -> list[float]:
    """A curve over positions for a file, of mean 1."""
    return [float(f"{x:.4g}") for x in values / values.mean()]


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
            "from_few_questions": from_few(known),
            "explained_by_position": explained_by_position(known),
            "geometric_span": round(span(np.exp(known.log_mean)), 2),
            "mean": curve(known.mean),
            "geometric_mean": curve(np.exp(known.log_mean)),
            "curves": {kind: about_curve(known, kind) for kind in CURVES},
            "settings": settings,
            "results": results,
        }
    return {
        "tokens": n,
        "calibration": len(calibration),
        "test": len(test),
        "layers": found,
    }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """For every correction the mean over layers and budgets, and where it harms with p < 0.01.

    If a correction was refused, nothing is corrected, and the difference is 0.
    """
    told: dict[str, Any] = {}
    every = len(found["layers"]) * len(budgets(found["tokens"]))
    for name in {name for layer in found["layers"].values() for name in layer["results"]}:
        cells = {
            f"{layer}, keep {keep}": one
            for layer, all_of in found["layers"].items()
            for keep, one in all_of["results"].get(name, {}).items()
            if keep != "refused"
        }
        harmed = [
            where
            for where, one in cells.items()
            if one["difference"] + SURELY * one["half_width"] < 0
        ]
        differences = [one["difference"] for one in cells.values()]
        told[name] = {
            "mean": round(sum(differences) / every, 2),
            "least": min([*differences, 0.0]) if len(cells) < every else min(differences),
            "cells": len(cells),
            "harmed": harmed,
        }
    return dict(sorted(told.items(), key=lambda item: (-item[1]["mean"], item[0])))


def everything(folder: Path) -> dict[str, Any]:
    """All results, from the files of the other scripts in a folder."""
    records = {
        split: {n: load(records_of(folder, n, split)) for n in SIZES}
        for split in ("calibration", "test")
    }
    sizes = {}
    for n in SIZES:
        sizes[str(n)] = compare(records["calibration"][n], records["test"][n])
        sizes[str(n)]["summary"] = summary(sizes[str(n)])
        show(n, sizes[str(n)])
    forms = size_forms.compare(records["calibration"], records["test"])
    size_forms.show(forms)
    return {
        "what": "Share of the patches of the objects asked about that is kept, in per cent.",
        "command": command_line(),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "package": {"name": smollm2.PACKAGE, "sha256": smollm2.SHA256},
        "first_pictures": FIRST,
        "models": {n: json.loads(about_of(folder, n).read_text()) for n in SIZES},
        "sizes": sizes,
        "forms": forms,
        "fewer_questions": {
            n: fewer_questions(records["calibration"][n], records["test"][n])
            for n in (min(SIZES), max(SIZES))
        },
        "every_layer": {
            n: every_layer(load(records_of(folder, n, EVERY))) for n in (min(SIZES), max(SIZES))
        },
    }


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description="Compare corrections of the position bias.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = everything(arguments.folder)
    parts = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in found.items()]
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    arguments.out.write_text(text, encoding="utf-8")


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
