"""Threads that outlive a block are waited for, or refused."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import pytest
import torch

import pore
import pore.engine.calls
from helpers.interrupting import whole_state
from helpers.lifetimes import generated, kinds, model_of
from pore.errors import ModelStateError, PoreError


class Gate:
    """A streamer that tells of the first token, and then waits to be let through."""

    def __init__(self) -> None:
        self.begun, self.open, self.seen = Event(), Event(), 0

    def put(self, _: Any) -> None:
        self.seen += 1
        if self.seen == 2:  # the first is the prompt
            self.begun.set()
            assert self.open.wait(60)

    def end(self) -> None: ...


class Worker(Thread):
    """Runs something in a thread, and holds what comes of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.result, self.error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error


@pytest.mark.parametrize("way", ["with", "apply"])
@kinds
def test_leaving_waits_for_a_thread_that_generates(pruner: Any, way: str) -> None:
    """The tokens are those of the block, however early it is left."""
    model, gate = model_of(), Gate()
    before = whole_state(model)
    with pruner(model):
        expected = generated(model)
    opener = Worker(lambda: gate.begun.wait(60) and gate.open.set())
    if way == "with":
        with pruner(model):
            worker = Worker(lambda: generated(model, streamer=gate))
            assert gate.begun.wait(60)
    else:
        pruner.apply(model)
        worker = Worker(lambda: generated(model, streamer=gate))
        assert gate.begun.wait(60)
        pore.remove(model)
    assert whole_state(model) == before
    worker.join(60)
    opener.join(60)
    assert worker.error is None
    assert torch.equal(worker.result, expected)


@pytest.mark.parametrize("in_a_layer", [False, True])
@kinds
def test_a_thread_that_waits_for_this_one_is_refused(
    pruner: Any, in_a_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its streamer, or a layer, goes on only when the block has been left: neither may hang."""
    monkeypatch.setattr(pore.engine.calls, "_PATIENCE", 0.05)
    model, gate, workers = model_of(), Gate(), []
    if in_a_layer:
        model.lm_head.register_forward_hook(lambda *_: gate.put(None))
    before = whole_state(model)

    def block() -> None:
        with pruner(model):
            worker = Worker(lambda: generated(model, streamer=None if in_a_layer else gate))
            workers.append(worker)
            assert gate.begun.wait(60)

    with pytest.raises(ModelStateError, match="Join the thread"):
        block()
    assert whole_state(model) == before
    gate.open.set()
    workers[0].join(60)
    assert isinstance(workers[0].error, PoreError)


def test_an_interrupt_ends_the_waiting() -> None:
    """And the thread that was waited for is refused all the same."""
    model, gate = model_of(), Gate()
    before = whole_state(model)
    run = pore.FastV(keep=4, layer=1)(model)

    def interrupt() -> None:
        raise KeyboardInterrupt

    workers = []

    def block() -> None:
        with run:
            run._calls.wait_for_others = interrupt  # type: ignore[method-assign]
            workers.append(Worker(lambda: generated(model, streamer=gate)))
            assert gate.begun.wait(60)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert whole_state(model) == before
    (worker,) = workers
    gate.open.set()
    worker.join(60)
    assert isinstance(worker.error, PoreError)


class Broken(Gate):
    def put(self, _: Any) -> None:
        raise RuntimeError("nobody listens")


@kinds
def test_a_block_left_from_inside_generate(pruner: Any) -> None:
    """By an error, or by `remove` in a callback: no thread waits for itself."""
    model = model_of()
    before = whole_state(model)
    with pytest.raises(RuntimeError, match="nobody listens"), pruner(model):
        generated(model, streamer=Broken())
    assert whole_state(model) == before

    class Removing(Gate):
        def put(self, _: Any) -> None:
            pore.remove(model)

    pruner.apply(model)
    with pytest.raises(PoreError):
        generated(model, streamer=Removing())
    assert whole_state(model) == before


def test_threads_that_have_ended_are_not_waited_for() -> None:
    model = model_of()
    with pore.FastV(keep=4, layer=1)(model):
        workers = [Worker(lambda: generated(model)), Worker(lambda: generated(None))]
        for worker in workers:
            worker.join(60)
    assert workers[0].error is None
    assert workers[1].error is not None
