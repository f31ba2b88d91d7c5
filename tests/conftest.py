"""Test helpers of this folder are imported by their plain names."""

import gc
import sys
import zlib
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from helpers import summary, support

torch.set_num_threads(1)  # tiny models: threads cost more than they give
# A slow machine is no failure. CI asks for the second profile, which has more examples.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=25)
hypothesis.settings.register_profile("thorough", deadline=None)
hypothesis.settings.load_profile("quick")

WHOLE = (Path(__file__).parent, Path(__file__).parent / "compat")
"""Folders whose tests run with all their cases at every change: of files, and of transformers."""
AT_ONCE = 2
"""Cases of a test elsewhere that run at every change, where it is not marked otherwise."""
IN_CI = 100
"""Slow cases of a test that CI runs, where it is not marked otherwise."""

_support = support.Support() if support.TARGET or support.TARGET_OF_VIDEOS else None
_golden: dict[str, list[float]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow all but some cases of tests that have many, and exhaustive what CI spares."""
    for name, cases in by_test(items, slow=False).items():
        marker = cases[0].get_closest_marker("at_once")
        at_once = len(cases) if cases[0].path.parent in WHOLE else AT_ONCE
        mark_others(name, cases, marker.args[0] if marker else at_once, pytest.mark.slow)
    for name, cases in by_test(items, slow=True).items():
        marker = cases[0].get_closest_marker("in_ci")
        mark_others(name, cases, marker.args[0] if marker else IN_CI, pytest.mark.exhaustive)


def pytest_collection_finish() -> None:
    """Spare what was imported and collected from every later collection of garbage."""
    gc.collect()
    gc.freeze()


def by_test(items: list[pytest.Item], slow: bool) -> dict[str, list[pytest.Item]]:
    """The cases of each test that are marked slow, or those that are not."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if (item.get_closest_marker("slow") is not None) == slow:
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    return tests


def mark_others(
    name: str, cases: list[pytest.Item], count: int, mark: pytest.MarkDecorator
) -> None:
    """Mark all but about `count` cases of a test, evenly spread.

    Each test begins elsewhere, so that together they come to every method and family.
    """
    step = -(-len(cases) // count)
    for number, case in enumerate(cases):
        if number % step != zlib.crc32(name.encode()) % step:
            case.add_marker(mark)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Say in the report of a family test which cell of the support matrix it is."""
    outcome = yield
    params = getattr(getattr(item, "callspec", None), "params", {})
    method = params.get("name") or getattr(params.get("pruner"), "name", None)
    method = method or getattr(item.module, "METHOD_NAME", None)
    if call.when == "call" and "case" in params and method is not None:
        cell = (params["case"].name, method, item.originalname)
        outcome.get_result().user_properties.append(("cell", cell))


def pytest_runtest_logreport(report: Any) -> None:
    """Collect what tests tell, whichever process they ran in."""
    if report.when == "call":
        for name, told in report.user_properties:
            if name == "cell" and _support is not None:
                _support.note(*told, report.outcome)
            elif name == "golden":
                method, difference = told
                _golden.setdefault(method, []).append(difference)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the support matrix, in the process that collected it."""
    if _support is not None and not hasattr(session.config, "workerinput"):
        if support.TARGET:
            _support.write(Path(support.TARGET))
        else:
            _support.write_videos(Path(str(support.TARGET_OF_VIDEOS)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tables of what ran, of why tests were skipped, and of the golden files."""
    stats = terminalreporter.stats
    tables = {
        "files of the authors' own outputs: how many passed, and the worst difference": (
            summary.goldens(_golden)
        ),
        "why tests were skipped": summary.why_skipped(stats.get("skipped", [])),
        "what ran": summary.by_folder(stats),
    }
    for title, lines in tables.items():
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
