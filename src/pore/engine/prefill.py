"""One prefill: what a run notes about it, and the reports made from these notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from pore.cost.flops import ExtraRows, Flops, PatchGrid, model_flops
from pore.cost.shapes import ModelShape
from pore.layout import Image, Layout


@dataclass(frozen=True)
class ImageReport:
    """What was kept of one image.

    Attributes:
        image: Which image of its sample, from 0.
        seen: Visual tokens it came with.
        kept: Raster indices of the tokens that reached the last layer, in the order of the
            sequence; a merged token counts as the one it was merged into.
        extra: Number of tokens that reached the last layer and stand for no single patch, such as
            CLS or a token merged from the rest.
        grid: (height, width) of the image in tokens, or None if tokens lie on no grid.
        stages: For every stage, its layer and the raster indices that it kept.
        hidden: Number of tokens in `seen` that the attention mask hides; they never count.
    """

    image: int
    seen: int
    kept: tuple[int, ...]
    grid: tuple[int, int] | None
    extra: int = 0
    stages: tuple[tuple[int, tuple[int, ...]], ...] = ()
    hidden: int = 0

    @property
    def coordinates(self) -> tuple[tuple[int, int], ...] | None:
        """(row, column) on the grid of every kept token, or None without a grid."""
        if self.grid is None:
            return None
        return tuple(divmod(index, self.grid[1]) for index in self.kept)


@dataclass(frozen=True)
class SampleReport:
    """What was kept of one prompt.

    Attributes:
        sample: Number of the prompt, in the order the run saw them, from 0.
        images: Its images; empty for a prompt without an image, from which nothing is dropped.
        tokens: Number of tokens that enter every decoder layer, without padding.
        unpruned: The same without pruning.
        cost: FLOPs of the prefill by part (true count); None for a model whose decoder pore does
            not know.
        unpruned_cost: The same without pruning.
    """

    sample: int
    images: tuple[ImageReport, ...]
    tokens: tuple[int, ...]
    unpruned: tuple[int, ...]
    cost: Flops | None
    unpruned_cost: Flops | None

    @property
    def flops(self) -> int | None:
        """FLOPs of the prefill (true count), or None; see `flops_of`."""
        return None if self.cost is None else self.cost.total

    @property
    def unpruned_flops(self) -> int | None:
        """FLOPs of the prefill without pruning, or None."""
        return None if self.unpruned_cost is None else self.unpruned_cost.total

    @property
    def flops_of(self) -> str | None:
        """What the FLOPs cover: "model", or "decoder" if those of the tower are unknown."""
        if self.cost is None:
            return None
        return "model" if self.cost.tower is not None else "decoder"

    @property
    def mean_visual_tokens(self) -> float:
        """Visual tokens averaged over the decoder layers, as SparseVLM and VisionZip count."""
        seen = sum(image.seen - image.hidden for image in self.images)
        dropped = sum(self.unpruned) - sum(self.tokens)
        return seen - dropped / len(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        record = asdict(self)
        record |= {"flops": self.flops, "unpruned_flops": self.unpruned_flops}
        record["flops_of"] = self.flops_of
        del record["cost"], record["unpruned_cost"]
        for image, source in zip(record["images"], self.images, strict=True):
            image["coordinates"] = source.coordinates
        return record | {"mean_visual_tokens": self.mean_visual_tokens}


class TowerWork(NamedTuple):
    """What the vision tower and the projector have to do for the images of one sample.

    Attributes:
        images: The (frames, rows, columns) of the patches of every image or tile; None if they are
            not known.
        projected: Number of visual tokens that the projector makes from them; None likewise.
    """

    images: list[PatchGrid] | None
    projected: int | None

    @classmethod
    def of(cls, shape: ModelShape, images: Sequence[Image]) -> TowerWork:
        """The work for these images in a model of this shape."""
        grids: list[PatchGrid] = []
        projected = 0
        for image in images:
            tiling, tower = image.tiling, shape.tower
            if tower is None:
                return cls(None, None)
            if shape.visual_tokens is not None:
                tiles = image.count // shape.visual_tokens if tiling is None else tiling.tiles
                grids += [(1, tower.side, tower.side)] * tiles
                frame = tiling is not None and tiling.grid is None and shape.frame_tokens
                projected += tiles * (frame or shape.visual_tokens)
                continue
            video = None if tiling is None else tiling.video
            if video is None and image.grid is None:
                return cls(None, None)
            frames, height, width = video or (1, *image.grid)  # type: ignore[misc]
            grids.append((frames, height * shape.merge, width * shape.merge))
            projected += frames * height * width
        return cls(grids, projected)


class Reading(NamedTuple):
    """What a reader has computed in addition to the model's own attention.

    Attributes:
        layer: The decoder layer whose attention it read.
        rows: Rows of attention computed for every image.
        runs: How often the layer's projections were computed only for the reader.
        layout: The visual tokens at that time.
    """

    layer: int
    rows: int
    runs: int
    layout: Layout

    def extra(self, images: int, length: int) -> list[ExtraRows]:
        """What the reader computed for a sample with this number of images and tokens."""
        if not images:
            return []
        again = [ExtraRows(self.layer, 0, length)] * (self.runs - 1)
        return [ExtraRows(self.layer, self.rows * images, length if self.runs else 0), *again]


@dataclass
class Prefill:
    """What a run notes about one prefill, and gives to the report when the model's call has ended.

    Its tensors stay on their device until somebody reads the report: reading them earlier would
    make the model wait.

    Attributes:
        tokens: (B, L) bool, False at padding, of the prompts as they came.
        layout: Their visual tokens; None if they have none.
        steps: For every stage, its layer and the visual tokens that are left after it.
        readings: What the readers of the stages have computed.
        projected: The visual tokens that a stage in the vision tower kept; None without one.
        tower_tokens: Number of tokens after the attention of every block of the vision tower;
            empty if blocks do not merge.
    """

    tokens: Tensor
    layout: Layout | None = None
    steps: list[tuple[int, Layout]] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    projected: Layout | None = None
    tower_tokens: Sequence[int] = ()

    def samples(self, layers: int, shape: ModelShape | None) -> list[SampleReport]:
        """The report of every prompt, numbered from 0.

        Args:
            layers: Decoder layers.
            shape: The model's sizes; None if pore does not know them.
        """
        steps = [(layer, layout.tokens.sum(-1).tolist()) for layer, layout in self.steps]
        lengths = [reading.layout.tokens.sum(-1).tolist() for reading in self.readings]
        images = self._images()
        projected = None if self.projected is None else self.projected.counts
        if projected is not None and shape is not None:
            pairs = zip(projected, images, strict=True)
            projected = [_projected(shape, image, n) for n, (image, _) in pairs]
        reports = []
        for row, count in enumerate(self.tokens.sum(-1).tolist()):
            tokens, unpruned = [count] * layers, (count,) * layers
            for layer, counts in steps:
                tokens[layer:] = [counts[row]] * (layers - layer)
            own = [(image, report) for image, report in images if image.row == row]
            cost = unpruned_cost = None
            if shape is not None:
                work = TowerWork.of(shape, [image for image, _ in own])
                extra_rows = [
                    extra
                    for one, length in zip(self.readings, lengths, strict=True)
                    for extra in one.extra(len(own), length[row])
                ]
                left = work.projected
                if projected is not None:
                    pairs = zip(projected, images, strict=True)
                    left = sum(n for n, (image, _) in pairs if image.row == row)
                cost = model_flops(
                    shape,
                    tokens,
                    images=work.images,
                    projected=left,
                    tower_tokens=self.tower_tokens,
                    extra_rows=extra_rows,
                )
                unpruned_cost = model_flops(
                    shape, unpruned, images=work.images, projected=work.projected
                )
            found = tuple(report for _, report in own)
            reports.append(SampleReport(row, found, tuple(tokens), unpruned, cost, unpruned_cost))
        return reports

    def _images(self) -> list[tuple[Image, ImageReport]]:
        """Every image, and its report."""
        if self.layout is None:
            return []
        first = _rasters(self.layout)
        steps = [(layer, _rasters(layout)) for layer, layout in self.steps]
        found = []
        for i, image in enumerate(self.layout.images):
            last = steps[-1][1][i] if steps else first[i]
            report = ImageReport(
                image.index,
                image.count,
                _patches(last),
                image.grid,
                extra=last.count(-1),
                stages=tuple((layer, _patches(rasters[i])) for layer, rasters in steps),
                hidden=image.count - len(image.columns),
            )
            found.append((image, report))
        return found


def _projected(shape: ModelShape, image: Image, kept: int) -> int:
    """How many tokens of an image the projector made, if a stage in the tower kept this number."""
    tiling = image.tiling
    if tiling is None or not tiling.of_frames or shape.frame_tokens or not shape.visual_tokens:
        return kept
    return tiling.tiles * shape.visual_tokens  # frames are pooled after it


def _rasters(layout: Layout) -> list[list[int]]:
    pairs = zip(layout.raster.cpu(), layout.valid.cpu(), strict=True)
    return [raster[valid].tolist() for raster, valid in pairs]


def _patches(rasters: list[int]) -> tuple[int, ...]:
    return tuple(token for token in rasters if token >= 0)
