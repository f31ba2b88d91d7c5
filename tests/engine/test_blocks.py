"""A block leaves the model as it was, however it ends."""

from __future__ import annotations

import copy
import gc
from threading import Event, Thread
from typing import Any

import pytest
import torch

import pore
from helpers.engine import METHODS, WITHOUT_DROPPED, fingerprint
from helpers.models import N, batch, prompt, tiny_llava
from pore.errors import ModelStateError


class TestLeavesTheModelAsItWas:
    inputs = batch([prompt(3, 1, 5)])

    @pytest.mark.parametrize("pruner", [*METHODS, *WITHOUT_DROPPED], ids=repr)
    def test_after_the_block(self, models: Any, pruner: Any) -> None:
        model = models["sdpa"]
        before = fingerprint(model)
        dense = model(**self.inputs).logits
        with pruner(model):
            model(**self.inputs)
            assert fingerprint(model) != before
        assert fingerprint(model) == before
        assert torch.equal(model(**self.inputs).logits, dense)

    def test_after_an_exception_inside_a_layer(self, models: Any) -> None:
        model = models["sdpa"]
        before = fingerprint(model)

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = model.model.language_model.layers[3].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"), pore.FastV(keep=4)(model):
            model(**self.inputs)
        hook.remove()
        assert fingerprint(model) == before

    def test_after_an_exception_that_is_caught_inside(self, models: Any) -> None:
        model = models["sdpa"]
        with pore.FastV(keep=4)(model) as run:
            with pytest.raises(ValueError, match="do not match"):
                model(
                    input_ids=self.inputs["input_ids"][:, :10],
                    pixel_values=torch.zeros(1, 3, 32, 32).double(),
                )
            out = model(**self.inputs).logits
        assert out.shape[1] == len(prompt(3, 1, 5)) - N + 4
        assert len(run.report) == 1

    def test_a_second_thread_is_refused(self, models: Any) -> None:
        """The first one, in the middle of a layer, goes on as if nothing had been."""
        model, found, inside, refused = models["sdpa"], [], Event(), Event()
        with pore.FastV(keep=4)(model):
            expected = model(**self.inputs).logits

        def wait(*_: Any) -> None:
            if not inside.is_set():
                inside.set()
                assert refused.wait(60)

        hook = model.model.language_model.layers[3].register_forward_hook(wait)
        with pore.FastV(keep=4)(model) as run:
            first = Thread(target=lambda: found.append(model(**self.inputs).logits))
            first.start()
            assert inside.wait(60)
            with pytest.raises(ModelStateError, match="another thread"):
                model(**self.inputs)
            refused.set()
            first.join()
            found.append(model(**self.inputs).logits)
        hook.remove()
        assert all(torch.equal(logits, expected) for logits in found)
        assert len(run.report) == len(found) == 2

    def test_entering_twice_is_refused(self, models: Any) -> None:
        model = models["sdpa"]
        before = fingerprint(model)
        with pore.FastV(keep=4)(model):
            with pytest.raises(ModelStateError, match="already pruned"), pore.Random(keep=4)(model):
                pass
            with pytest.raises(ModelStateError, match="with"):
                pore.remove(model)
        assert fingerprint(model) == before

    def test_apply_and_remove_are_idempotent(self, models: Any) -> None:
        model = models["sdpa"]
        before = fingerprint(model)
        pore.remove(model)
        pruner = pore.FastV(keep=4)
        pruner.apply(model)
        run = pruner.apply(model)
        for _ in range(3):
            model(**self.inputs)
        assert len(run.report) == 1  # the latest prefill only
        with pytest.raises(ModelStateError, match="already pruned"), pruner(model):
            pass
        pore.remove(model)
        pore.remove(model)
        assert fingerprint(model) == before

    def test_a_run_can_be_entered_again(self, models: Any) -> None:
        run = pore.FastV(keep=4)(models["sdpa"])
        for _ in range(2):
            with run:
                models["sdpa"](**self.inputs)
        assert len(run.report) == 2

    def test_nothing_keeps_a_model_alive(self) -> None:
        model = tiny_llava()
        with pore.FastV(keep=4)(model) as run:
            model(**self.inputs)
        import weakref

        gone = weakref.ref(model)
        del model, run
        gc.collect()
        assert gone() is None

    def test_a_copy_of_the_model_is_not_pruned(self, models: Any) -> None:
        before = models["sdpa"](**self.inputs).logits
        twin = copy.deepcopy(models["sdpa"])
        with pore.FastV(keep=4)(models["sdpa"]):
            assert torch.equal(twin(**self.inputs).logits, before)
