"""The circumstances of a job, for its report: the command line, the machine and the versions."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pore.evaluation.results import About


def command_line() -> str:
    """The command line, as it was typed."""
    return " ".join(["pore", *sys.argv[1:]])


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
        model="the embedded model" if model == "embedded" else model,
        command=command_line(),
        calibration=calibration,
        test=test,
        setup=_setup(loaded, seed),
        choice=choice,
    )


def _setup(model: Any, seed: int) -> dict[str, str]:
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
        "seeds": f"{seed} for Random and the bootstrap; the scenes have seeds of their own",
        "date": time.strftime("%Y-%m-%d"),
    }
