"""Draw the figures of results-real-language-model.md from its results, and write its tables.

    python docs/real_language_model_figures.py

Reads `benchmarks/results/real-language-model.json`, writes into `docs/images` and into the page.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import real_language_model_tables as tables

from pore.bias import PositionBias
from pore.errors import ProfileError
from pore.plotting.style import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION, style

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "real-language-model.json"
CURVES = {"exponential": VERMILION, "spline": BLUE}
KEPT = {"none": BLACK, "geometric mean": GREEN, "without RoPE": ORANGE}
LOWEST, HIGHEST = 1e-2, 30.0


def main() -> None:
    """Draw both figures and write the tables."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(12, 5.4), layout="constrained")
        bias(figure, {n: found["sizes"][n]["layers"] for n in ("144", "576")})
        figure.savefig(DOCS / "images" / "real-language-model-bias.png", dpi=110)
        figure = Figure(figsize=(12, 3.4), layout="constrained")
        every_layer(figure, found["every_layer"])
        figure.savefig(DOCS / "images" / "real-language-model-layers.png", dpi=110)
    page = DOCS / "results-real-language-model.md"
    text = page.read_text(encoding="utf-8")
    for name, table in {
        "biases": tables.biases(found),
        "overview": tables.overview(found),
        **{f"quarter-{n}": tables.quarter(found, n) for n in ("144", "576")},
        **{f"budgets-{n}": tables.budgets_of(found, n) for n in ("144", "576")},
        "thirds": tables.thirds(found),
        "forms": tables.forms(found),
        "fewer": tables.fewer(found),
    }.items():
        text = re.sub(
            rf"(?s)(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            text,
        )
    page.write_text(text, encoding="utf-8")


def bias(figure: Any, sizes: dict[str, Any]) -> None:
    """Mean and geometric mean of the attention over position, with the curves fitted to it."""
    panels = figure.subplots(len(sizes), 5, sharey=True, squeeze=False)
    for row, (n, layers) in zip(panels, sizes.items(), strict=True):
        for panel, (name, layer) in zip(row, layers.items(), strict=True):
            mean, middle = np.array(layer["mean"]), np.array(layer["geometric_mean"])
            panel.semilogy(mean, color=GREY, linewidth=0.7, label="mean Ā")
            panel.semilogy(middle, color=GREEN, linewidth=0.7, label="geometric mean")
            refused = []
            for kind, color in CURVES.items():
                try:
                    curve = PositionBias.fit(mean, kind).values.numpy()  # type: ignore[arg-type]
                except ProfileError:
                    refused.append(kind)
                    continue
                panel.semilogy(curve, color=color, label=f"{kind} fitted to Ā")
            panel.set_title(f"{n} tokens, {name}")
            panel.set_ylim(LOWEST, HIGHEST)
            panel.set_xlim(0, len(mean) - 1)
            plain_numbers(panel)
            if refused:
                text = f"{' and '.join(refused)}:\nno fit that can be divided by"
                panel.text(0.03, 0.04, text, transform=panel.transAxes, fontsize=8)
        row[0].set_ylabel("attention over its mean")
    for panel in panels[-1]:
        panel.set_xlabel("visual token, in reading order")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def plain_numbers(panel: Any) -> None:
    """Powers of ten as numbers: the style reads no formulas."""
    panel.yaxis.set_major_formatter("{x:g}")


def every_layer(figure: Any, sizes: dict[str, Any]) -> None:
    """How much the end is favoured at every layer, and how much of what is asked about is kept."""
    left, *right = figure.subplots(1, 1 + len(sizes))
    for (n, layers), line in zip(sizes.items(), ("-", "--"), strict=True):
        index = [one["layer"] for one in layers]
        spans = [one["span"] for one in layers]
        left.semilogy(index, spans, line, color=GREY, label=f"mean Ā, {n} tokens")
        spans = [one["geometric_span"] for one in layers]
        left.semilogy(index, spans, line, color=GREEN, label=f"geometric mean, {n} tokens")
    left.axhline(1, color=BLACK, linewidth=0.6)
    left.set_title("Attention of the last twelfth over the first")
    left.set_ylim(3e-3, 3e4)
    left.legend(loc="upper right", fontsize=8)
    plain_numbers(left)
    for panel, (n, layers) in zip(right, sizes.items(), strict=True):
        for name, color in KEPT.items():
            index = [one["layer"] for one in layers]
            panel.plot(index, [one["kept"][name] for one in layers], color=color, label=name)
        panel.axhline(25, color=GREY, linewidth=0.8, linestyle=":", label="chance")
        panel.set_ylim(0, 100)
        panel.set_title(f"Objects kept, %: a quarter of {n} tokens")
        panel.legend(ncols=2, loc="lower right", fontsize=8)
    for panel in (left, *right):
        panel.set_xlabel("layer whose attention ranks")


if __name__ == "__main__":
    main()
