"""How many images are enough: against calibrations on other images, and where a pass stops."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.calibrations import HOST
from helpers.sums import WHERE, N, attention_of, measured, sums_of
from helpers.together import together
from pore._processes import Processes
from pore.calibration import passes, stability
from pore.calibration.calibrating import calibrate
from pore.calibration.host import HostCalibration
from pore.calibration.stability import STABLE, Agreement, Stability, due
from pore.calibration.sums import Calibration
from pore.calibration.typical import Tokens, Typical
from pore.data.samples import Sample
from pore.errors import CalibrationError, ScoreError

BENT = np.exp(1.5 * WHERE) * (1 + 0.5 * np.sin(9 * WHERE))


def sums(images: int, seed: int = 0, noise: float = 0.6) -> Calibration:
    return sums_of(attention_of(BENT, images, noise, seed))


@pytest.mark.parametrize(
    ("kind", "mean", "times"),
    [
        ("exponential", "geometric", 1.4),
        ("exponential", "arithmetic", 1.4),
        ("empirical", "geometric", 1.4),
        # With more images a spline gets more knots, which no draw around this mean can know.
        ("spline", "arithmetic", 3.0),
    ],
)
@pytest.mark.slow
def test_other_images_agree_as_much_as_is_said(kind: Any, mean: Any, times: float) -> None:
    """P of 100 images against P of 4,000, whose images are independent here."""
    true = sums(4000, seed=100)
    values = true.mean_attention(mean).numpy()
    typical = Typical(Tokens(values, true._spread(mean), np.arange(N) * 3 // N), 0.25)
    kept = typical.kept(true.fit(kind, mean).values.numpy())
    shares = [
        1 - typical.apart(typical.kept(sums(100, seed).fit(kind, mean).values.numpy()), kept)
        for seed in range(12)
    ]
    found = sums(100).stability(kind, 0.25, mean)
    said, real = 1 - found.here.usual, 1 - float(np.mean(shares))
    assert real / times < said < times * real


@pytest.mark.slow
def test_noise_asks_for_more_images() -> None:
    """The number that is enough grows with the variance of the attention."""
    quiet, loud = (sums(200, noise=noise).stability("exponential") for noise in (0.3, 2.5))
    assert quiet.stable
    assert not loud.stable
    assert quiet.enough is not None
    assert loud.enough is None or loud.enough > 3 * quiet.enough
    shares = [one.usual for one in loud.agreement]
    assert shares == sorted(shares)
    assert [one.images for one in loud.agreement] == [25, 50, 100, 200, 400, 800]


@pytest.mark.slow
def test_what_is_enough_does_not_depend_on_how_many_were_measured() -> None:
    found = [sums(n, seed=n, noise=1.5).stability("exponential").enough for n in (100, 200, 400)]
    numbers = [one for one in found if one is not None]
    assert len(numbers) == 3
    assert 50 < min(numbers) <= max(numbers) < 2 * min(numbers)


@pytest.mark.parametrize(
    ("least", "enough", "words"),
    [
        ((0.90, 0.95, 0.97), None, "more than 400 would be needed for 98 %"),
        ((0.99, 0.99, 0.995), 100, "100 or fewer are enough for 98 %"),
        ((0.96, 0.98, 0.99), 200, "about 200 are enough for 98 %"),
        ((0.90, 0.96, 0.99), 290, "about 290 would be enough for 98 %"),
    ],
)
def test_the_number_and_its_words(least: tuple[float, ...], enough: int | None, words: str) -> None:
    counts = (100, 200, 400)
    agreement = tuple(Agreement(n, share, share) for n, share in zip(counts, least, strict=True))
    found = Stability(0.25, 200, agreement)
    assert found.enough == enough
    assert words in str(found)
    assert found.document(False)["enough"] == enough
    assert found.stable == (least[1] >= STABLE)


@pytest.mark.slow
def test_images_of_any_size_and_a_power() -> None:
    noisy = measured("distance", noise=0.4)
    for kind in ("power", "spline", "auto"):
        found = noisy.stability(kind, over="distance")  # type: ignore[arg-type]
        assert 0.5 < found.here.usual < 1
    assert 0.5 < measured("place", noise=0.4).stability("spline", over="place").here.usual < 1


def test_where_there_is_no_p() -> None:
    spike = np.where(WHERE > 11 / 12, 4.8, np.where(WHERE < 1 / 12, 0.43, 0.37))
    with pytest.raises(CalibrationError, match="no P to be stable"):
        sums_of(attention_of(spike, 200)).stability()
    with pytest.raises(ScoreError, match="both halves"):
        sums(1).stability()
    with pytest.raises(CalibrationError, match="No image"):
        HostCalibration((replace(sums(2), count=0, sums=(), squares=()),)).stability()


# -- where a pass stops ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_it_is_asked_at_the_end_of_a_batch(batch_size: int) -> None:
    asked = [seen for seen in range(batch_size, 700, batch_size) if due(seen, batch_size)]
    points = [100, 125, 157, 197, 247, 309, 387, 484, 605]
    assert asked == sorted({-(-point // batch_size) * batch_size for point in points})


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_processes_stop_at_the_same_sample(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stability, "_FIRST", 4)
    asked: list[int] = []

    def until(state: HostCalibration) -> bool:
        asked.append(state.seen)
        return state.seen >= 7

    call = partial(calibrate, model, processor, samples, host=HOST, batch_size=2, every=100)
    file = tmp_path / "sums.json"
    own = threading.local()
    monkeypatch.setattr(passes, "joined", lambda: own.processes)

    def one(processes: Processes) -> HostCalibration:
        own.processes = processes
        return call(until=until, distributed=True, checkpoint=file)

    found = together(size, one)
    alone = calibrate(model, processor, samples[:8], host=HOST, batch_size=2)
    assert found == [alone] * size
    assert asked == [4, 6, 8]  # by the first alone
    assert HostCalibration.load(file) == alone
    asked.clear()
    assert call(until=until, checkpoint=file) == alone  # stopped is stopped
    assert asked == [8]
    assert call(checkpoint=file).seen == len(samples)  # but more can be asked for
