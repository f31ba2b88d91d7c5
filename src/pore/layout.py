"""Where the visual tokens of a batch lie: the one description that all later steps read.

From the prompt inwards: an `Image` is one image's placeholders in one sample; if it was cut into
tiles, its `Tiling` says how the tiles became these tokens; `Packing` does the same for a vision
tower that takes all images in one sequence. A `Layout` holds all images of a batch as padded
tensors; stages get it, and it shrinks as they drop tokens.

*Raster order* is the order of reading: row by row from the top, from left to right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Image:
    """The visual tokens of one image in a prompt.

    In the prompt ``[5, IMG, IMG, IMG, IMG, 6]`` an image of 2 × 2 tokens has the columns 1 to 4.

    Attributes:
        row: Which sample of the batch the image belongs to.
        index: Which image of that sample it is, from 0.
        columns: Positions of its visual tokens in the sequence, ascending. The first is the first
            in raster order, and so on.
        grid: (height, width) of the image in tokens, or None if tokens lie on no single grid.
        tiling: How its tiles became tokens; None for an image in one piece.
        structure: Positions of tokens between the visual tokens that stand for no patch, such as
            the end of a row.
        places: If the attention mask hides some of the image's tokens: which tokens, counted in
            raster order, lie at `columns`. None means all.
        count: How many tokens the image has, including hidden ones; 0 means as many as `columns`.
        of_video: Whether it is a video, of however many frames.
    """

    row: int
    index: int
    columns: Sequence[int]
    grid: tuple[int, int] | None = None
    tiling: Tiling | None = None
    structure: Sequence[int] = ()
    places: Sequence[int] | None = None
    count: int = 0
    of_video: bool = False

    def __post_init__(self) -> None:
        if not self.count:
            object.__setattr__(self, "count", len(self.columns))

    def showing(self, places: Sequence[int]) -> Image:
        """The image with all tokens hidden except those at these places (in raster order)."""
        if len(places) == len(self.columns):
            return self
        return replace(self, columns=[self.columns[i] for i in places], places=places)

    @property
    def cells(self) -> tuple[int, int] | None:
        """(height, width) of the grid on which its tokens lie, or those of each of its tiles or
        frames; None if it is not known."""
        if self.grid is not None or self.tiling is None:
            return self.grid
        if self.tiling.video is not None:
            return self.tiling.video[1:]
        side = math.isqrt(self.tiling.patches)
        square = self.tiling.tiles > 1 and side**2 == self.tiling.patches
        return (side, side) if square else None

    @property
    def frames(self) -> int:
        """How many frames of a video it shows, each by as many tokens; 1 for an image."""
        return 1 if self.tiling is None else self.tiling.frames

    @property
    def tiles(self) -> int:
        """How many pictures go through the vision tower for it."""
        return 1 if self.tiling is None else self.tiling.tiles


@dataclass(frozen=True)
class Tiling:
    """How an image that goes through the vision tower in tiles becomes tokens.

    LLaVA-NeXT, say, cuts a wide image into a 1 × 2 grid of tiles and adds the whole image at low
    resolution: 3 tiles of 576 patches. The prompt has the 576 tokens of the whole image first, then
    the two others row by row across both, with a newline after every row.

    Attributes:
        tiles: Number of tiles. If there are several, one is the whole image at low resolution. For
            a video, the number of frames.
        grid: (rows, columns) in which the other tiles lie. For a single tile, the grid of its
            tokens. None if it is not known.
        patches: Number of patches of a tile; if several patches make a token, its number of tokens.
        slots: For every token in the prompt, the patch that it shows, as tile * patches + patch; -1
            for tokens that show none. Patches that show only padding may have no token.
        size: (height, width) of the image in pixels, if the family knows it.
        blended: Whether tokens are blended from several patches; `slots` then name the nearest one.
        whole: Which tile is the whole image.
        apart: Whether each tile owns a contiguous run of placeholders, one for each of its patches.
            Then what is left of a tile stays in its run, in the order that a method gives it.
        video: (frames, rows, columns) of a video in tokens, if it has no tiles.
        of_frames: Whether the tiles are the frames of a video.
    """

    tiles: int
    grid: tuple[int, int] | None
    patches: int
    slots: tuple[int, ...]
    size: tuple[int, int] | None = None
    blended: bool = False
    whole: int = 0
    apart: bool = False
    video: tuple[int, int, int] | None = None
    of_frames: bool = False

    @property
    def frames(self) -> int:
        """How many frames of a video it shows; 1 for an image."""
        if self.video is not None:
            return self.video[0]
        return self.tiles if self.of_frames else 1

    @property
    def shown(self) -> tuple[int, ...]:
        """The patches that the visual tokens show, in the order of the prompt."""
        return tuple(slot for slot in self.slots if slot >= 0)

    def image(self, row: int, index: int, columns: Sequence[int]) -> Image:
        """The image whose tokens, including structure, lie at `columns`: one for each slot."""
        pairs = list(zip(columns, self.slots, strict=True))
        return Image(
            row,
            index,
            [column for column, slot in pairs if slot >= 0],
            self.grid if self.tiles == 1 else None,
            tiling=self,
            structure=[column for column, slot in pairs if slot < 0],
        )


@dataclass(frozen=True)
class Packing:
    """How images lie in the one sequence that goes through a vision tower, of T visual tokens.

    Each image is one run of the sequence. Within the run the tower may have its own order: the
    tokens of Qwen2.5-VL come window by window, and the patches of Pixtral row by row although a
    token of Mistral 3 is made from a square of them.

    Attributes:
        grids: (height, width) of every image, in visual tokens; of a video, of every frame.
        patches: Number of patches that become one visual token.
        groups: (T, patches) where in the sequence the patches of every visual token are; tokens in
            raster order, image after image. None if the patches of a token are side by side.
        order: (T,) for each token of the sequence, which token it is, counted in raster order,
            image after image. None if the sequence is in that order.
    """

    grids: tuple[tuple[int, int], ...]
    patches: int
    groups: Tensor | None = None
    order: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Visual tokens of every image."""
        return [height * width for height, width in self.grids]


def sources(images: Sequence[Image], count: int) -> list[int] | None:
    """For every image of a batch, which of the images that went through the vision tower it is.

    Beam search and several answers per prompt repeat samples after their images were encoded: with
    two beams, the images [a, b] of two samples become the batch [a, a, b, b], and the answer is
    [0, 0, 1, 1].

    Args:
        images: The images of the batch, by sample.
        count: How many images were encoded.

    Returns:
        The number of each image among the encoded ones; None if they do not fit together.
    """
    if count == 0 or len(images) % count:
        return None
    copies = len(images) // count
    number: dict[tuple[int, int], int] = {}
    return [number.setdefault((i.row // copies, i.index), len(number)) for i in images]


@dataclass(frozen=True)
class Layout:
    """The visual tokens, the padding and the last token of every sample of a batch.

    The I images of the batch are rows of tensors of t columns, where t is the number of tokens that
    the largest image has now, so that a method works on all images at once whatever their sizes. A
    layout describes the present sequence: dropping tokens gives a new layout, whose `raster` still
    says which of the original tokens are left.

    Attributes:
        images: The images, by sample and then by place in the prompt, as they entered the model.
        rows: (I,) the sample of every image.
        columns: (I, t) where its visual tokens lie in the sequence, ascending.
        raster: (I, t) which of the image's original tokens they are, in raster order: where to read
            a position bias. A merged token counts as the one it was merged into; -1 means none (a
            CLS token, or a token merged from the rest).
        valid: (I, t) bool, False where a smaller image is filled up to t.
        tokens: (B, L) bool, False at padding.
        text: (B, L) bool, True at text: neither visual tokens nor structure of an image.
        last: (B,) position of the last token that is not padding, whose attention most methods
            read.
        entered_last: (B,) the same in the sequence as it entered the model.
    """

    images: tuple[Image, ...]
    rows: Tensor
    columns: Tensor
    raster: Tensor
    valid: Tensor
    tokens: Tensor
    text: Tensor
    last: Tensor = field(repr=False)
    entered_last: Tensor = field(repr=False)

    @classmethod
    def of(cls, images: Sequence[Image], tokens: Tensor) -> Layout:
        """The layout of images in a batch.

        Args:
            images: The images of all samples.
            tokens: (B, L) bool, False at padding.

        Returns:
            The layout, on the device of `tokens`.
        """
        device = tokens.device
        widest = max((len(image.columns) for image in images), default=0)
        columns = torch.zeros(len(images), widest, dtype=torch.long)
        valid = torch.zeros(len(images), widest, dtype=torch.bool)
        shown = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, image in enumerate(images):
            columns[i, : len(image.columns)] = torch.as_tensor(image.columns)
            valid[i, : len(image.columns)] = True
            shown[image.row, [*image.columns, *image.structure]] = True
        rows = torch.tensor([image.row for image in images], dtype=torch.long)
        raster = torch.arange(widest).repeat(len(images), 1)
        for i, image in enumerate(images):
            if image.places is not None:
                raster[i, : len(image.places)] = torch.as_tensor(image.places)
        return cls(
            images=tuple(images),
            rows=rows.to(device),
            columns=columns.to(device),
            raster=raster.to(device),
            valid=valid.to(device),
            tokens=tokens,
            text=tokens & ~shown.to(device),
            last=_last(tokens),
            entered_last=_last(tokens),
        )

    @property
    def counts(self) -> list[int]:
        """How many visual tokens every image has now."""
        counts: list[int] = self.valid.sum(-1).tolist()
        return counts

    def only(self, images: Sequence[int]) -> Layout:
        """The layout as if it had only some of the images."""
        index = torch.tensor(images, dtype=torch.long, device=self.rows.device)
        some = {name: getattr(self, name)[index] for name in ("rows", "columns", "raster", "valid")}
        return replace(self, images=tuple(self.images[i] for i in images), **some)

    def to(self, device: torch.device) -> Layout:
        """The layout with its tensors on a device."""
        if self.tokens.device == device:
            return self
        names = ("rows", "columns", "raster", "valid", "tokens", "text", "last", "entered_last")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def places(self, n: int | Tensor) -> Tensor:
        """Where to read a position bias of `n` positions for every visual token.

        That is its raster index. A token that stands for no patch has none; for it the bias is read
        at its place among the image's present tokens, with the first at 0 and the last at n - 1.

        Args:
            n: Number of positions of the bias; or (I, 1), the number for every image.

        Returns:
            (I, t) positions from 0 to n - 1.
        """
        slots = torch.arange(self.raster.shape[1], device=self.raster.device)
        last = (self.valid.sum(-1, keepdim=True) - 1).clamp(min=1)
        relative = torch.minimum((slots * (n - 1) / last).round(), torch.as_tensor(n - 1)).long()
        return torch.where(self.raster < 0, relative, self.raster)

    def shows(self) -> tuple[Tensor, Tensor]:
        """Which patch of which tile every visual token shows.

        Returns:
            tile (I, t), 0 for an image in one piece; and patch (I, t), counted within that tile.
            Tokens that show no single patch have tile 0 and patch -1. Arbitrary where not `valid`.
        """
        tile, patch = torch.zeros_like(self.raster), self.raster.clone()
        for i, image in enumerate(self.images):
            if image.tiling is not None and image.tiling.tiles > 1:
                shown = torch.tensor(image.tiling.shown, device=patch.device)
                slot = shown[patch[i].clamp(0, len(shown) - 1)]
                none = patch[i] < 0
                tile[i] = (slot // image.tiling.patches).masked_fill(none, 0)
                patch[i] = (slot % image.tiling.patches).masked_fill(none, -1)
        return tile, patch

    def gather(self, states: Tensor) -> Tensor:
        """The states of the visual tokens of every image.

        Args:
            states: (B, L, ...) one entry per position of the sequence.

        Returns:
            (I, t, ...); entries that are not `valid` are arbitrary.
        """
        return states[self.rows[:, None].to(states.device), self.columns.to(states.device)]

    @property
    def text_after(self) -> Tensor:
        """(I, L) bool, True at the text of an image's sample that comes after the image."""
        last = self.columns.masked_fill(~self.valid, -1).amax(1, keepdim=True)
        after = torch.arange(self.text.shape[1], device=self.text.device) > last
        return self.text[self.rows] & after

    def kept_tokens(self, keep: Tensor) -> Tensor:
        """Which positions of the sequence stay if images keep only some of their visual tokens.

        Args:
            keep: (I, t) bool, the visual tokens kept.

        Returns:
            (B, L) bool, False at padding and at dropped visual tokens.
        """
        kept = self.tokens.clone()
        dropped = self.valid & ~keep
        rows = self.rows[:, None].expand_as(self.columns)
        kept[rows[dropped], self.columns[dropped]] = False
        return kept

    def shorten(self, keep: Tensor, index: Tensor, tokens: Tensor) -> Layout:
        """The layout after dropping visual tokens.

        Args:
            keep: (I, t) bool, the visual tokens kept.
            index: (B, M) the old position of every new one.
            tokens: (B, M) bool, False at padding.

        Returns:
            The layout of the shortened sequence.
        """
        old = self.tokens.shape[-1]
        where = torch.zeros(index.shape[0], old, dtype=torch.long, device=index.device)
        where.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        order = (~keep).long().argsort(dim=-1, stable=True)
        order = order[:, : int(keep.sum(-1).max())] if len(self.images) else order
        columns = self.columns.gather(1, order)
        return Layout(
            images=self.images,
            rows=self.rows,
            columns=where[self.rows[:, None], columns],
            raster=self.raster.gather(1, order),
            valid=keep.gather(1, order),
            tokens=tokens,
            text=self.text.gather(1, index) & tokens,
            last=_last(tokens),
            entered_last=self.entered_last,
        )


def _last(tokens: Tensor) -> Tensor:
    """(B,) position of the last True of every row."""
    positions = torch.arange(tokens.shape[-1], device=tokens.device)
    return (positions * tokens).amax(-1)
