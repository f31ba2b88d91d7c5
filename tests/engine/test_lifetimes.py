"""Copies of a pruned model, threads that outlive a block, models let go, and runs within runs."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
import pore
import pore.engine.calls
from cases import CASES
from cases.base import Case
from helpers.engine import _flash
from helpers.interrupting import whole_state
from helpers.models import N, batch, prompt, tiny_llava
from pore._compat.attention import attention_name
from pore._compat.modules import HOOKS
from pore.bench.measuring import measure, measure_calibration
from pore.changes import changes_in
from pore.engine.pruner import Pruner
from pore.errors import BudgetError, ModelStateError, PoreError, UnsupportedModelError
from pore.evaluation.running import evaluate

# On the embeddings, in the decoder, looking ahead, in several layers, in the tower, merging in it.
KINDS: list[Pruner] = [
    pore.DivPrune(keep=4),
    pore.FastV(keep=4, layer=1),
    pore.DART(keep=4, layer=1),
    pore.PyramidDrop(keep=4, layers=(1, 2)),
    pore.VisionZip(keep=4),
    pore.ToMe(keep=4),
]
kinds = pytest.mark.parametrize("pruner", KINDS, ids=[pruner.name for pruner in KINDS])


def model_of(attention: str = "sdpa", called: bool = True) -> Any:
    """A model, as it is after its first call, at which transformers puts hooks of its own on."""
    made = tiny_llava(layers=3, tower_layers=3, dtype=torch.float32)
    if attention != "sdpa":
        ALL_ATTENTION_FUNCTIONS.register("flash_test", _flash)
        ALL_MASK_ATTENTION_FUNCTIONS.register("flash_test", flash_attention_mask)
        made.model.language_model.config._attn_implementation_internal = attention
    if called:
        logits(made)
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch([prompt(3, 1, 5)], dtype=torch.float32)).logits
    return found


def generated(model: Any, **settings: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        **batch([prompt(3, 1, 5)], dtype=torch.float32), max_new_tokens=8, **settings
    )
    return found


def parts(model: nn.Module) -> list[Any]:
    """What every module has by name, how many hooks of which kind, and the kernel of its config."""
    return [
        (
            name,
            type(module),
            sorted(vars(module)),
            {key: len(vars(module)[key]) for key in (*HOOKS, *sum(HOOKS.values(), ()))},
            attention_name(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    ]


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("attention", ["sdpa", "flash_test"])
@kinds
def test_a_copy_is_a_plain_model(pruner: Any, attention: str, how: Any) -> None:
    """In the block and after it; the model stays pruned, and the copy can be pruned by itself."""
    dense = logits(model_of(attention))
    # The hooks that transformers puts on at the first call can be copied, but not pickled.
    model = model_of(attention, called=how is copy.deepcopy)
    plain = parts(model)
    with pruner(model) as run:
        twin = how(model)
        assert parts(twin) == plain
        assert changes_in(twin) == []
        decoder = twin.model.language_model
        configs = [vars(part)["config"] for part in decoder.modules() if "config" in vars(part)]
        assert all(config is decoder.config for config in configs)
        pore.remove(twin)
        assert torch.equal(logits(twin), dense)
        pruned = logits(model)
        assert not torch.equal(pruned[:, -1], dense[:, -1])
        with pruner(twin):
            assert torch.equal(logits(twin), pruned)
            assert torch.equal(logits(model), pruned)
        assert torch.equal(logits(twin), dense)
        assert torch.equal(logits(model), pruned)
        assert len(run.report) == 3
    assert torch.equal(logits(model), dense)
    assert torch.equal(logits(twin), dense)


@kinds
def test_copies_of_parts(pruner: Any) -> None:
    """Of every module by itself; that of the inner model can be pruned."""
    model = model_of()
    dense, plain = logits(model), parts(model)
    with pruner(model):
        for name, module in model.named_modules():
            twin = copy.deepcopy(module)
            prefix = f"{name}." if name else ""
            expected = [
                ("" if one[0] == name else one[0].removeprefix(prefix), *one[1:])
                for one in plain
                if one[0] == name or one[0].startswith(prefix)
            ]
            assert parts(twin) == expected
        whole = copy.deepcopy(model.lm_head), copy.deepcopy(model.model)
        inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(whole[0](whole[1](**inputs).last_hidden_state), dense)
            with pruner(whole[1]) as run:
                whole[1](**inputs)
        assert len(run.report) == 1


@kinds
def test_a_shallow_copy(pruner: Any) -> None:
    """It shares the parts, so it is pruned as long as they are; and nothing of ours stays in it."""
    model = model_of()
    dense, plain = logits(model), parts(model)
    with pruner(model):
        pruned, twin = logits(model), copy.copy(model)
        assert parts(twin)[0] == plain[0]
        with pytest.raises(ModelStateError, match="already pruned"), pruner(twin):
            pass
        pore.remove(twin)
        assert torch.equal(logits(twin), pruned)
        assert torch.equal(logits(model), pruned)
    assert parts(twin) == parts(model) == plain
    assert torch.equal(logits(twin), dense)


@kinds
def test_a_model_is_saved_as_it_was(pruner: Any, tmp_path: Path) -> None:
    model = model_of()
    dense = logits(model)
    weights, config = list(model.state_dict()), model.config.to_dict()
    with pruner(model):
        assert list(model.state_dict()) == weights
        assert model.config.to_dict() == config
        model.save_pretrained(tmp_path)
    assert "pore" not in (tmp_path / "config.json").read_text()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), dense)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_copies_in_every_family(case: Case) -> None:
    """Of whatever an adapter has changed."""
    model = case.model()
    plain, state, entered = parts(model), whole_state(model), 0
    for pruner in KINDS:
        with suppress(UnsupportedModelError, BudgetError), pruner(model):
            entered += 1
            assert parts(model) != plain
            assert parts(copy.deepcopy(model)) == plain
        assert whole_state(model) == state
    assert entered > 1


def test_a_copy_of_a_run_has_not_been_entered() -> None:
    """As of a module that holds a model and its run, and is averaged or logged."""
    model = model_of()
    dense = logits(model)
    held = {"model": model, "run": pore.FastV(keep=4, layer=1).apply(model)}
    twins = copy.deepcopy(held)
    assert twins["run"].model is twins["model"]
    twins["run"].__exit__(None, None, None)
    assert torch.equal(logits(twins["model"]), dense)
    pruned = logits(model)
    assert not torch.equal(pruned[:, -1], dense[:, -1])
    with twins["run"]:
        assert torch.equal(logits(twins["model"]), pruned)
    pore.remove(model)
    assert torch.equal(logits(model), dense)


# -- threads --------------------------------------------------------------------------------------


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


# -- models that are let go -----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "flash_test"])
@kinds
def test_an_applied_model_is_freed(pruner: Any, attention: str) -> None:
    """Without `remove`, and the names of its kernels with it."""
    model_of(attention)  # registers the kernel
    kernels = set(ALL_ATTENTION_FUNCTIONS)
    model = model_of(attention)
    gone = weakref.ref(model)
    pruner.apply(model)
    logits(model)
    generated(model)
    del model
    gc.collect()
    assert gone() is None
    assert set(ALL_ATTENTION_FUNCTIONS) == kernels


@kinds
def test_a_report_keeps_no_model(pruner: Any) -> None:
    model = model_of()
    with pruner(model) as run:
        logits(model)
    report, gone = run.report, weakref.ref(model)
    applied = pruner.apply(model).report
    logits(model)
    del model, run
    gc.collect()
    assert gone() is None
    assert [len(one.samples) for one in (report, applied)] == [1, 1]
    assert report.samples[0].images[0].seen == N


def test_a_block_in_a_generator_that_nobody_finishes() -> None:
    model = model_of()
    before = whole_state(model)

    def blocks() -> Any:
        with pore.FastV(keep=4, layer=1)(model):
            yield logits(model)

    one = blocks()
    next(one)
    assert whole_state(model) != before
    del one
    assert whole_state(model) == before


# -- runs within runs -----------------------------------------------------------------------------


def inner(model: Any) -> Any:
    return model.model


def sharing(model: Any) -> Any:
    """Another model with the same decoder."""
    other = model_of()
    other.model.language_model = model.model.language_model
    return other


@pytest.mark.parametrize("other", [inner, sharing, torch.compile], ids=lambda f: f.__name__)
@pytest.mark.parametrize("outer_first", [True, False])
@kinds
def test_a_second_pruner_is_refused(pruner: Any, other: Any, outer_first: bool) -> None:
    model = model_of()
    second = other(model)
    pair = (model, second) if outer_first else (second, model)
    state = whole_state(model)
    for way in ("with", "apply"):
        if way == "apply":
            pruner.apply(pair[0])
        with pruner(pair[0]) if way == "with" else pore.changes.Changes():
            inside = whole_state(model)
            for another in (pruner, pore.FastV(keep=4, layer=1), pore.DivPrune(keep=4)):
                with pytest.raises(ModelStateError, match="already pruned"), another(pair[1]):
                    pass
            assert whole_state(model) == inside
        pore.remove(pair[0])
        assert whole_state(model) == state


def test_remove_by_a_part_or_by_the_whole() -> None:
    model = model_of()
    before = whole_state(model)
    for one, other in ((model, model.model), (model.model, model)):
        pore.FastV(keep=4, layer=1).apply(one)
        pore.DivPrune(keep=4).apply(other)  # in its place
        pore.remove(one)
        assert whole_state(model) == before
        with pore.FastV(keep=4, layer=1)(one), pytest.raises(ModelStateError, match="with"):
            pore.remove(other)


@pytest.mark.parametrize("of", [lambda model: model, inner], ids=["model", "inner"])
def test_nothing_is_measured_in_a_block(of: Any) -> None:
    """Calibration, guides, fits, speed and accuracy are of the unpruned model."""
    model = model_of()
    inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
    samples = [pore.Sample("a", "b.png", "c", "d")]
    works: list[Callable[[], Any]] = [
        lambda: pore.calibrate(model, None, samples, layer=1),
        lambda: pore.calibrate_guide(model, None, samples, max_new_tokens=1),
        lambda: pore.guide(model, inputs, max_new_tokens=1),
        lambda: pore.FitPrune.fit(model, [inputs]),
        lambda: measure(model, [], repeats=1),
        lambda: measure_calibration(model, 1, repeats=1),
        lambda: evaluate(model, None, samples, None),
    ]
    with pore.FastV(keep=4, layer=1)(of(model)):
        for work in works:
            with pytest.raises(ModelStateError, match="already pruned"):
                work()
