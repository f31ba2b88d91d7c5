"""Queries and keys of a decoder layer as they are before RoPE rotates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pore._compat.arguments import HIDDEN, MASK, POSITIONS, ROTARY, SHARED_KEYS
from pore._compat.caches import without_cache
from pore.changes import Changes
from pore.engine.forward import Visual
from pore.engine.prefill import Reading
from pore.engine.readers import LayerAttention
from pore.engine.setup import Setup
from pore.engine.stages import Stage
from pore.errors import UnsupportedModelError
from pore.hooks import tap_attention
from pore.tensors.precision import autocast_of_now, scoring


class Plain(NamedTuple):
    """What the kernel of a layer would get if there were no RoPE.

    Attributes:
        query: (B, H, L, d) queries.
        key: (B, G, L, d) keys of the same tokens; G divides H.
        scaling: Factor on the logits.
        softcap: Cap of the logits (Gemma 2), or None.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None


class _Seen(Exception):
    """Stops a layer before its kernel runs."""


class WithoutRope:
    """Runs the attention of one layer up to its kernel, with rotary tables that rotate nothing.

    So the family's own norms, biases, fused projections and partial rotation are used. The layer's
    projections run once more.

    Args:
        attention: The attention module.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self._config: Any = None
        self._runs = False
        self._found: Plain | None = None
        self._again: Callable[[], Plain] | None = None

    def tap(self, changes: Changes) -> None:
        """Tap the module. Call this after all other taps, so that this tap comes first."""
        tap_attention(changes, self._attention, self._look, wanted=lambda: self._runs)
        self._config = vars(self._attention)["config"]

    def note(self, changes: Changes, wanted: Callable[[], bool]) -> None:
        """Note the module's arguments whenever they are `wanted`, for `taken`."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not wanted():
                return
            hidden: Tensor = args[0] if args else kwargs[HIDDEN]
            autocast = autocast_of_now(hidden.device.type)

            def again() -> Plain:
                with autocast():
                    return self.run(module.forward, args, kwargs)

            self._again = again

        changes.before(self._attention, before, with_kwargs=True)

    def taken(self) -> Callable[[], Plain]:
        """Hand over what was noted, as a function that runs the module on it once more."""
        again, self._again = self._again, None
        assert again is not None
        return again

    def run(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Plain:
        """The queries and keys of a run without RoPE.

        Args:
            forward: The forward of the module, or of the layer around it.
            args: Its arguments.
            kwargs: Its keyword arguments, the rotary tables among them.

        Raises:
            UnsupportedModelError: pore does not know this kind of rotary tables.
        """
        kwargs = {**without_cache(kwargs), ROTARY: _turning_nothing(kwargs.get(ROTARY))}
        if SHARED_KEYS in kwargs:  # the layer puts its keys there
            kwargs[SHARED_KEYS] = dict(kwargs[SHARED_KEYS] or {})
        held = vars(self._attention)
        own = held["config"]  # inside another tap, this config names the kernel itself
        self._runs, held["config"] = True, self._config
        try:
            with torch.no_grad():
                forward(*args, **kwargs)
        except _Seen:
            pass
        finally:
            self._runs, held["config"] = False, own
        found, self._found = self._found, None
        assert found is not None
        return found

    def _look(
        self, query: Tensor, key: Tensor, _: Any, scaling: float, softcap: float | None, *__: object
    ) -> None:
        self._found = Plain(query, key, scaling, softcap)
        raise _Seen


def _turning_nothing(tables: Any) -> Any:
    """Rotary tables of the same shapes that leave states as they are."""
    if isinstance(tables, (tuple, list)) and len(tables) == 2:
        cosines, sines = tables
        return torch.ones_like(cosines), torch.zeros_like(sines)
    if isinstance(tables, Tensor) and tables.is_complex():
        return torch.ones_like(tables)
    raise UnsupportedModelError(
        f"This model hands its attention {type(tables).__name__} for rotary tables, so pore cannot "
        "compute queries and keys without RoPE; use a method that reads attention as it is."
    )


class FirstLayer:
    """Shows the attention of the first layer to stages on the embeddings.

    What they drop changes positions, so it is attention without RoPE.

    Args:
        changes: Removes the tap at the end.
        setup: The method in the model.
    """

    def __init__(self, changes: Changes, setup: Setup) -> None:
        self._setup = setup
        self._without = WithoutRope(setup.family.attention(setup.layers[0]))
        self._without.tap(changes)

    def read(self, visual: Visual, stage: Stage, embeds: Tensor, positions: Tensor) -> None:
        """Let a stage's reader read.

        Args:
            visual: The images of the call; what was read is stored in it.
            stage: A stage with a reader.
            embeds: (B, m, D) the embeddings that are left.
            positions: (B, m) the positions with which they came.
        """
        assert stage.attention is not None
        visual.layout = layout = visual.layout.to(embeds.device)
        numbers = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
        found = self._run(embeds, positions)
        attention = LayerAttention(
            layout=layout,
            query=found.query,
            key=found.key,
            mask=None,
            scaling=found.scaling,
            softcap=found.softcap,
            past=layout.tokens[:, :0],
            origin=numbers,
            memory=visual.memory.get(stage.prepare),
        )
        with scoring():
            visual.attention = stage.attention(attention)
        visual.prefill.readings.append(Reading(0, sum(attention.read), 1, layout))

    def _run(self, embeds: Tensor, positions: Tensor) -> Plain:
        """Run the first layer on embeddings (B, m, D) at positions (B, m).

        These rotate nothing, but some families scale queries by them.
        """
        family, layer = self._setup.family, self._setup.layers[0]
        axes = positions.expand(3, -1, -1) if family.mrope else positions
        tables = family.rotary(self._setup.model, embeds, axes, 0)
        kwargs: dict[str, Any] = {MASK: None, POSITIONS: positions, ROTARY: tables}
        if family.shares_keys:
            kwargs[SHARED_KEYS] = {}
        return self._without.run(layer.forward, (embeds,), kwargs)
