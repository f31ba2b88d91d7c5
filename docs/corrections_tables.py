"""The tables of corrections.md, from its results.

    python docs/corrections_tables.py

Prints them: every correction on every host, FastV by third of the image, and the further questions
of a few settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
THIRDS = ("top", "middle", "bottom")
SURE = 0.01
"""Differences with a smaller p are bold."""

Key = tuple[str, str, int, str | None]


def read(name: str) -> tuple[dict[tuple[str, int], float], dict[Key, Mapping[str, Any]]]:
    """Accuracy of every host alone at every budget; and differences by host, correction, budget
    and third of the image, None for all questions."""
    results = json.loads((RESULTS / f"{name}.json").read_text())
    hosts = [one for one in results if not one["reweight"]]
    alone = {(one["method"], one["keep"]): one["accuracy"] for one in hosts}
    differences = json.loads((RESULTS / f"{name}-differences.json").read_text())
    return alone, {
        (one["method"], one["reweight"], one["keep"], one["third"]): one for one in differences
    }


def points(value: float) -> str:
    """A difference in points, such as +1.9 or −3.8."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def cell(found: Mapping[str, Any] | None) -> str:
    """A difference, bold where p is small; a dash where there is none."""
    if found is None:
        return "–"
    text = points(found["difference"])
    return f"**{text}**" if found["p"] < SURE else text


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def every_correction() -> str:
    """Every correction on every host; and FastV at 32 tokens by third of the image."""
    alone, differences = read("embedded-corrections")
    hosts = sorted({host for host, *_ in differences}, key=str.lower)
    corrections = list(dict.fromkeys(correction for _, correction, *_ in differences))
    keeps = sorted({keep for _, _, keep, _ in differences}, reverse=True)

    def row(name: str, cells: Any) -> list[str]:
        return [name, *(" / ".join(cells(host, keep) for keep in keeps) for host in hosts)]

    rows = [row("host alone, % right", lambda host, keep: f"{100 * alone[host, keep]:.1f}")]
    for name in corrections:
        rows.append(
            row(name, lambda host, keep, n=name: cell(differences.get((host, n, keep, None))))
        )
    thirds = [
        [name, *(points(differences["FastV", name, 32, t]["difference"]) for t in (None, *THIRDS))]
        for name in corrections
    ]
    return "\n\n".join(
        [
            table(["correction", *hosts], rows),
            table(["correction", "all", *THIRDS], thirds),
        ]
    )


def further_questions(names: tuple[str, ...]) -> str:
    """A few settings on more questions, with intervals; the last of them by third of the image."""
    alone, differences = read("embedded-corrections-more")
    rows = []
    for keep in sorted({key[2] for key in differences}, reverse=True):
        for host in sorted({key[0] for key in differences}, key=str.lower):
            line = [host, str(keep), f"{100 * alone[host, keep]:.1f}"]
            for name in names:
                found = differences.get((host, name, keep, None))
                line.append("–" if found is None else _with_interval(found))
            for third in THIRDS:
                found = differences.get((host, names[-1], keep, third))
                line.append("–" if found is None else points(found["difference"]))
            rows.append(line)
    last = [f"{names[-1]}: {third}" for third in THIRDS]
    return table(["host", "kept", "alone", *names, *last], rows)


def _with_interval(found: Mapping[str, Any]) -> str:
    low, high = (points(end) for end in found["ci"])
    p = found["p"]
    size = f"{p:.2f}" if p >= SURE else f"{p:.0e}".replace("e-0", "e−").replace("e-", "e−")
    text = f"{points(found['difference'])} [{low}, {high}], p = {size}"
    return f"**{text}**" if p < SURE else text


if __name__ == "__main__":
    print(every_correction())
    print()
    print(further_questions(("exponential", "exponential+offset", "auto", "geometric, auto")))
