"""What is known about one call of the model, from when its tokens reach the decoder to its end.

came      what the call was given: tokens, masks                      never changes
left      the tokens that are left of them                            stages change it
visual    the images among them; None for text and decoded tokens     stages change it
entered   how what was left went into the first layer                 never changes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pore.engine.asked import Asked
from pore.engine.cache import CachedTokens
from pore.engine.entered import Entered
from pore.engine.layer_inputs import LayerInputs
from pore.engine.prefill import Prefill
from pore.engine.records import CacheRecord
from pore.engine.stages import Selection
from pore.layout import Layout
from pore.tensors.gathering import pack, take
from pore.tower.runs import TowerRuns


@dataclass(frozen=True)
class Came:
    """What a call was given, before anything is dropped.

    Attributes:
        inputs: Arguments of the multimodal model by name.
        length: Tokens given, L.
        every: (B, n + L) bool, False at padding, of all tokens so far, dropped ones included.
        tokens: (B, L) bool, the same of the tokens given.
        past: (B, n) bool, the same of those before.
        starts: Where the tokens given start in the masks that the model makes, of layers without
            and with a sliding window.
        masks: The caller's own 4-D masks of which token sees which, over all n + L; None where the
            caller only told padding from tokens.
        types: (B, L) types of the tokens, in a family where they make masks.
    """

    inputs: dict[str, Any]
    length: int
    every: Tensor
    tokens: Tensor
    past: Tensor
    starts: tuple[int, int] = (0, 0)
    masks: Any = None
    types: Tensor | None = None

    def fitting(self, start: int) -> tuple[int | None, int | None]:
        """`starts`, or None if the masks were made for a cache that has not `start` slots."""
        first, second = self.starts
        return (first if first == start else None), (second if second == start else None)


class Left:
    """The tokens of a call that are left, as one stage after another drops some.

    Attributes:
        tokens: (B, m) bool, False at padding and at filling.
        ids: (B, m) their token ids; None where they came as embeddings.
        right: Whether shorter rows are filled on the right, as the batch was padded.
        entered: (B, l) which of the tokens that came entered the first layer; None: all did.
        index: (B, m) which of those that entered are left; None: all are. Before the first layer,
            which of those that came.
        sizes: (B, m) how many times attention counts the key of each; None: once.
    """

    def __init__(self, tokens: Tensor, ids: Tensor | None, right: bool) -> None:
        self.tokens = tokens
        self.ids = ids
        self.right = right
        self.entered: Tensor | None = None
        self.index: Tensor | None = None
        self.sizes: Tensor | None = None

    def drop(self, kept: Tensor) -> Tensor:
        """Drop tokens.

        Args:
            kept: (B, m) bool, False at those that go.

        Returns:
            (B, k) which of the m are left.
        """
        index, self.tokens = pack(kept, self.right)
        if self.ids is not None:
            self.ids = take(self.ids, index, 1)
        if self.sizes is not None:
            self.sizes = take(self.sizes, index, 1)
        old = self.index
        self.index = index if old is None else old.to(index.device).gather(1, index)
        return index

    def enter(self) -> None:
        """Those that are left go into the first layer."""
        self.entered, self.index = self.index, None

    @property
    def slots(self) -> Tensor | None:
        """(B, m) which of the tokens that came are left; None: all are."""
        if self.index is None or self.entered is None:
            return self.entered if self.index is None else self.index
        return self.entered.to(self.index.device).gather(1, self.index)


@dataclass
class Visual:
    """The images among the tokens of a call.

    Attributes:
        layout: Where their visual tokens lie among the tokens that are left.
        prefill: What will go into the report about the call.
        tower: What the vision tower saw last; None where the method does not read it.
        encoded: For every image, which of the images that the tower saw last it is; empty likewise.
        positions: (A, 1 or B, L) of the tokens that entered the first layer, on A axes.
        misplaced: Whether states of visual tokens were replaced by others than of their places.
        memory: What each `prepare` of the stages returned for the prompt.
        attention: What the latest reader returned.
        beside: What the latest correction read beside it.
        earlier: By layer, the states (B, m, D) with which the tokens that are left entered it; of
            those layers that a later stage looks back at.
        decided: By number, what stages before an MLP have decided, until tokens go behind it.
    """

    layout: Layout
    prefill: Prefill
    tower: TowerRuns | None
    encoded: list[int]
    positions: Tensor | None = None
    misplaced: bool = False
    memory: dict[Callable[..., Any] | None, Any] = field(default_factory=dict)
    attention: Any = None
    beside: Any = None
    earlier: dict[int, Tensor] = field(default_factory=dict)
    decided: dict[int, Selection] = field(default_factory=dict)


class Forward:
    """One call of the model inside the decoder.

    Args:
        record: What is known about the call's cache.
        came: What the call was given.
        left: What is left of its tokens.
        visual: The images among them, or None.
        entered: How they went into the first layer.
        prefill: What will go into the report about the call; None if it is not a prefill.
        asked: What the caller asks for in the output; None if the model's head is not called.

    Attributes:
        short: What the layers reached so far get; None if they get what the model passes.
        held: By layer, what layers got whose keys are read by later layers.
        ahead: While a layer runs in advance, only to show its attention: the keys (B, G, n, d) that
            it has cached, None where it gets them with those of this call, and (B, n) bool, False
            at padding. Otherwise None.
    """

    def __init__(
        self,
        record: CacheRecord,
        came: Came,
        left: Left,
        visual: Visual | None,
        entered: Entered,
        prefill: Prefill | None,
        asked: Asked | None,
    ) -> None:
        self.record = record
        self.came = came
        self.left = left
        self.visual = visual
        self.entered = entered
        self.prefill = prefill
        self.asked = asked
        self.short: LayerInputs | None = None
        self.held: dict[int, LayerInputs | None] = {}
        self.ahead: tuple[Tensor | None, Tensor] | None = None
        self._before = dict(record.tracks)

    @property
    def past(self) -> Tensor:
        """(B, n) bool, False at padding, of the slots that the layers reached have cached."""
        return self.entered.cached if self.short is None else self.short.past

    def cached(self, number: int) -> CachedTokens:
        """What the layers from a stage on hold in the cache, before this call.

        Args:
            number: Which of the stages in the decoder it is.
        """
        # Stages that had nothing to do have left their layers to the one before them.
        before = max((one for one in self._before if one <= number), default=None)
        track = None if before is None else self._before[before]
        if track is None and self.entered.columns is not None:
            track = self.entered.before
        return track or CachedTokens.unpruned(self.entered.cached)

    def extended(self, track: CachedTokens) -> CachedTokens:
        """The cached tokens, followed by the tokens of this call that are left."""
        index, tokens = self.left.index, self.left.tokens
        if index is None:
            index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if self.entered.columns is None:
            columns = index + self.entered.start
        else:
            columns = self.entered.columns.to(index.device).gather(1, index)
        # A single new token is never padding, and asking would cost a synchronisation.
        full = tokens.shape[1] == 1 or bool(tokens.all())
        return track.extended(columns, tokens, full, self.left.sizes)

    def whole(self) -> CachedTokens:
        """What layers before the first stage hold in the cache, this call included."""
        if self.entered.columns is not None:
            assert self.record.entry is not None
            return self.record.entry
        tokens, slots = self.entered.cached, self.record.cached
        columns = torch.arange(slots, device=tokens.device).expand(len(tokens), -1)
        return CachedTokens(columns, torch.ones_like(columns, dtype=torch.bool), True)
