"""Calls of a pruned model: those that have not ended yet, and what is known in the current one."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from pore._compat.arguments import MASK
from pore._compat.caches import check_cache_name
from pore._compat.threads import whereabouts
from pore.engine.asked import Asked
from pore.engine.forward import Forward
from pore.engine.prefill import Prefill
from pore.engine.stages import Method
from pore.errors import ModelStateError

_PATIENCE = 20.0  # seconds that a thread may stand still while another waits for it to leave


class Call:
    """One call of the model, starting at its first hook.

    Attributes:
        inputs: The multimodal model's arguments by name.
        thread: The thread that runs it.
        forward: What is known about it once its tokens have reached the decoder.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.thread = get_ident()
        self.forward: Forward | None = None


class _Unended:
    """A call of the model or of its `generate` that has not ended yet.

    Attributes:
        thread: The thread that runs it.
        cut_short: Whether the model was unhooked meanwhile.
        makes_masks: Whether 4-D masks in it are made by transformers.
    """

    def __init__(self, makes_masks: bool) -> None:
        self.thread = get_ident()
        self.makes_masks = makes_masks
        self.cut_short = False


class Calls:
    """The calls of one pruned model; one thread at a time may be inside.

    Args:
        model: The model.
        inputs: Names the arguments of its multimodal part, as `Family.inputs` does.
        method: The method.
        keep: Called with the prefill of every call that has succeeded.

    Attributes:
        inside: The call that is inside the model now.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Callable[..., dict[str, Any]],
        method: Method,
        keep: Callable[[Prefill], None],
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._method = method
        self._keep = keep
        self._asked: dict[int, Asked] = {}
        self._unended: list[_Unended] = []
        self.inside: Call | None = None

    # -- the call inside --------------------------------------------------------------------------

    @property
    def forward(self) -> Forward:
        """What is known about the call inside.

        Raises:
            ModelStateError: There is none: a part of the model was called by itself.
        """
        call = self.inside
        if call is None or call.forward is None:
            raise alone()
        return call.forward

    @property
    def asked(self) -> Asked | None:
        """What this thread's call asks for in the output; None if the head is not called."""
        return self._asked.get(get_ident())

    def answered(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of the whole model; the caller may ask for parts of its output."""
        asked = Asked(forward, args, kwargs)
        thread = get_ident()
        self._asked[thread] = asked
        try:
            output = asked.with_loss(self._model, forward(**asked.kwargs))
        finally:
            self._asked.pop(thread, None)
        if asked.prefill is not None:
            self._keep(asked.prefill)
        return output

    def before_model(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the multimodal model: a call goes in."""
        check_cache_name(type(base), kwargs)
        inside = self.inside
        if inside is not None and inside.thread != get_ident():
            raise ModelStateError(
                "A pruned model was called while another thread runs it; let one thread in at "
                "a time, with a lock around `generate`, or give every thread a model of its own."
            )
        self.inside = Call(self._inputs(self._model, args, kwargs))

    def model_done(self, *_: object) -> None:
        """A hook after the multimodal model, if no error occurred: its prefill counts.

        If it is part of a larger model, the prefill counts once that model's output is made.
        """
        forward = None if self.inside is None else self.inside.forward
        if forward is not None and forward.prefill is not None and forward.asked is None:
            self._keep(forward.prefill)

    def after_model(self, *_: object) -> None:
        """A hook after the multimodal model, also after errors: the call has left the model."""
        inside = self.inside
        if inside is not None and inside.thread == get_ident():
            self.inside = None

    # -- calls that have not ended ----------------------------------------------------------------

    def watched(
        self,
        function: Callable[..., Any],
        makes_masks: bool = False,
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> Callable[..., Any]:
        """Wrap a forward or `generate` so that its end is noticed, even if it is interrupted.

        Hooks do not suffice: torch runs none after Ctrl-C, and one `generate` is many forwards.

        Args:
            function: The forward or `generate`.
            makes_masks: Whether it may turn a padding mask into 4-D masks.
            check: Called with the keyword arguments first; raises an error if they do not fit.
        """

        @functools.wraps(function)  # `generate` reads signatures, and so do trainers
        def watched(*args: Any, **kwargs: Any) -> Any:
            if check is not None:
                check(kwargs)
            given = kwargs.get(MASK)
            given_2d = given is None or (isinstance(given, Tensor) and given.dim() == 2)
            unended = _Unended(makes_masks and given_2d)
            try:
                self._unended.append(unended)
                result = function(*args, **kwargs)
            finally:  # first the lines that no interrupt can come between
                if self.inside is not None and self.inside.thread == unended.thread:
                    self.inside = None
                if unended in self._unended:
                    self._unended.remove(unended)
            if unended.cut_short:
                raise ModelStateError(
                    f"The model was pruned by {self._method.name} when this call began, and "
                    "no longer when it ended, so its result is neither pruned nor unpruned; join "
                    "the calling thread before the `with` block ends."
                )
            return result

        return watched

    def makes_masks(self) -> bool:
        """Whether 4-D masks in this thread's call are made by transformers."""
        thread = get_ident()
        return any(one.makes_masks and one.thread == thread for one in list(self._unended))

    def cut_short(self) -> None:
        """Called when the model is unhooked: what other threads still run ends in an error."""
        for unended in list(self._unended):
            unended.cut_short = True

    def wait_for_others(self) -> None:
        """Wait until no other thread is inside the model or its `generate`.

        A thread that streams its answer stays inside until the last token. It may itself wait
        for this thread.

        Raises:
            ModelStateError: Another thread stands still.
        """
        before, since = None, time.monotonic()
        while others := [one for one in list(self._unended) if one.thread != get_ident()]:
            places = whereabouts(one.thread for one in others)
            if not places:  # these threads have died
                return
            if places != before:
                before, since = places, time.monotonic()
            elif time.monotonic() - since > _PATIENCE:
                raise ModelStateError(
                    "A block was left, or its pruner removed, while another thread still generated "
                    "with the model and did not go on: its answer is refused. Join the thread "
                    "before the block ends, and read what it streams inside the block."
                )
            time.sleep(0.005)


def alone() -> ModelStateError:
    """The error for a part of a pruned model that was called outside of a call of the model."""
    return ModelStateError(
        "The language model of a pruned model was called by itself; call the whole model, or leave "
        "the `with` block first."
    )
