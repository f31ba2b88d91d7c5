"""What decoder layers get after tokens were dropped: positions, masks, keys of earlier layers.

Rotary tables and positions are taken from those that the model made for the long sequence, at the
places that are left. For masks, see `layer_masks`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from pore._compat.arguments import MASK, POSITIONS, ROTARY
from pore._compat.caches import cache_in
from pore.engine.cache import CachedTokens
from pore.engine.entered import Entered
from pore.engine.layer_masks import LayerMasks, Memo
from pore.engine.setup import Setup
from pore.tensors.gathering import take


class LayerInputs:
    """The tokens of one call as the layers from one stage on get them.

    Args:
        setup: The method in the model.
        entered: How the call's tokens went into the first layer.
        index: (B, m) which of them the layers see; None means all.
        track: What the layers' cache holds, these tokens included.
        renumbered: Whether their positions are numbered anew.

    Attributes:
        track: See above.
        masks: Makes the layers' masks.
    """

    def __init__(
        self,
        setup: Setup,
        entered: Entered,
        index: Tensor | None,
        track: CachedTokens,
        renumbered: bool = False,
    ) -> None:
        self.track = track
        self.masks = LayerMasks(setup, entered, index, track)
        self._setup = setup
        self._index = index
        self._length = entered.length if index is None else index.shape[1]
        self._span = entered.span
        self._renumbered = renumbered
        self._memo = Memo()

    @property
    def past(self) -> Tensor:
        """(B, n) bool, False at filling, of what the layers had cached before this call."""
        return self.track.valid[:, : self.track.valid.shape[1] - self._length]

    def kwargs(
        self,
        kwargs: dict[str, Any],
        hidden: Tensor,
        layer: int | None,
        *,
        slots: int | None = None,
        source: LayerInputs | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments of a decoder layer for the short sequence.

        Args:
            kwargs: What the model passes to the layer.
            hidden: (B, m, D) the hidden states that enter the layer; of the last tokens only if
                the model has dropped the others itself.
            layer: Its number in the cache; None in a recurrent layer, which has none.
            slots: Number of keys that its kernel gets, if they come from an earlier layer.
            source: What that layer got, if it had more tokens; they are numbered as there.

        Returns:
            A copy with shortened mask, positions and rotary embedding; the same object if nothing
            has to change, as for most decoded tokens.
        """
        number = layer or 0
        renumbered = self._renumbered if source is None else source._renumbered
        same = self._index is None and not renumbered
        if same and not self.masks.needed(kwargs.get(MASK), number):
            return kwargs
        kwargs = dict(kwargs)
        whole = hidden.shape[1] == self._length
        if self._index is not None and whole:
            for name in self._setup.family.token_inputs:
                if kwargs.get(name) is not None:
                    kwargs[name] = take(kwargs[name], self._index, 1)
        if renumbered:
            # Layers with and without a window may have rotary tables of their own.
            make, kind = partial(self._numbered_anew, number), self._setup.windows[number]
            tables, positions = self._memo(source, hidden, make, kind, whole)
            kwargs.update({ROTARY: tables, POSITIONS: positions})
        elif self._index is not None and whole:
            for name in (ROTARY, POSITIONS):
                if kwargs.get(name) is not None:
                    make = partial(_positions, index=self._index)
                    kwargs[name] = self._memo(kwargs[name], hidden, make)
        if layer is None:
            kwargs[MASK] = self._memo(self.track, hidden, self._present)
            return kwargs
        cache = cache_in(kwargs)
        kwargs[MASK] = self.masks.mask(kwargs.get(MASK), hidden, cache, layer, slots)
        return kwargs

    def shared(self, states: tuple[Tensor, Tensor], source: LayerInputs) -> tuple[Tensor, Tensor]:
        """Keys and values of an earlier layer, of the tokens that these layers have.

        Args:
            states: Its keys and values (B, G, n, d), those in the cache first.
            source: What that layer got.

        Returns:
            Both, for the slots of this layer's cache.
        """

        def left(states: tuple[Tensor, Tensor], _: Tensor) -> tuple[Tensor, Tensor]:
            places = source.track.places(self.track, self._span).to(states[0].device)
            # A cache drops what lies outside a sliding window, and no mask shows it.
            gone = max(source.track.columns.shape[1] - states[0].shape[2], 0)
            index = (places - gone).clamp(min=0)[:, None, :, None]
            keys, values = (
                x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in states
            )
            return keys, values

        found: tuple[Tensor, Tensor] = self._memo(states, states[0], left)
        return found

    def _numbered_anew(
        self, layer: int, source: LayerInputs | None, hidden: Tensor
    ) -> tuple[Any, Tensor]:
        """Rotary tables and positions of the tokens left, counted from the first that is left."""
        family, model = self._setup.family, self._setup.model
        track = self.track if source is None else source.track
        positions = (track.valid.cumsum(-1) - 1).clamp(min=0)
        if source is not None:
            places = track.places(self.track, self._span)
            positions = positions.gather(1, places.to(positions.device))
        positions = positions[:, -hidden.shape[1] :].to(hidden.device) + family.first_position
        return family.rotary(model, hidden, positions, layer), positions

    def _present(self, track: CachedTokens, hidden: Tensor) -> Tensor | None:
        """(B, m) False at filling, for a layer that looks only at the tokens of this call."""
        if track.full or self._length == 1:
            return None
        return track.valid[:, -self._length :].to(hidden.device)


def _positions(value: Any, _: Tensor, index: Tensor) -> Any:
    """Rotary tables or positions at the places that are left."""
    if isinstance(value, (tuple, list)):
        return tuple(take(table, index, -2) for table in value)
    # Rotary tables of complex numbers come alone.
    return take(value, index, -2 if value.is_complex() else -1)
