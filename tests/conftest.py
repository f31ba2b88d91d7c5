"""Test helpers of this folder are imported by their plain names."""

import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from helpers import support

torch.set_num_threads(1)  # tiny models: threads cost more than they give
# A slow machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

_support = support.Support() if support.TARGET else None
_golden: dict[str, list[float]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Say in the report of a family test which cell of the support matrix it is."""
    outcome = yield
    params = getattr(getattr(item, "callspec", None), "params", {})
    if call.when == "call" and "case" in params and "name" in params:
        cell = (params["case"].name, params["name"], item.originalname)
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
        _support.write(Path(str(support.TARGET)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The golden runner's table: method, files that passed, worst difference."""
    if not _golden:
        return
    terminalreporter.section("golden files of the authors' code")
    for method, differences in sorted(_golden.items()):
        terminalreporter.write_line(
            f"{method:<16} {len(differences):>3} passed, worst difference {max(differences):.1e}"
        )
