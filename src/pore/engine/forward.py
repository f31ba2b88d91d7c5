"""One call of the model, as it travels through the hooks."""

from __future__ import annotations

from threading import get_ident
from typing import Any

from torch import Tensor

from pore._compat.arguments import IDS
from pore.engine.cache import CachedTokens
from pore.engine.layer_inputs import LayerInputs
from pore.engine.records import CacheRecord
from pore.layout import Image, Layout


def marked_images(marked: Tensor, grid: tuple[int, int] | None) -> list[Image]:
    """The images of a mask of visual tokens: each unbroken run is one.

    Args:
        marked: (B, L) bool.
        grid: (height, width) of the family's images; kept where a run has that many tokens.

    Returns:
        The images.
    """
    images = []
    for row, line in enumerate(marked.tolist()):
        index, start = 0, None
        for column, visual in enumerate([*line, False]):
            if visual and start is None:
                start = column
            elif not visual and start is not None:
                columns = range(start, column)
                fits = grid is not None and grid[0] * grid[1] == len(columns)
                images.append(Image(row, index, columns, grid if fits else None))
                index, start = index + 1, None
    return images


class _Forward:
    """One forward of the model, as it travels through the hooks.

    Attributes:
        inputs: Arguments of the multimodal model by name.
        thread: The thread that runs it.
        state: What is known of its cache.
        layout: The visual tokens among the tokens of this forward; None where there are none.
        tokens: (B, m) bool, False at padding and filling, of this forward's tokens as they are now.
        ids: (B, m) their ids; None where they came as embeddings.
        past: (B, n) bool, the same of the slots in the cache of the layers reached.
        cached: (B, n) bool, the same of the slots in the cache of the first layer.
        right: Whether the batch is padded on the right, which it then stays.
        start: Slots in the cache of the first layer before this forward.
        length: Tokens of this forward that enter the first layer.
        span: Tokens so far, of the sequence over which a sliding window is counted.
        columns: (B, m) where in it the tokens that enter the first layer are; None where they are
            all there.
        before: Which of it the cache of the first layer holds; None likewise.
        starts: Where they start in the model's masks, of layers without and with a sliding window.
        custom: The caller's masks of which token sees which, over all tokens of that sequence;
            None where only padding was told.
        every: (B, length) bool, `tokens` as they came.
        entered: (B, m) where in this forward the tokens that enter the first layer came; None: all.
        own: Masks of this forward's tokens alone, where they see more than those before them and
            the model's masks may not fit; else None.
        index: (B, m) where the tokens were when they entered the first layer; None: all are there.
        short: What the layers reached get; None: what the model passes.
        held: What layers got at whose keys later ones look.
        merged: Whether states of visual tokens were replaced.
        looking_ahead: Whether a layer runs in advance, only to show its attention.
        earlier: What that layer has cached: keys (B, G, n, d), None where it gets them with those
            of this forward, and (B, n) bool, False at padding.
        memory: What the stages' `prepare` made of the prompt.
        attention: What the latest reader took.
        encoded: Which of the images that went through the vision tower every image is.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.thread = get_ident()
        self.ids: Tensor | None = inputs.get(IDS)
        self.state: CacheRecord | None = None
        self.layout: Layout | None = None
        self.tokens: Tensor
        self.past: Tensor
        self.cached: Tensor
        self.right = False
        self.start = 0
        self.length = 0
        self.span = 0
        self.columns: Tensor | None = None
        self.before: CachedTokens | None = None
        self.starts = (0, 0)
        self.custom: Any = None
        self.every: Tensor
        self.entered: Tensor | None = None
        self.own: Any = None
        self.index: Tensor | None = None
        self.short: LayerInputs | None = None
        self.held: dict[int, LayerInputs | None] = {}
        self.merged = False
        self.looking_ahead = False
        self.earlier: tuple[Tensor | None, Tensor] | None = None
        self.memory: dict[Any, Any] = {}
        self.attention: Any = None
        self.encoded: list[int] = []

    @property
    def slots(self) -> Tensor | None:
        """(B, m) where in this forward the tokens that are left came; None: all are left."""
        if self.index is None or self.entered is None:
            return self.entered if self.index is None else self.index
        return self.entered.to(self.index.device).gather(1, self.index)

    def fitting(self, start: int) -> tuple[int | None, int | None]:
        """`starts`, but None where the model made masks for a cache of other than `start` slots."""
        first, second = self.starts
        return (first if first == start else None), (second if second == start else None)
