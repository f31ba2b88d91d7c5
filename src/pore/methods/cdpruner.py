"""CDPruner: visual tokens that are diverse and relevant to the question, by a conditional DPP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pore.engine.limits import check_query
from pore.engine.stages import Limit, Selection, Stage, View
from pore.errors import BudgetError, InputError
from pore.families.base import Family
from pore.layout import Layout
from pore.methods._clip import ClipRelevance
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import cosine, pack, unit
from pore.tensors.selection import budget, check_finite, even_shares


@dataclass(frozen=True)
class CDPruner(BudgetPruner):
    """Keep the visual tokens of the most likely subset under a conditional DPP (arXiv 2506.10967).

    The kernel is L_ij = r_i S_ij r_j, with S the cosine of the projected embeddings and r the
    relevance to the question, scaled to (0, 1] over each image. The subset is built greedily: each
    next token is the one that adds most to the determinant, so the subset is diverse and relevant.
    It acts before the decoder; kept tokens stay in raster order and are numbered anew. Every tile
    of an image is pruned by itself, with an even share of `keep`; newline tokens stay.

    If the picked tokens already span all that are left, no token adds anything; then the most
    relevant ones fill the budget.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        relevance: `ClipRelevance`, as in the authors' code; or None, for models without a CLIP: the
            mean cosine of a visual token to the embeddings of the prompt's text tokens.
        faithful: Choose as the authors' code does: if the picked tokens already span all others,
            it can pick a token twice and so keep fewer; in tiled images it can choose patches of
            padding, which the decoder never gets, so that fewer than `keep` reach it.
    """

    relevance: ClipRelevance | None = None
    faithful: bool = False

    name: ClassVar[str] = "CDPruner"
    paper: ClassVar[str] = "arXiv 2506.10967"

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings."""
        return [Stage(0, self._select, tower=self.faithful or self.relevance is not None)]

    def limits(self, family: Family) -> list[Limit]:
        """CLIP knows the patches of its tower, not what a model makes of several."""
        found = super().limits(family)
        if self.relevance is not None and family.merged:
            found.append(
                Limit(
                    "CLIP tells the relevance of single patches, but visual tokens are made of "
                    "several; use relevance=None."
                )
            )
        return found

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a CLIP model to which the vision tower does not belong."""
        if self.relevance is not None:
            self.relevance.check(model, family)

    def _select(self, view: View) -> Selection:
        tiled = any(image.tiles > 1 for image in view.layout.images)
        tiles = _padded_tiles(view) if self.faithful and tiled else _tiles(view)
        if self.relevance is None:
            check_query(view.layout)  # text in a later piece of the prompt is not known yet
            scores = mean_cosine(tiles.features, prompt_embedding(view)[tiles.images])
        else:
            if any(image.of_video for image in view.layout.images):
                raise InputError(
                    "CLIP tells the relevance of single patches of images, which the tokens of a "
                    "video are not; use relevance=None."
                )
            device = tiles.features.device  # CLIP may be on another
            question = self.relevance.of(view).to(device)
            patches = self.relevance.images(tiles.of_tower(view)).to(device)
            scores = -mean_cosine(patches, question[tiles.images])
        relevance = rescaled(scores, tiles.valid, tiles.images)
        counts = self._counts(view, tiles)
        kernel = conditional_kernel(cosine(tiles.features, tiles.features), relevance)
        check_finite(kernel.diagonal(dim1=1, dim2=2))
        order = greedy_map(kernel, int(counts.max()), tiles.valid, self.faithful)
        steps = torch.arange(order.shape[1], device=order.device)
        picked = torch.zeros_like(tiles.slots)
        picked = picked.scatter_add(1, order, (steps < counts[:, None]).long()) > 0
        picked &= tiles.slots >= 0
        keep = torch.zeros_like(view.layout.valid)
        keep[tiles.images[:, None].expand_as(picked)[picked], tiles.slots[picked]] = True
        return Selection(keep)

    def _counts(self, view: View, tiles: _Tiles) -> Tensor:
        """(J,) tokens to pick from every tile."""
        rooms: list[list[int]] = [[] for _ in view.layout.images]
        for image, room in zip(tiles.images.tolist(), tiles.valid.sum(1).tolist(), strict=True):
            rooms[image].append(room)
        if tiles.padded:
            totals = [budget(self.keep, sum(room)) for room in rooms]
        else:
            totals = view.budget(self.keep)
        shares: list[int] = []
        for total, room in zip(totals, rooms, strict=True):
            if total > sum(room):
                raise BudgetError(
                    f"Asked to keep {total} tokens of an image of which {sum(room)} are left."
                )
            shares += even_shares(total, room)
        return torch.tensor(shares, device=tiles.valid.device)


@dataclass(frozen=True)
class _Tiles:
    """The J tiles from whose tokens subsets are chosen; an image in one piece is one tile.

    Attributes:
        images: (J,) which image of the batch each tile belongs to.
        slots: (J, m) which of the image's visual tokens each candidate is, -1 for those that are
            not in the prompt.
        patches: (J, m) which patch of the image it shows, tile after tile; -1 for none.
        valid: (J, m) bool, False where a tile has fewer.
        features: (J, m, D) projected embeddings.
        padded: Whether patches of padding are among them.
    """

    images: Tensor
    slots: Tensor
    patches: Tensor
    valid: Tensor
    features: Tensor
    padded: bool

    def of_tower(self, view: View) -> Tensor:
        """(J, m, C) the features that the candidates were projected from."""
        assert view.tower is not None
        for image, encoded in zip(view.layout.images, view.tower, strict=True):
            tiling = image.tiling
            patches = image.count if tiling is None else tiling.tiles * tiling.patches
            if encoded.features[..., 0].numel() != patches:
                raise InputError(
                    f"The tower gave {encoded.features[..., 0].numel()} features for {patches} "
                    "patches, so relevance by CLIP cannot be computed patch by patch; use "
                    "relevance=None after methods that merge in the tower."
                )
        if bool(((self.patches < 0) & self.valid).any()):
            raise InputError(
                "Some visual tokens stand for no single patch, so CLIP cannot tell how relevant "
                "they are; use relevance=None after methods that merge."
            )
        every = [encoded.features.flatten(0, 1) for encoded in view.tower]
        starts = [0]
        for features in every[:-1]:
            starts.append(starts[-1] + len(features))
        first = torch.tensor(starts, device=self.patches.device)[self.images]
        index = first[:, None] + self.patches.clamp(min=0)
        flat = torch.cat(every)
        return flat[index.to(flat.device)]


def _tiles(view: View) -> _Tiles:
    """The visual tokens in the prompt, tile by tile."""
    layout = view.layout
    tile, patch = layout.shows()
    pairs = [(i, n) for i, image in enumerate(layout.images) for n in range(image.tiles)]
    images, numbers = torch.tensor(pairs, device=tile.device).unbind(1)
    member = layout.valid[images] & (tile[images] == numbers[:, None])
    slots, valid = pack(member)
    return _Tiles(
        images=images,
        slots=slots,
        patches=_numbers(layout, tile, patch)[images].gather(1, slots),
        valid=valid,
        features=view.features[images[:, None], slots],
        padded=False,
    )


def _numbers(layout: Layout, tile: Tensor, patch: Tensor) -> Tensor:
    """(I, t) patches numbered tile after tile, -1 for none."""
    size = [1 if image.tiling is None else image.tiling.patches for image in layout.images]
    first = tile * torch.tensor(size, device=tile.device)[:, None]
    return torch.where(patch < 0, -1, first + patch)


def _padded_tiles(view: View) -> _Tiles:
    """All patches of tiled images, including padding, which is not in the prompt."""
    layout = view.layout
    assert view.tower is not None
    images, slots, patches = [], [], []
    for i, (image, encoded) in enumerate(zip(layout.images, view.tower, strict=True)):
        tiling = image.tiling
        assert tiling is not None
        whole = encoded.projected.shape[1] == tiling.patches
        if not whole or layout.counts[i] != len(tiling.shown):
            raise InputError(
                "faithful=True chooses among all patches of a tiled image, but a method before it "
                "has dropped some; use faithful=False in a chain."
            )
        count = tiling.tiles * tiling.patches
        slot = torch.full((count,), -1)
        slot[list(tiling.shown)] = torch.arange(len(tiling.shown))
        images += [i] * tiling.tiles
        slots.append(slot.view(tiling.tiles, -1))
        patches.append(torch.arange(count).view(tiling.tiles, -1))
    features = torch.cat([encoded.projected for encoded in view.tower])
    device = layout.raster.device
    return _Tiles(
        images=torch.tensor(images, device=device),
        slots=torch.cat(slots).to(device),
        patches=torch.cat(patches).to(device),
        valid=torch.ones(features.shape[:2], dtype=torch.bool, device=device),
        features=features.to(device),
        padded=True,
    )


def prompt_embedding(view: View) -> Tensor:
    """(I, D) mean of the unit embeddings of the text tokens of every image's prompt."""
    text = view.layout.text[..., None]
    units = unit(view.hidden_states).masked_fill(~text, 0.0)
    return (units.sum(1) / text.sum(1).clamp(min=1))[view.layout.rows]


def mean_cosine(features: Tensor, targets: Tensor) -> Tensor:
    """Cosine of every feature to a target, or the mean cosine if targets are means of unit vectors.

    Args:
        features: (J, m, E) features.
        targets: (J, E) targets.

    Returns:
        (J, m), at least float32.
    """
    return torch.matmul(unit(features), targets[..., None])[..., 0]


def rescaled(scores: Tensor, valid: Tensor, images: Tensor) -> Tensor:
    """Relevance scaled from just above 0 to about 1, over all tiles of an image together.

    Args:
        scores: (J, m) scores, higher is more relevant.
        valid: (J, m) bool, False where a tile has fewer candidates.
        images: (J,) the image of every tile.

    Returns:
        (J, m) relevance; 1 throughout an image whose scores are all equal, 0 where not `valid`.
    """
    every = scores.new_full((int(images.max()) + 1,), torch.inf)
    low = scores.masked_fill(~valid, torch.inf).amin(1)
    high = scores.masked_fill(~valid, -torch.inf).amax(1)
    low = every.scatter_reduce(0, images, low, "amin")[images, None]
    high = (-every).scatter_reduce(0, images, high, "amax")[images, None]
    relevance = torch.where(high > low, (scores - low + 1e-6) / (high - low), 1.0)
    return relevance.masked_fill(~valid, 0.0)


def conditional_kernel(similarity: Tensor, relevance: Tensor) -> Tensor:
    """(J, m, m) the kernel r_i S_ij r_j, of similarity S (J, m, m) and relevance r (J, m)."""
    return relevance[:, :, None] * similarity * relevance[:, None]


def greedy_map(kernel: Tensor, count: int, valid: Tensor, faithful: bool = False) -> Tensor:
    """The likeliest subset of a DPP, found greedily by an incremental Cholesky factor.

    Chen et al., "Fast greedy MAP inference for determinantal point process" (NeurIPS 2018).

    Args:
        kernel: (J, m, m) positive semi-definite kernels.
        count: Candidates to pick from every tile.
        valid: (J, m) bool, False at entries that are not candidates.
        faithful: Keep picking by the rounding errors (and NaN) of candidates that add nothing,
            which can pick one twice; otherwise those with the largest diagonal come next.

    Returns:
        (J, count) candidates in the order they are picked; arbitrary after the last valid one.
    """
    tiles = torch.arange(len(kernel), device=kernel.device)
    diagonal = kernel.diagonal(dim1=1, dim2=2).masked_fill(~valid, 0.0)
    top = diagonal.amax(1, keepdim=True)
    least = (10 * torch.finfo(kernel.dtype).eps * top)[:, 0]
    gains, left = diagonal.masked_fill(~valid, -torch.inf), valid.clone()
    factor = kernel.new_zeros(len(kernel), count, kernel.shape[1])
    order = []
    for step in range(count):
        if faithful:
            pick = gains.argmax(1)
        else:  # candidates that add nothing rank below all others, by their diagonal
            ranked = torch.where(gains > least[:, None], gains, diagonal - top - 1)
            pick = ranked.masked_fill(~left, -torch.inf).argmax(1)
            left[tiles, pick] = False
        order.append(pick)
        gain, known = gains[tiles, pick], factor[:, :step]
        row = torch.matmul(known[tiles, :, pick][:, None], known)[:, 0]
        row = (kernel[tiles, pick] - row) / gain.sqrt()[:, None]
        if not faithful:
            row = torch.where((gain > least)[:, None], row, 0.0)
        factor[:, step] = row
        gains = gains - row.square()
        gains[tiles, pick] = -torch.inf
    return torch.stack(order, 1)
