"""An interrupted calibration goes on where it stopped, or says why it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.calibrations import broken_after, make_processor, run, same
from helpers.models import tiny_llava
from pore.calibration import rounds
from pore.calibration.sums import Calibration
from pore.data.samples import Sample
from pore.errors import CalibrationError


@pytest.fixture(scope="module")
def whole(model: Any, processor: Any, samples: list[Sample]) -> Calibration:
    """What an uninterrupted calibration gives."""
    return run(model, processor, samples)


@pytest.mark.parametrize(
    ("stops", "error"),
    [
        ([1], KeyboardInterrupt()),
        ([5], KeyboardInterrupt()),
        ([3, 4, 8, 13], KeyboardInterrupt()),
        ([9, 12], RuntimeError("disk on fire")),
    ],
)
def test_resumed_equals_uninterrupted(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    stops: list[int],
    error: BaseException,
    whole: Calibration,
) -> None:
    file = tmp_path / "state.json"
    for stop in stops:
        with pytest.raises(type(error)):
            run(
                model,
                processor,
                broken_after(samples, stop, error),
                checkpoint=file,
                every=4,
            )
        done = Calibration.load(file).seen if file.exists() else 0
        assert done == stop // 4 * 4
    resumed = run(model, processor, samples, checkpoint=file, every=4)
    assert resumed == whole
    assert Calibration.load(file) == whole
    # Once done, nothing is left to run.
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(rounds, "measure")
        assert run(model, processor, samples, checkpoint=file, every=4) == whole


def test_killed_in_the_middle_of_a_forward(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Calibration,
) -> None:
    file = tmp_path / "state.json"
    measure = rounds.measure
    calls = iter(range(100))

    def interrupted(*args: Any) -> Any:
        found = measure(*args)
        if next(calls) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(rounds, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"after 8 samples.*state\.json.*same call again"):
        run(model, processor, samples, checkpoint=file, every=100)
    monkeypatch.undo()
    assert run(model, processor, samples, checkpoint=file) == whole


def test_interruption_without_checkpoint_says_so(
    model: Any, processor: Any, samples: list[Sample]
) -> None:
    with pytest.raises(KeyboardInterrupt, match="after 4 samples; nothing was kept"):
        run(model, processor, broken_after(samples, 6, KeyboardInterrupt()))


def test_a_higher_limit_goes_on(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    file = tmp_path / "state.json"
    assert run(model, processor, samples, checkpoint=file, limit=5).seen == 5
    assert same(
        run(model, processor, iter(samples), checkpoint=file), run(model, processor, samples)
    )


def test_checkpoint_of_other_conditions_is_refused(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    file = tmp_path / "state.json"
    run(model, processor, samples, checkpoint=file, limit=4)
    with pytest.raises(CalibrationError, match=r"layer is 2 here and 3 there.*delete"):
        run(model, processor, samples, 2, checkpoint=file)
    with pytest.raises(CalibrationError, match="normalize is 'visual' here"):
        run(model, processor, samples, checkpoint=file, normalize="visual")
    with pytest.raises(CalibrationError, match=r"processor is .* here"):
        run(model, make_processor(do_center_crop=False), samples, checkpoint=file)
    with pytest.raises(CalibrationError, match="dtype is 'float32' here"):
        run(tiny_llava(dtype=torch.float32), processor, samples, checkpoint=file)
    for others in (samples[1:], samples[:3], [replace(samples[0], question="w7"), *samples[1:]]):
        with pytest.raises(CalibrationError, match="not the first ones of this call"):
            run(model, processor, others, checkpoint=file)
    file.write_text(file.read_text()[:100])
    with pytest.raises(CalibrationError, match=r"damaged.*delete"):
        run(model, processor, samples, checkpoint=file)
