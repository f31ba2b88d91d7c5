"""Several processes share the samples: all of them get what a single one gets, to the last bit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pore
from helpers.calibrations import HOST, K, Stepwise, broken_after, run, spoil
from helpers.models import tiny_llava
from helpers.together import together
from pore._processes import Processes
from pore.calibration import passes, rounds
from pore.calibration.batch import BadSample, Batch
from pore.calibration.calibrating import calibrate
from pore.calibration.host import HostCalibration
from pore.calibration.seen import digest
from pore.calibration.sums import Calibration
from pore.calibration.table import Rows, Table
from pore.data.samples import Sample
from pore.errors import CalibrationError, InputError, ScoreError, StaleCheckpointError

own = threading.local()


@pytest.fixture(autouse=True)
def _joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "joined", lambda: own.processes)


def shared(size: int, call: Any) -> list[Any]:
    """What some processes return or raise, each with a call of its own by rank."""

    def one(processes: Processes) -> Any:
        own.processes = processes
        return call(processes.rank)

    return together(size, one)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("every", [1, 100])
def test_all_get_what_a_single_one_gets(
    model: Any, processor: Any, samples: list[Sample], size: int, every: int
) -> None:
    alone = run(model, processor, samples)
    for given in (list, unsized):  # a list, and a stream whose length is unknown

        def call(_: int, given: Any = given) -> Calibration:
            return run(model, processor, given(samples), every=every, distributed=True)

        assert shared(size, call) == [alone] * size


def unsized(samples: list[Sample]) -> Iterator[Sample]:
    yield from samples


def test_hosts_of_several_stages_and_heads(
    model: Any, processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "every": 3}
    for host, heads in ((Stepwise(), False), (HOST, True)):
        how = {"host": host, "heads": heads, **options}
        alone = calibrate(model, processor, samples, **how)
        found = shared(
            2, lambda _, how=how: calibrate(model, processor, samples, distributed=True, **how)
        )
        assert found == [alone] * 2


def test_bad_samples_are_counted_over_all(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoilt = spoil(samples, tmp_path)
    options: dict[str, Any] = {"batch_size": 2, "distributed": True}
    alone = run(model, processor, spoilt, max_bad=0.3, batch_size=2)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pore.calibration"):
        found = shared(2, lambda _: run(model, processor, spoilt, max_bad=0.3, **options))
    assert found == [alone] * 2
    assert [one.id for one in alone.bad] == ["0/1", "0/2", "0/6"]
    assert len(caplog.records) == 3  # told once, not by every process
    # Sample 1 is of the first process, samples 2 and 6 are of the second: 2 of its 6, 3 of all 13.
    found = shared(2, lambda _: run(model, processor, spoilt, max_bad=0.2, **options))
    assert [str(one) for one in found] == [str(found[0])] * 2
    assert "3 of 13 samples are bad" in str(found[0])


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 2), (1, 3), (2, 1)])
def test_any_number_of_processes_continues(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    before: int,
    after: int,
) -> None:
    file = tmp_path / "sums.json"
    options: dict[str, Any] = {"batch_size": 2, "every": 2, "checkpoint": file}

    def broken(_: int) -> Calibration:
        gone = broken_after(samples, 9, RuntimeError("disk on fire"))
        return run(model, processor, gone, distributed=True, **options)

    assert any(isinstance(one, RuntimeError) for one in shared(before, broken))
    kept = Calibration.load(file)
    assert kept.seen == 8 // (2 * before) * (2 * before)
    assert kept == run(model, processor, samples[: kept.seen], batch_size=2)
    found = shared(after, lambda _: run(model, processor, samples, distributed=True, **options))
    alone = run(model, processor, samples, batch_size=2)
    assert found == [alone] * after
    assert Calibration.load(file) == alone


def test_an_error_of_one_is_the_error_of_all(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    def broken(rank: int) -> Calibration:
        gone = (
            broken_after(samples, 5, InputError("row 5 is no text")) if rank else unsized(samples)
        )
        return run(model, processor, gone, distributed=True, batch_size=2, every=2)

    found = shared(3, broken)
    assert [type(one) for one in found] == [InputError] * 3
    assert {str(one) for one in found} == {"In process 1 of 3: row 5 is no text"}
    file = tmp_path / "sums.json"
    run(model, processor, samples[:4], checkpoint=file)
    stale = shared(
        2, lambda _: run(model, processor, samples[4:], checkpoint=file, distributed=True)
    )
    assert [type(one) for one in stale] == [StaleCheckpointError] * 2


def test_processes_that_do_not_do_the_same_are_refused(
    model: Any, processor: Any, samples: list[Sample]
) -> None:
    def elsewhere(rank: int) -> Calibration:
        order = samples[::-1] if rank else samples
        return run(model, processor, order, distributed=True)

    assert all("go through different samples" in str(one) for one in shared(2, elsewhere))

    def deeper(rank: int) -> Calibration:
        return run(model, processor, samples, layer=K + rank, distributed=True)

    for one in shared(2, deeper):
        assert isinstance(one, CalibrationError)
        assert "Process 1 measures under other conditions than the first: layer is 3" in str(one)


def test_attention_that_is_not_finite_from_the_start(processor: Any, samples: list[Sample]) -> None:
    broken = tiny_llava(layers=5)
    with torch.no_grad():
        broken.model.language_model.layers[K - 1].self_attn.q_proj.weight.fill_(torch.nan)
    found = shared(2, lambda _: run(broken, processor, samples, distributed=True))
    assert [type(one) for one in found] == [ScoreError] * 2


def test_there_must_be_processes(model: Any, processor: Any, samples: list[Sample]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        from pore._processes import joined

        patch.setattr(passes, "joined", joined)
        with pytest.raises(InputError, match="init_process_group"):
            run(model, processor, samples, distributed=True)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_shares_of_images_of_any_size_add_up(size: int, seed: int) -> None:
    """Grids that differ within a share, between shares, or not at all, with bad samples."""
    random = np.random.default_rng(seed)
    grids = [(2, 2), (2, 3), (3, 3)][: seed + 1]
    start = Calibration(pore.Provenance(layer=2), "float32", ("",), samples=b"", table=Table())
    batches = []
    for number in range(7):
        samples = [Sample(f"{number}/{i}", None, "w6") for i in range(3)]
        rows, columns = grids[random.integers(len(grids))]
        read = Rows(
            (rows, columns),
            random.random((1, 2, rows * columns)),
            np.array([0, 2]),
            np.broadcast_to(np.arange(rows * columns), (2, rows * columns)),
            random.random((2, rows * columns, 2)),
        )
        batches.append(Batch(samples, random.bytes(36), [read], [BadSample(samples[1].id, "x")]))
    host = HostCalibration((start,))
    alone, then = host, ""
    parts = [host] * size
    for number, batch in enumerate(batches):
        alone, then = alone.including(batch), digest(then, batch.samples)
        parts[number % size] = parts[number % size].including(batch)
    told = [rounds.Told(number, batch.marks, batch.bad) for number, batch in enumerate(batches)]
    marks, bad = b"".join(one.marks for one in told), [x for one in told for x in one.bad]
    assert host.followed_by(parts, marks, bad, then) == alone
    first = host.including(batches[0])
    rest = [replace_first(part, host, batches, number, size) for number, part in enumerate(parts)]
    assert first.followed_by(rest, marks[36:], bad[1:], then) == alone


def replace_first(
    part: HostCalibration, host: HostCalibration, batches: list[Batch], number: int, size: int
) -> HostCalibration:
    """The share of a process without the first batch of all."""
    if number:
        return part
    for batch in batches[size::size]:
        host = host.including(batch)
    return host
