"""Test helpers of this folder are imported by their plain names."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # tiny models: threads cost more than they give


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
