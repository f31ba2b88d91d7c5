"""Every golden file of the authors' own code, put to the same test.

Runs `<method>/*.safetensors` under the folder that the environment variable PORE_GOLDEN_DIR names
(default: tests/golden). Sizes and parameters are read from the files, so others of the same schemas
can be run. The checker of a method is `golden_<method>.py` beside this file; a method without one,
or a key that its checker does not know, is a failure.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(os.environ.get("PORE_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
FILES = sorted(FOLDER.glob("*/*.safetensors"))
SLOW = ("fitprune/fit_576img_unmodified",)
"""Files that take ten seconds."""


@dataclass
class GoldenFile:
    """Inputs and outputs of a method's published code.

    Attributes:
        path: The file.
        params: Sizes, settings and seeds it was made with.
        config: The configuration of its model, where it names one apart.
        tensors: Inputs and outputs, by name.
    """

    path: Path
    params: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with safe_open(self.path, "pt") as file:
            self.params = json.loads(file.metadata()["params"])
            self.config = json.loads(file.metadata().get("config", "{}"))
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def case(path: Path) -> ParameterSet:
    """A file, under the name of its method and its own."""
    name = f"{path.parent.name}/{path.stem}"
    return pytest.param(path, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("path", [case(path) for path in FILES])
@pytest.mark.at_once(999)
def test_equals_the_authors_code(
    path: Path, record_property: Callable[[str, object], None]
) -> None:
    method = path.parent.name
    checker = importlib.import_module(f"methods.golden_{method}")
    difference = checker.check(GoldenFile(path))
    record_property("golden", (method, difference))  # for the table after the run


def test_there_are_golden_files() -> None:
    assert FILES, f"no <method>/*.safetensors under {FOLDER}"
