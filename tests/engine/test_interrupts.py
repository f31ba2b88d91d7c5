"""Ctrl-C at any moment leaves a model as it was, or `pore.remove` makes it so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from threading import Thread
from typing import Any

import pytest
import torch

import pore
from helpers.interrupting import interrupted, places, whole_state
from helpers.models import batch, prompt, tiny_llava
from pore.changes import Changes, changes_in
from pore.engine.pruner import Pruner
from pore.families.registry import family_of

# Python tells so where a generator that is let go of is interrupted, or what a block lets go of.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# On the embeddings, in the decoder, in the tower, and merging in its blocks.
KINDS: list[Pruner] = [
    pore.DivPrune(keep=4),
    pore.FastV(keep=4, layer=1),
    pore.VisionZip(keep=4),
    pore.ToMe(keep=4),
]
OURS = ("/pore/", "torch/nn/modules/module.py", "torch/utils/hooks.py", "test_interrupts.py")
ids = [pruner.name for pruner in KINDS]
kinds = pytest.mark.parametrize("pruner", KINDS, ids=ids)

PARTS = 12
"""A test of every place is cut into so many, each of every twelfth place."""


def in_parts(count: int) -> Any:
    """Run each of so many cases of a test in parts, of which CI runs one."""

    def decorate(test: Any) -> Any:
        parted = pytest.mark.parametrize("part", range(PARTS))(test)
        return pytest.mark.slow(pytest.mark.in_ci(count)(parted))

    return decorate


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=2, tower_layers=3, dtype=torch.float32)


def every(
    model: Any, do: Callable[[], object], files: tuple[str, ...], mend: bool, part: int
) -> int:
    """Interrupt what is done to a model at every twelfth place, the first time and the last.

    Args:
        model: The model.
        do: What is done, after which the model is as before.
        files: Words in the paths of the files where interrupts come.
        mend: Whether `pore.remove` may be needed.
        part: Which place is the first.

    Returns:
        The number of interrupts.
    """
    do()
    before, count = whole_state(model), 0
    for place, times in list(places(do, files).items())[part::PARTS]:
        for time in {1, times}:
            raised = interrupted(do, place, time, KeyboardInterrupt)  # its frames are held here
            count += raised is not None
            if mend:
                pore.remove(model)
            assert whole_state(model) == before, (place, time)
    do()
    assert whole_state(model) == before
    return count


@in_parts(3)
@pytest.mark.parametrize("pruner", KINDS[:3], ids=ids[:3])
def test_entering_and_leaving_a_block(model: Any, pruner: Any, part: int) -> None:
    """At every bytecode: the model is clean at once, though somebody holds the run."""
    runs = []

    def block() -> None:
        runs.append(pruner(model))
        with runs[-1]:
            pass

    assert every(model, block, OURS, mend=False, part=part) > 1000 / PARTS
    assert not any(run.in_block for run in runs)


@in_parts(4)
@kinds
def test_entering_and_leaving_a_block_in_all_code(model: Any, pruner: Any, part: int) -> None:
    def block() -> None:
        with pruner(model):
            pass

    assert every(model, block, ("",), mend=False, part=part) > 2000 / PARTS


@in_parts(1)
def test_applying_and_removing(model: Any, part: int) -> None:
    """`pore.remove` mends what an interrupt has left."""

    def both() -> None:
        KINDS[1].apply(model)
        pore.remove(model)

    assert (
        every(model, both, ("/pore/engine/run.py", "/pore/changes.py"), mend=True, part=part)
        > 1000 / PARTS
    )


@in_parts(1)
def test_a_stack_of_blocks(model: Any, part: int) -> None:
    """`ExitStack` takes what leaves a block after it has entered: `pore.remove` mends."""

    def block() -> None:
        with ExitStack() as stack:
            stack.enter_context(KINDS[0](model))

    assert (
        every(model, block, ("contextlib.py", "/pore/changes.py"), mend=True, part=part)
        > 500 / PARTS
    )


@in_parts(4)
@kinds
def test_applying_and_removing_in_all_code(model: Any, pruner: Any, part: int) -> None:
    def both() -> None:
        pruner.apply(model)
        pruner.apply(model)
        pore.remove(model)

    assert every(model, both, ("",), mend=True, part=part) > 2000 / PARTS


def test_an_interrupt_while_an_interrupt_is_cleaned_up(model: Any) -> None:
    """Twice Ctrl-C: what the second has kept from being undone, `remove` or entering undoes."""
    run = pore.FastV(keep=4, layer=1)(model)
    before, undone = whole_state(model), []

    def interrupt() -> None:
        undone.append(True)
        raise KeyboardInterrupt

    for mend in (lambda: pore.remove(model), lambda: run.__enter__().__exit__()):
        undone.clear()
        with pytest.raises(KeyboardInterrupt), run:
            run._made.insert(3, interrupt)
        assert whole_state(model) != before
        assert undone  # by `__exit__`, and when the block let go of it
        assert run.overdue
        run._made.remove(interrupt)
        mend()
        assert whole_state(model) == before


def test_changes_of_every_kind(model: Any) -> None:
    """What guides and benchmarks put into a model goes by the same rule."""
    layer = model.model.language_model.layers[0]

    def kernel(*_: Any) -> None: ...

    def note(*_: Any) -> None: ...

    def block() -> None:
        with Changes() as changes:
            changes.put(layer, "forward", layer.forward)
            changes.put(layer, "forward", note)
            changes.kernel("pore_test", kernel)
            changes.put(layer.self_attn, "config", object())
            changes.before(layer, note, with_kwargs=True, prepend=True)
            changes.after(layer, note, with_kwargs=True, always_call=True)

    for part in range(PARTS):
        every(model, block, OURS, mend=False, part=part)
    assert changes_in(model) == []


class Stop(Exception):
    pass


@in_parts(4)
@pytest.mark.parametrize(
    ("pruner", "error"),
    list(zip(KINDS, [Stop, KeyboardInterrupt, KeyboardInterrupt, SystemExit], strict=True)),
    ids=ids,
)
@torch.no_grad()  # an interrupt may keep a `no_grad` inside from ending
def test_inside_a_forward(model: Any, pruner: Any, error: type[BaseException], part: int) -> None:
    """At every call, which is where signals come: other threads go on, with the right logits."""
    inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
    got: list[torch.Tensor] = []

    def forward() -> None:
        with torch.no_grad():
            got.append(model(**inputs).logits)

    forward()  # transformers puts hooks of its own on
    before = whole_state(model)
    with pruner(model):
        forward()
        calls = [place for place in places(forward, opcodes=False) if place[2] == "call"]
        inside = whole_state(model)
        expected, count = got[-1], 0
        for number, place in enumerate(calls[part::PARTS]):
            count += interrupted(forward, place, 1, error) is not None
            assert whole_state(model) == inside, place
            if number % 8 == 0:  # the thread takes its time
                got.clear()
                thread = Thread(target=forward)
                thread.start()
                thread.join()
                assert torch.equal(got[-1], expected), place
        forward()
        assert torch.equal(got[-1], expected)
    assert whole_state(model) == before
    assert count > 100 / PARTS


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stop])
def test_inside_a_layer(model: Any, error: type[BaseException]) -> None:
    """torch runs no hook after an interrupt; the thread that had it is not waited for."""
    inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
    layers = family_of(model).layers(model)

    def fail(*_: Any) -> None:
        raise error

    for pruner in KINDS:
        got: list[torch.Tensor] = []

        def forward(got: list[torch.Tensor] = got) -> None:
            with torch.no_grad():
                got.append(model(**inputs).logits)

        with pruner(model):
            forward()
            hook = layers[1].register_forward_hook(fail)
            for call in (forward, lambda: model.generate(**inputs, max_new_tokens=2)):
                thread = Thread(target=pytest.raises, args=(error, call))
                thread.start()
                thread.join()
            hook.remove()
            forward()
            assert torch.equal(got[0], got[1])
