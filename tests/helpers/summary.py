"""What a run of the tests prints at its end: what ran, why tests were skipped, and the goldens."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import PurePath
from typing import Any

OUTCOMES = ("passed", "failed", "error", "skipped")
REASONS = 12
"""The commonest reasons of skips are printed; `pytest -rs` prints them all, with their places."""
WIDTH = 78


def by_folder(stats: dict[str, list[Any]]) -> list[str]:
    """Of every folder, if there are several: how many tests passed, and the seconds they took."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for outcome in OUTCOMES:
        for report in stats.get(outcome, []):
            counts[folder := folder_of(report.nodeid)][outcome] += 1
            seconds[folder] += getattr(report, "duration", 0.0)
    if len(counts) < 2:
        return []
    rows = [(name, counts[name], seconds[name]) for name in sorted(counts)]
    rows.append(("all", sum(counts.values(), Counter()), sum(seconds.values())))
    lines = [f"{'folder':<22}" + "".join(f"{name:>9}" for name in (*OUTCOMES, "seconds"))]
    for name, count, took in rows:
        cells = "".join(f"{count[outcome] or '-':>9}" for outcome in OUTCOMES)
        lines.append(f"{name:<22}{cells}{took:>9.0f}")
    return lines


def folder_of(test: str) -> str:
    """The folder of a test below `tests`, or the name of a file that stands there itself."""
    parts = PurePath(test.split("::")[0]).parts
    return parts[1] if len(parts) > 1 else parts[0]


def why_skipped(skipped: list[Any]) -> list[str]:
    """The commonest reasons of skips, each with the number of its tests."""
    found = Counter(reason_of(report) for report in skipped)
    lines = [f"{count:>5}  {reason}"[:WIDTH] for reason, count in found.most_common(REASONS)]
    left = sorted(found.values(), reverse=True)[REASONS:]
    if left:
        lines.append(f"{sum(left):>5}  for {len(left)} other reasons, which `pytest -rs` prints")
    return lines


def reason_of(report: Any) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(reason).removeprefix("Skipped: ")


def goldens(found: dict[str, list[float]]) -> list[str]:
    """Of every method: the golden files that passed, and the worst difference; two in a line."""
    cells = [
        f"{method:<16}{len(differences):>4} {max(differences):>9.1e}"
        for method, differences in sorted(found.items())
    ]
    half = -(-len(cells) // 2)
    pairs = zip(cells[:half], [*cells[half:], *[""] * (2 * half - len(cells))], strict=True)
    return [f"{left}      {right}".rstrip() for left, right in pairs]
