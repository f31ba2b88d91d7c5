"""Where torch keeps hooks, calls and states, and what wraps a model."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from helpers.models import tiny_llava
from pore._compat.modules import CALL, HOOKS, STATE, unwrapped
from pore._compat.threads import whereabouts


def test_compiled_models_hold_the_original() -> None:
    """`torch.compile(model)._orig_mod`."""
    model = nn.Linear(2, 2)
    assert unwrapped(torch.compile(model)) is model  # type: ignore[arg-type]
    assert unwrapped(model) is model


def test_wrapped_by_peft() -> None:
    """`get_base_model`, which is public, and below it the model itself."""
    peft = pytest.importorskip("peft")
    model = tiny_llava()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert unwrapped(wrapped) is model


@pytest.mark.parametrize("hooks", HOOKS)
def test_where_torch_keeps_hooks(hooks: str) -> None:
    """`_forward_hooks` and `_forward_pre_hooks`, and of each the flags by the same number."""
    flags = {"_forward_pre_hooks": {"with_kwargs": True}}
    how = flags.get(hooks, {"with_kwargs": True, "always_call": True})
    name = {"_forward_pre_hooks": "register_forward_pre_hook"}.get(hooks, "register_forward_hook")
    module, fresh = nn.Linear(1, 1), vars(nn.Linear(1, 1))
    handle = getattr(module, name)(print, **how)
    held = {key for key, value in vars(module).items() if "hooks" in key and value != fresh[key]}
    assert held == {hooks, *HOOKS[hooks]}
    assert list(vars(module)[hooks].items()) == [(handle.id, print)]
    assert all(list(vars(module)[flag]) == [handle.id] for flag in HOOKS[hooks])


def test_copies_and_pickles_ask_the_object_for_its_state() -> None:
    """`__getstate__`, in the object itself before its class."""
    module: Any = nn.Linear(1, 1)
    vars(module)[STATE] = partial(_told, module)
    for twin in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.told == 1
        assert STATE not in vars(twin)


def _told(module: Any) -> dict[str, Any]:
    state = {**type(module).__getstate__(module), "told": 1}
    del state[STATE]
    return state


def test_a_call_of_a_module() -> None:
    """`_call_impl`, which one module may have of its own."""
    module: Any = nn.Linear(1, 1)
    vars(module)[CALL] = lambda *args, **kwargs: (args, kwargs)
    assert module(1, a=2) == ((1,), {"a": 2})


def test_whereabouts_of_threads() -> None:
    """`sys._current_frames`: one that waits stays, one that has ended is nowhere."""
    inside, go = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        go.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    assert inside.wait(60)
    assert thread.ident is not None
    seen = []
    while len(seen) < 2 or seen[-1] != seen[-2]:
        seen.append(whereabouts([thread.ident]))
    assert len(seen[-1]) == 1
    go.set()
    thread.join()
    assert whereabouts([thread.ident]) == []
