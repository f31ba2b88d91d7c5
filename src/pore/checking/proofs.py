"""The library tests itself: whether pruning is exact on this machine, with these versions.

`check` builds a tiny random twin of a model from its config and tests the invariants on it. On a
transformers that is newer than those tested, a `with` block does so by itself, the first time that
a kind of model enters one.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from pore._compat.attention import attention_name
from pore._compat.making import seeded
from pore._compat.modules import unwrapped
from pore._compat.versions import beyond_tested, newest_tested
from pore.checking.invariants import fingerprint, invariants, left_clean
from pore.checking.result import CheckResult, Row
from pore.checking.shrinking import widened
from pore.checking.subject import TOLERANCES, Subject
from pore.checking.twin import build, twin_of
from pore.engine.setup import before_entering
from pore.errors import PoreError, UnsupportedModelError


def check(model: nn.Module) -> CheckResult:
    """Check that pruning is exact in models like this one, with the versions installed here.

    Args:
        model: A model of transformers. It is not touched: pruned is a tiny random twin with the
            same classes, attention implementation, dtype, device and kind of cache.

    Returns:
        The result; `passed` says whether every invariant holds.

    Raises:
        UnsupportedModelError: pore does not know the model, or can make no twin of it.
    """
    with _proofs.alone():
        return _check(unwrapped(model), thorough=True)


@before_entering
def prove(model: nn.Module) -> None:
    """On an untested transformers, refuse a model for which the exact part of the check fails.

    Every kind of model is checked once in a process.

    Args:
        model: The model, which is about to be pruned.

    Raises:
        UnsupportedModelError: The check fails, or no twin can be made; the message says why.
    """
    if beyond_tested():
        _proofs.ask(model)


class _Proofs:
    """The results for each kind of model in this process; one thread checks at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._looking = False
        self._found: dict[tuple[Any, ...], str | None] = {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other thread check, and let this one prune its twins without a further check."""
        with self._lock:
            before, self._looking = self._looking, True
            try:
                yield
            finally:
                self._looking = before

    def ask(self, model: nn.Module) -> None:
        with self._lock:
            if self._looking:
                return
            config: Any = model.config
            kind = (type(model), attention_name(config), _device(model), config.to_json_string())
            if kind not in self._found:
                with self.alone():
                    self._found[kind] = self._look(model)
            found = self._found[kind]
        if found is not None:
            raise UnsupportedModelError(
                f"transformers {version('transformers')} is newer than {newest_tested()}, the "
                f"newest that pore was tested with, and a check of {type(model).__name__} shows "
                f"that pruning is not exact on it: {found}. Install "
                f"'transformers<={newest_tested()}', or a newer pore; pore.check(model) says more."
            )

    def _look(self, model: nn.Module) -> str | None:
        try:
            failures = _check(model, thorough=False).failures
        except PoreError as error:
            return str(error).rstrip(".")
        return f"{failures[0].name}: {failures[0].finding}" if failures else None


_proofs = _Proofs()


_VERSIONS = {"pore": "pore-vlm", "transformers": "transformers", "torch": "torch"}


def _check(model: Any, thorough: bool) -> CheckResult:
    """Test the invariants on a twin in an exact type; if `thorough`, in the model's own type too.

    The exact type is float64, or float32 if the twin does not run in float64.
    """
    began = time.monotonic()
    config, generation = model.config, getattr(model, "generation_config", None)
    tiny, family = twin_of(config)
    cache = getattr(generation, "cache_implementation", None)
    cache = None if "quant" in str(cache) else cache  # a quantised cache rounds what it holds
    device, kind = _device(model), _kind(model, tiny)
    # Packed weights are stored in another type than the one they compute in.
    own: torch.dtype = model.dtype if model.dtype in TOLERANCES else torch.float32
    rows: list[Row] = []
    problems: dict[torch.dtype, str] = {}
    parameters = 0
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for dtype in dict.fromkeys([torch.float64, torch.float32, own]):
            if rows and not (thorough and dtype == own):
                continue  # one exact type is enough
            try:
                twin = build(copy.deepcopy(tiny), kind, dtype, config)
                parameters = sum(weight.numel() for weight in twin.parameters())
                subject = Subject(twin.to(device), family, cache)
                subject.warm()
                if subject.hides:
                    wide = build(widened(tiny), kind, dtype, config)
                    subject.wide = Subject(wide.to(device), family, cache)
            except UnsupportedModelError:
                raise
            except Exception as error:
                problems[dtype] = _told(error)
            else:
                rows += _rows(subject, exact=not rows and dtype.itemsize >= 4)
    if not rows or (thorough and own in problems):
        rows.append(Row("the unpruned twin runs", _name(own), False, problems[own]))
    return CheckResult(
        model=kind.__name__,
        family=family.name,
        versions={name: version(of) for name, of in _VERSIONS.items()},
        tested=not beyond_tested(),
        device=str(device),
        attention=str(attention_name(config.get_text_config())),
        cache=cache or "dynamic",
        parameters=parameters,
        seconds=time.monotonic() - began,
        rows=tuple(rows),
    )


def _rows(subject: Subject, exact: bool) -> Iterator[Row]:
    """The invariants in one type of weights."""
    before = fingerprint(subject.model)
    for name, holds in invariants(subject, exact):
        try:
            held, finding = holds()
        except Exception as error:  # a changed interface can lead to any error
            held, finding = False, _told(error)
        yield Row(name, _name(subject.dtype), held, finding)
    held, finding = left_clean(subject.model, before)
    yield Row("the model is left clean", _name(subject.dtype), held, finding)


def _told(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"raises {type(error).__name__}: {text[:300]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(model: Any, tiny: Any) -> Any:
    """The class of the twin: the model's own, or the one with a head if the model has none."""
    if hasattr(model, "generate"):
        return type(model)
    from transformers import AutoModelForImageTextToText

    with seeded():
        return type(AutoModelForImageTextToText.from_config(copy.deepcopy(tiny)))


def _device(model: Any) -> torch.device:
    """The device on which a model computes: that of the weights that are not offloaded."""
    places = (weight.device for weight in model.parameters())
    return next((place for place in places if place.type != "meta"), torch.device("cpu"))
