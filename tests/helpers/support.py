r"""The support matrix: which method was tested in which family, as a test run found it.

PORE_SUPPORT=docs/support.md pytest -n 2 tests/matrix/test_families.py -m "slow or not slow"
PORE_SUPPORT_VIDEOS=docs/support.md pytest -n 2 -m "slow or not slow" \
    tests/methods/test_{videos,merging_videos,framefusion}.py
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

SITUATIONS = {
    "test_keep_all_is_bit_equal": "keeping everything gives the unpruned logits, bit for bit",
    "test_batch_equals_singles": "a batch equals its samples one by one, and the budget is met",
    "test_equals_masked_dense": "equal to a dense forward in which the dropped tokens are masked",
    "test_cached_decode_equals_a_full_forward_with_the_same_selection": (
        "cached decode equals a full forward with the same selection"
    ),
    "test_beams_static_cache_and_what_is_left_behind": (
        "beams, static cache, and the model left as it was"
    ),
}


HEAD = """# What is tested

Written by a test run (`tests/helpers/support.py`), not by hand. Every number is of tests that a
method passed in a family, on tiny random models in float64 on a CPU: single prompts, ragged ones,
several images, rows without image and, where a family has them, videos; padded on the left and on
the right. A dash is a pair that is refused with a reason, which is tested too.
"""
FOOT = """Methods that only drop tokens and keep positions are compared with the masked dense
forward; the others have no such counterpart. `make test` runs a few of them in each
situation, evenly spread over families and methods. CI runs some 590 of the others, and
`make test-all` runs all."""


VIDEOS = "## Methods for videos"
HEAD_OF_VIDEOS = """\
Methods that compare the frames of a video, in the families that take videos, from a run
of their own tests: keeping everything, budgets, a cached decode and, where tokens only go and
keep their positions, the masked dense forward; where lengths may differ, a video of one frame
beside a longer one; of FrameFusion, each with several settings. A dash is a pair that is refused
with a reason, which is tested too.
"""


class Support:
    """Collects the outcomes of the family tests and writes them as a page."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str, str, str]] = Counter()
        self.began = time.monotonic()

    def note(self, family: str, method: str, function: str, outcome: str) -> None:
        """Note the outcome of a test of a method in a family."""
        self.found[family, method, function, outcome] += 1

    def write(self, path: Path) -> None:
        """Write the page."""
        from cases import CASES  # imports transformers: only where it is needed

        refused = {
            (family, method)
            for family, method, function, outcome in self.found
            if "refused" in function and outcome == "passed"
        }
        seen = {family for family, *_ in self.found}
        families = [case.name for case in CASES if case.name in seen]
        methods = sorted({method for _, method, *_ in self.found})
        passed: Counter[tuple[str, str]] = Counter()
        by_situation: Counter[str] = Counter()
        failed = 0
        for (family, method, function, outcome), count in self.found.items():
            if function in SITUATIONS and outcome == "passed":
                passed[family, method] += count
                by_situation[function] += count
            failed += count * (outcome == "failed")
        minutes = (time.monotonic() - self.began) / 60
        lines = [
            HEAD,
            f"{len(passed)} pairs of {len(families)} families and {len(methods)} methods pass",
            f"{sum(passed.values()):,} tests, {len(refused)} pairs are refused, {failed} tests",
            "fail.",
            f"The run took {minutes:.0f} minutes on two cores.",
            "",
            "| | " + " | ".join(families) + " |",
            "|---" * (len(families) + 1) + "|",
        ]
        for method in methods:
            cells = [
                "–" if (family, method) in refused else str(passed[family, method])
                for family in families
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines += ["", "| situation | passed |", "|---|---|"]
        lines += [f"| {text} | {by_situation[name]:,} |" for name, text in SITUATIONS.items()]
        lines += ["", FOOT]
        _, mark, videos = path.read_text().partition(VIDEOS) if path.exists() else ("", "", "")
        path.write_text("\n".join(lines) + "\n" + (f"\n{mark}{videos}" if mark else ""))

    def write_videos(self, path: Path) -> None:
        """Write the second part of the page, on methods for videos, and leave the first."""
        passed: Counter[tuple[str, str]] = Counter()
        failed = 0
        for (family, method, function, outcome), count in self.found.items():
            if outcome == "passed" and function != "test_other_families_say_why":
                passed[family, method] += count
            failed += count * (outcome == "failed")
        families = sorted({family for family, _ in passed})
        methods = sorted({method for _, method in passed})
        lines = [
            VIDEOS,
            "",
            HEAD_OF_VIDEOS,
            f"{len(passed)} pairs of {len(families)} families and {len(methods)} methods pass",
            f"{sum(passed.values()):,} tests, {failed} tests fail.",
            "",
            "| | " + " | ".join(families) + " |",
            "|---" * (len(families) + 1) + "|",
        ]
        for method in methods:
            cells = [str(passed[family, method] or "–") for family in families]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        first = path.read_text().partition(VIDEOS)[0].rstrip()
        path.write_text(first + "\n\n" + "\n".join(lines) + "\n")


TARGET = os.environ.get("PORE_SUPPORT")
TARGET_OF_VIDEOS = os.environ.get("PORE_SUPPORT_VIDEOS")
