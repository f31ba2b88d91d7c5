"""Processes of a job: who does what, which device each has, and how errors travel."""

from __future__ import annotations

import pytest
import torch

from helpers.together import together
from pore._processes import Processes, device_of, launched
from pore.errors import BudgetError, InputError


def test_parts_are_dealt_out() -> None:
    processes = [Processes(rank, 3) for rank in range(3)]
    for number in range(10):
        assert [one.has(number) for one in processes].count(True) == 1
    assert [one.first for one in processes] == [True, False, False]


def test_all_know_what_each_brings() -> None:
    assert Processes().meet(lambda: 7) == [7]
    found = together(3, lambda own: own.meet(lambda: own.rank * 2))
    assert found == [[0, 2, 4]] * 3


def test_what_one_does_alone_is_told_to_all() -> None:
    did = []
    assert together(3, lambda own: own.alone(lambda: did.append(own.rank) or 7)) == [7] * 3  # type: ignore[func-returns-value]
    assert did == [0]


@pytest.mark.parametrize(
    ("raised", "kind"), [(BudgetError("no"), BudgetError), (FileNotFoundError(2, "no"), OSError)]
)
def test_all_raise_the_error_of_one(raised: Exception, kind: type[Exception]) -> None:
    def action(rank: int) -> int:
        if rank:
            raise raised
        return 1

    for found in together(3, lambda own: own.meet(lambda: action(own.rank))):
        assert type(found) is kind
        assert str(found).startswith("In process 1 of 3: ")
        assert str(found).endswith("no")


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with launched() as processes:
        assert processes == Processes()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc_per_node 1
    with launched() as processes:
        assert processes == Processes()


def test_every_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert device_of("auto") == "auto"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of("auto") == "cuda:1"
    assert device_of("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"Process 2 .* there are 2 \(cuda\)"):
        device_of("auto")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert device_of("auto") == "auto"
