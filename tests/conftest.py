"""Test helpers of this folder are imported by their plain names."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import support

torch.set_num_threads(1)  # tiny models: threads cost more than they give


_support = support.Support() if support.TARGET else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Hand outcomes of the family tests to the support matrix, where one is asked for."""
    outcome = yield
    report = outcome.get_result()
    if _support is not None and report.when == "call":
        _support.note(item, report.outcome)


def pytest_sessionfinish() -> None:
    """Write the support matrix."""
    if _support is not None:
        _support.write(Path(str(support.TARGET)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The golden runner's table: method, files that passed, worst difference."""
    golden = sys.modules.get("test_golden")
    if golden is None or not golden.WORST:
        return
    terminalreporter.section("golden files of the authors' code")
    for method, differences in sorted(golden.WORST.items()):
        terminalreporter.write_line(
            f"{method:<16} {len(differences):>3} passed, worst difference {max(differences):.1e}"
        )
