"""The circumstances of a job, for its report: the command line, the machine and the versions."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pore.evaluation.results import About


def command_line() -> str:
    """The command line, as a shell takes it."""
    return shlex.join(["pore", *sys.argv[1:]])


def about(
    model: str, loaded: Any, *, calibration: str, test: str, seed: int, choice: str = ""
) -> About:
    """The circumstances of a demo or a survey.

    Args:
        model: The name that the user gave for the model.
        loaded: The model itself.
        calibration: Where the calibration samples come from.
        test: Where the test samples come from.
        seed: The seed.
        choice: Why the layer was chosen.

    Returns:
        What the report says about the run.
    """
    from pore.evaluation.results import About

    return About(
        model=name_of(model),
        command=command_line(),
        calibration=calibration,
        test=test,
        setup=setup_of(loaded)
        | {"seeds": f"{seed} for Random and the bootstrap; the scenes have seeds of their own"},
        choice=choice,
    )


def name_of(model: str) -> str:
    """The name that the user gave for a model, in words."""
    return "the embedded model" if model == "embedded" else model


def setup_of(model: Any) -> dict[str, str]:
    """The machine, the versions and how a model is run, in words by name."""
    from pore import bench
    from pore._compat.attention import attention_name

    hardware, versions = bench.hardware(model.device), bench.versions()
    machine = [hardware["cpu"], f"{hardware['cpu_cores']} cores", f"{hardware['threads']} threads"]
    if "gpu" in hardware:
        machine.append(hardware["gpu"])
    return {
        "machine": ", ".join(machine),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "model": f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}, "
        f"{attention_name(model.config)} attention",
        "date": time.strftime("%Y-%m-%d"),
    }
