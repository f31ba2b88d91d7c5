"""Actors of Ray measure what a single process does, also when one of them is killed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.checkpoint import save_checkpoint, save_samples, save_shards
from helpers.command_line import run
from pore.calibration.actors import Actors
from pore.calibration.calibrating import calibrate
from pore.calibration.host import HostCalibration
from pore.data.loading import load_model
from pore.data.sources import load_samples
from pore.errors import CalibrationError, InputError


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="needs Ray: .ci/ray runs this")
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_an_actor_may_be_killed(tmp_path: Path) -> None:
    checkpoint = str(save_checkpoint(tmp_path / "tiny"))
    lines = save_samples(tmp_path, 14)
    lines.write_text(lines.read_text() + "\n" + '{"image": "gone.png", "question": "w6"}')
    killed = str(tmp_path / "killed")

    def load() -> tuple[Any, Any]:
        """Load the model; the first actor that measures its second batch dies."""
        import os
        import signal

        import torch

        from pore.calibration import rounds
        from pore.data.loading import load_model

        torch.set_num_threads(1)
        measure, done = rounds.measure, []

        def dies(*given: Any) -> Any:
            done.append(given)
            if len(done) == 2 and not os.path.exists(killed):
                open(killed, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return measure(*given)

        rounds.measure = dies
        return load_model(checkpoint, device="cpu")

    model, processor = load_model(checkpoint, device="cpu")
    samples = load_samples(lines)
    options: dict[str, Any] = {"host": pore.FastV(keep=4), "batch_size": 2, "max_bad": 0.1}
    alone = calibrate(model, processor, samples, **options)
    found = calibrate(model, processor, samples, actors=Actors(load, 2), **options)
    assert Path(killed).exists()
    assert found == alone
    assert len(alone.bad) == 1

    def other() -> tuple[Any, Any]:
        from pore.data.loading import load_model

        return load_model(checkpoint, device="cpu", dtype="bfloat16")

    with pytest.raises(CalibrationError, match="Name the number format, with --dtype"):
        calibrate(model, processor, samples, actors=Actors(other, 1), **options)


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_the_command(tmp_path: Path) -> None:
    checkpoint, lines = save_checkpoint(tmp_path / "tiny"), save_samples(tmp_path, 6)
    given = ("calibrate", "-m", checkpoint, "-s", lines, "-b", "2", "--device", "cpu", "-o")
    run(*given, tmp_path / "one.json")
    run(*given, tmp_path / "two.json", "--engine", "ray", "--actors", "2")
    one, two = (tmp_path / f"{name}.calibration.json" for name in ("one", "two"))
    assert HostCalibration.load(one) == HostCalibration.load(two)


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_ray_data_reads_what_one_process_reads(kind: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "tiny")
    folder = tmp_path / "data"
    columns = save_shards(folder, kind, 7)
    given = ("calibrate", "-m", checkpoint, "-s", folder, "-b", "2", "--device", "cpu")
    named = ("--columns", columns, "--split", "train", "--limit", "6", "-o")
    run(*given, *named, tmp_path / "one.json")
    run(*given, *named, tmp_path / "two.json", "--engine", "ray", "--actors", "2")
    one, two = (tmp_path / f"{name}.calibration.json" for name in ("one", "two"))
    assert HostCalibration.load(one) == HostCalibration.load(two)
    assert HostCalibration.load(one).count == 6
    wrong = ("--columns", "image=gone", "--engine", "ray", "-o", tmp_path / "three.json")
    assert "has no column 'gone'" in run(*given, *wrong, code=1).output


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_model(str(save_checkpoint(tmp_path / "tiny")))
    actors = Actors(lambda: (model, processor))
    samples = load_samples(save_samples(tmp_path, 2))
    with pytest.raises(CalibrationError, match="not both"):
        calibrate(model, processor, samples, 2, actors=actors, distributed=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'pore-vlm\[ray\]'"):
        calibrate(model, processor, samples, 2, actors=actors)
    assert "torch or ray" in run("calibrate", "--engine", "spark", code=1).output
    assert "--actors is for --engine ray" in run("calibrate", "--actors", "2", code=1).output
