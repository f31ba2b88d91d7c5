"""`torchrun … pore calibrate`: real processes, one of which is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pore
from pore.calibration.sums import Calibration

COUNT = 450
"""More samples than two processes measure before they first meet, which is 2 · 104."""

_KILLED = """
import os, signal, sys
from pore.calibration import rounds
from pore.cli.app import main

measure, left = rounds.measure, int(os.environ["LEFT"])


def killed(*args):
    global left
    left -= 1
    if left == 0 and os.environ["RANK"] == os.environ["KILLED"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*args)


rounds.measure = killed
main()
"""


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Python with one thread, as torchrun does."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ
        | {"PYTHONPATH": str(Path(pore.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "0")


@pytest.fixture(scope="module")
def samples(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many samples of few images, two of which are missing."""
    lines = [json.loads(line) for line in (data / "samples.jsonl").read_text().splitlines()]
    file = tmp_path_factory.mktemp("many") / "samples.jsonl"
    many: list[dict[str, Any]] = []
    for number in range(COUNT):
        line = lines[number % len(lines)]
        name = "gone.png" if number in (9, 400) else line["image"]
        many.append({**line, "image": str(data / name), "id": f"n{number}"})
    file.write_text("\n".join(map(json.dumps, many)))
    return file


@pytest.fixture(scope="module")
def alone(model: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile of a single process."""
    out = tmp_path_factory.mktemp("alone") / "p.json"
    done = command("-m", "pore", "calibrate", "-m", model, "-s", samples, "-o", out)
    assert done.returncode == 0, done.stderr
    return out


def equal(one: Path, other: Path) -> bool:
    """Whether two calibrations have the same profile and the same sums, byte for byte."""
    return all(
        one.with_name(name).read_bytes() == other.with_name(name).read_bytes()
        for name in ("p.json", "p.calibration.json")
    )


@pytest.mark.slow
def test_any_process_may_be_killed(model: Path, samples: Path, alone: Path, tmp_path: Path) -> None:
    out, script = tmp_path / "p.json", tmp_path / "killed.py"
    script.write_text(_KILLED)
    given = ("calibrate", "-m", model, "-s", samples, "-o", out)
    for killed, left in (("1", "20"), ("0", "5")):  # both after they have met once
        done = command(*TORCHRUN, script, *given, KILLED=killed, LEFT=left)
        assert done.returncode != 0
        assert not out.exists()
        assert Calibration.load(tmp_path / "p.calibration.json").seen == 208
    done = command(*TORCHRUN, "-m", "pore", *given, "--page", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert equal(out, alone)
    assert done.stdout.count("Wrote ") == 2  # by the first process alone
    assert done.stderr.count("Skipped the sample n400") == 1
    assert "2 processes" in (tmp_path / "page.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("p.json", "p.calibration.json", "page.html", "killed.py")
    }


@pytest.mark.slow
def test_one_of_them_tells_what_is_wrong(model: Path, samples: Path, tmp_path: Path) -> None:
    given = ("calibrate", "-m", model, "-s", samples, "-o", tmp_path / "p.json")
    done = command(*TORCHRUN, "-m", "pore", *given, "--max-bad", "0.001")
    assert done.returncode != 0
    assert done.stderr.count("Error: 1 of 208 samples are bad") == 1
    assert "In process" not in done.stderr  # the share of all is judged, by all alike
    done = command(*TORCHRUN, "-m", "pore", *given, "--method", "DivPrune")
    # Every process sees it before it has joined the others.
    assert "does not rank by the attention between text and image" in done.stderr
