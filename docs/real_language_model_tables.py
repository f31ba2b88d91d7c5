"""The tables of results-real-language-model.md, from its results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

KS = ("K = 1", "K = 2", "K = 3", "K = 5", "K = 8")
QUARTER = {"144": "36", "256": "64", "576": "144"}
"""Tokens kept of so many where a table has one budget."""

NAMES = {
    "exponential": "exponential",
    "exponential+offset": "exponential + offset",
    "spline": "spline",
    "empirical": "mean itself (D²Pruner)",
    "rows x columns": "row × column factors of the mean",
    "line through ln A": "exponential, fitted to ln A",
    "spline through ln A": "spline, fitted to ln A",
    "geometric mean": "**geometric mean**",
    "geometric mean, by its share": "geometric mean, as strong as it explains",
    "median": "median",
    "exponential by head": "exponential, per head",
    "empirical by head": "mean, per head",
    "geometric mean by head": "geometric mean, per head",
    "without RoPE": "without RoPE (FEATHER)",
    "without RoPE, spline": "without RoPE, and a spline",
    "null token, P ln(P/Q)": "null token, P · ln(P/Q)",
    "null token, P/Q": "null token, P/Q",
    "null token, P of all text": "null token, P of all text (PriorTR)",
    "least held-out error": "curve of least held-out error",
    "exponential, strength": "exponential, strength chosen",
    "spline, strength": "spline, strength chosen",
    "empirical, strength": "mean, strength chosen",
    "geometric mean, strength": "geometric mean, strength chosen",
    "subtracted": "mean, subtracted, share chosen",
}
"""What a correction is called in the page, in the order of its tables."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def signed(one: dict[str, Any]) -> str:
    """A difference with its interval, bold where that leaves out 0."""
    text = f"{one['difference']:+.1f} ± {one['half_width']:.1f}".replace("-", "−")
    return f"**{text}**" if abs(one["difference"]) > one["half_width"] else text


def biases(found: dict[str, Any]) -> str:
    """What attention is like at every K, told from calibration questions."""
    head = [
        "tokens",
        "K",
        "attention that images get",
        "span of the mean Ā",
        "of the geometric mean",
        "of the exponential",
        "its R²",
        "Ā from a twentieth of the questions",
        "position explains of ln A",
    ]
    rows = []
    for n, size in found["sizes"].items():
        for k in KS:
            layer = size["layers"][k]
            fitted = layer["curves"]["exponential"]
            rows.append(
                [
                    n,
                    k.removeprefix("K = "),
                    percent(layer["visual_share"]),
                    f"{layer['measured_span']:.1f}",
                    f"{layer['geometric_span']:.1f}",
                    f"{fitted['span']:.1f}" if "span" in fitted else "refused",
                    f"{fitted['r2']:.2f}" if "r2" in fitted else "",
                    percent(layer["from_few_questions"]),
                    percent(layer["explained_by_position"]),
                ]
            )
    return table(head, rows)


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.0f} %"


def overview(found: dict[str, Any]) -> str:
    """For every correction the mean over K and budgets, the worst, and where it harms."""
    sizes = found["sizes"]
    head = ["correction", *(f"{n}: mean, least, harms" for n in sizes)]
    rows = []
    for name, shown in NAMES.items():
        cells = []
        for size in sizes.values():
            one = size["summary"][name]
            missing = 15 - one["cells"]
            refused = f", {missing} refused" if missing else ""
            cells.append(
                f"{one['mean']:+.1f}, {one['least']:+.1f}, {len(one['harmed'])}{refused}".replace(
                    "-", "−"
                )
            )
        rows.append([shown, *cells])
    return table(head, rows)


def quarter(found: dict[str, Any], n: str) -> str:
    """Differences to no correction at a quarter of the tokens."""
    layers = found["sizes"][n]["layers"]
    keep = QUARTER[n]
    plain = [f"{layers[k]['results']['none'][keep]['kept']:.1f}" for k in KS]
    rows = [["none (FastV): kept, %", *plain]]
    for name, shown in NAMES.items():
        of_k = [layers[k]["results"].get(name, {}) for k in KS]
        rows.append([shown, *(signed(r[keep]) if keep in r else "refused" for r in of_k)])
    return table(["correction", *KS], rows)


def thirds(found: dict[str, Any]) -> str:
    """Top, middle and bottom third of what is kept at a quarter of the tokens."""
    names = ("none", "exponential", "spline", "empirical", "geometric mean", "without RoPE")
    columns = [(n, k) for n in ("144", "576") for k in ("K = 1", "K = 2", "K = 5")]
    rows = []
    for name in names:
        cells = []
        for n, k in columns:
            one = found["sizes"][n]["layers"][k]["results"][name].get(QUARTER[n])
            parts = one["thirds"].values() if one else ()
            cells.append(" / ".join(f"{part:.0f}" for part in parts) or "refused")
        rows.append([NAMES.get(name, "none (FastV)"), *cells])
    return table(["correction", *(f"{n}, {k}" for n, k in columns)], rows)


def budgets_of(found: dict[str, Any], n: str) -> str:
    """All three budgets of the corrections that matter most."""
    layers = found["sizes"][n]["layers"]
    names = ("exponential", "spline", "empirical", "geometric mean", "without RoPE")
    keeps = [*layers[KS[0]]["results"]["none"]]
    rows = []
    for k in KS:
        for keep in keeps:
            results = layers[k]["results"]
            cells = [results[name].get(keep) for name in names]
            rows.append(
                [
                    f"{k}, {keep}",
                    f"{results['none'][keep]['kept']:.1f}",
                    *(signed(one) if one else "refused" for one in cells),
                ]
            )
    return table(["kept", "FastV, %", *(NAMES[name] for name in names)], rows)


def forms(found: dict[str, Any]) -> str:
    """Errors and differences of every form on sizes that it was not fitted to, K = 1 and 2."""
    columns = [(n, k) for k in ("K = 1", "K = 2") for n in ("144", "256", "576")]
    first = found["forms"][columns[0][1]][columns[0][0]]
    rows = []
    for name in first:
        cells = []
        for n, k in columns:
            one = found["forms"][k][n][name]
            gain = f"{one['results'][QUARTER[n]]['difference']:+.1f}".replace("-", "−")
            cells.append(f"{one['held_out_error']:.2f}, {gain}")
        rows.append([name, *cells])
    return table(["form of P", *(f"{k}, on {n}" for n, k in columns)], rows)


def fewer(found: dict[str, Any]) -> str:
    """Differences by the number of calibration questions, 144 tokens."""
    of_k = found["fewer_questions"]["144"]
    numbers = [*of_k[KS[0]]["empirical"]]
    rows = []
    for k in ("K = 1", "K = 2", "K = 5", "K = 8"):
        for name, shown in (("empirical", "mean"), ("geometric mean", "geometric mean")):
            cells = [
                " / ".join(f"{x:+.1f}".replace("-", "−") for x in of_k[k][name][number])
                for number in numbers
            ]
            rows.append([f"{k}, {shown}", *cells])
    return table(["P", *(f"{number} questions" for number in numbers)], rows)
