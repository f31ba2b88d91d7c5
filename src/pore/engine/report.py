"""What a run did: visual tokens seen and kept, tokens entering every layer, FLOPs."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from pore.cost.flops import ExtraRows, Flops, PatchGrid, model_flops
from pore.cost.shapes import ModelShape
from pore.errors import UnsupportedModelError
from pore.families.registry import shape_of
from pore.layout import Image, Layout

if TYPE_CHECKING:
    from pore.engine.pruner import Pruner
    from pore.families.base import Family


@dataclass(frozen=True)
class ImageReport:
    """What became of one image.

    Attributes:
        image: Which image of its sample, from 0.
        seen: Visual tokens it came with.
        kept: Raster indices of those that reached the last layer, in the order of the sequence; a
            merged token is the one it was merged into.
        extra: Tokens that reached it and stand for no single patch: CLS, a merged rest.
        grid: (height, width) of the image in tokens, or None where tokens lie on no grid.
        stages: For every stage, its layer and the raster indices that it left.
        hidden: Tokens among those seen that the attention mask hides, which never counted.
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
    """What became of one prompt.

    Attributes:
        sample: Number of the prompt, in the order the run saw them, from 0.
        images: Its images; empty for a prompt without image, of which nothing is dropped.
        tokens: Tokens entering every decoder layer, padding left out.
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
        """What the FLOPs are of: "model", or "decoder" where those of the tower are unknown."""
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
        images: The (frames, rows, columns) of the patches of every image, or tile of one; None
            where they are not known.
        projected: Visual tokens that the projector makes of them; likewise.
    """

    images: list[PatchGrid] | None
    projected: int | None

    @classmethod
    def of(cls, shape: ModelShape, images: Sequence[Image]) -> TowerWork:
        """The work for images of a model of some shape."""
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


class _Prefill:
    """What was noted while a prefill ran; tensors stay on their device until somebody asks."""

    def __init__(self, tokens: Tensor, layout: Layout | None) -> None:
        self.tokens = tokens
        self.layout = layout
        self.stages: list[tuple[int, Layout]] = []
        self.probes: list[tuple[int, int, bool, Layout]] = []
        self.tower_tokens: list[int] = []


class Report:
    """What a run kept, of every prefill: print it, iterate over samples, or write it as JSON.

    A prefill that failed is not in it. It grows by every prefill, some kilobytes each, for as long
    as the block lasts; that of an applied run is of the latest alone.

    Attributes:
        notes: What was done otherwise than the method's authors or the caller say.
    """

    def __init__(
        self, pruner: Pruner, model: nn.Module, family: Family, history: int | None
    ) -> None:
        self._pruner = pruner
        self._layers = len(family.layers(model))
        self._config: Any = model.config
        self._prefills: deque[_Prefill] = deque(maxlen=history)
        self._running: _Prefill | None = None
        self.notes: tuple[str, ...] = ()

    # -- notes of a running model -----------------------------------------------------------------

    def note(self, text: str) -> None:
        """Add a note, unless it was made before."""
        if text not in self.notes:
            self.notes = (*self.notes, text)

    def start(self, layout: Layout) -> None:
        """Note that a prefill with visual tokens begins; it counts once it is `finished`."""
        self._running = _Prefill(layout.tokens, layout)

    def stage(self, layer: int, layout: Layout) -> None:
        """Note what is left from `layer` on, in the running prefill."""
        assert self._running is not None
        self._running.stages.append((layer, layout))

    def probe(self, layer: int, rows: int, ahead: bool, layout: Layout) -> None:
        """Note attention rows computed in `layer` for every image, in the running prefill."""
        assert self._running is not None
        self._running.probes.append((layer, rows, ahead, layout))

    def tower(self, tokens: list[int]) -> None:
        """Note the tokens behind every tower block, in the running prefill."""
        assert self._running is not None
        self._running.tower_tokens = list(tokens)

    def without_images(self, tokens: Tensor) -> None:
        """Note that a prefill begins whose prompts have no visual tokens."""
        self._running = _Prefill(tokens, None)

    def finished(self) -> None:
        """The call of the model has come to its end: what ran counts."""
        if self._running is not None:
            self._prefills.append(self._running)
        self._running = None

    # -- reading ----------------------------------------------------------------------------------

    @property
    def samples(self) -> list[SampleReport]:
        """One entry per prompt, in the order the run saw them."""
        found: list[SampleReport] = []
        for prefill in self._prefills:
            found.extend(self._read(prefill, len(found)))
        return found

    def __len__(self) -> int:
        return sum(len(prefill.tokens) for prefill in self._prefills)

    def __iter__(self) -> Iterator[SampleReport]:
        return iter(self.samples)

    def _read(self, prefill: _Prefill, first: int) -> Iterator[SampleReport]:
        try:
            shape = shape_of(self._config)
        except UnsupportedModelError:
            shape = None
        before: list[int] = prefill.tokens.sum(-1).tolist()
        steps = [(layer, layout.tokens.sum(-1).tolist()) for layer, layout in prefill.stages]
        probed = [(n, r, a, layout.tokens.sum(-1).tolist()) for n, r, a, layout in prefill.probes]
        layouts = [(0, prefill.layout), *prefill.stages] if prefill.layout is not None else []
        kept = [(layer, _rasters(layout)) for layer, layout in layouts]
        images = () if prefill.layout is None else prefill.layout.images
        for row, count in enumerate(before):
            tokens = [count] * self._layers
            for layer, counts in steps:
                tokens[layer:] = [counts[row]] * (self._layers - layer)
            reports = tuple(
                ImageReport(
                    image.index,
                    image.count,
                    _patches(kept[-1][1][i]),
                    image.grid,
                    extra=kept[-1][1][i].count(-1),
                    stages=tuple((layer, _patches(rasters[i])) for layer, rasters in kept[1:]),
                    hidden=image.count - len(image.columns),
                )
                for i, image in enumerate(images)
                if image.row == row
            )
            unpruned = (count,) * self._layers
            work = TowerWork(None, None)
            if shape is not None:
                work = TowerWork.of(shape, [image for image in images if image.row == row])
            extra_rows = [
                ExtraRows(layer, rows * len(reports), lengths[row] if ahead else 0)
                for layer, rows, ahead, lengths in probed
                if reports
            ]
            projected = work.projected
            if self._pruner.tower_stage is not None and prefill.layout is not None:
                counts = prefill.stages[0][1].counts
                projected = sum(n for n, i in zip(counts, images, strict=True) if i.row == row)
            yield SampleReport(
                sample=first + row,
                images=reports,
                tokens=tuple(tokens),
                unpruned=unpruned,
                cost=None
                if shape is None
                else model_flops(
                    shape,
                    tokens,
                    images=work.images,
                    projected=projected,
                    tower_tokens=prefill.tower_tokens,
                    extra_rows=extra_rows,
                ),
                unpruned_cost=None
                if shape is None
                else model_flops(shape, unpruned, images=work.images, projected=work.projected),
            )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "schema": "pore.report",
            "version": 1,
            "method": self._pruner.name,
            "flops_count": "true",
            "notes": list(self.notes),
            "samples": [sample.to_dict() for sample in self],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        samples = self.samples
        if not samples:
            return f"{self._pruner.name}: no prefill yet"
        lines = [f"{self._pruner.name}: {len(samples)} prompt(s)"]
        lines.append(
            f"{'sample':>6}  {'image':>5}  {'visual tokens':>14}  {'tokens by layer':<30}  "
            f"{'TFLOPs before':>13}  {'after':>8}"
        )
        for sample in samples:
            steps = _steps(sample.tokens)
            cost = (_tera(sample.unpruned_flops), _tera(sample.flops))
            if not sample.images:
                lines.append(
                    f"{sample.sample:>6}  {'-':>5}  {'none':>14}  {steps:<30}  "
                    f"{cost[0]:>13}  {cost[1]:>8}"
                )
            for number, image in enumerate(sample.images):
                tail = (steps, *cost) if number == 0 else ("", "", "")
                lines.append(
                    f"{sample.sample:>6}  {image.image:>5}  "
                    f"{image.seen:>5} -> {len(image.kept) + image.extra:<5}   "
                    f"{tail[0]:<30}  {tail[1]:>13}  {tail[2]:>8}"
                )
        if not any(sample.images for sample in samples):
            lines.append("No prompt had visual tokens, so nothing was dropped.")
        if any(sample.flops_of == "decoder" for sample in samples):
            lines.append("FLOPs are of the decoder alone: those of the vision tower are not known.")
        return "\n".join([*lines, *self.notes])


def _tera(flops: int | None) -> str:
    return "unknown" if flops is None else f"{flops / 1e12:.4g}"


def _rasters(layout: Layout) -> list[list[int]]:
    pairs = zip(layout.raster.cpu(), layout.valid.cpu(), strict=True)
    return [raster[valid].tolist() for raster, valid in pairs]


def _patches(rasters: list[int]) -> tuple[int, ...]:
    return tuple(token for token in rasters if token >= 0)


def _steps(tokens: tuple[int, ...]) -> str:
    """Tokens by layer in short: `611 (0-1), 163 (2-31)`."""
    parts, start = [], 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or tokens[i] != tokens[start]:
            span = f"{start}" if i - 1 == start else f"{start}-{i - 1}"
            parts.append(f"{tokens[start]} ({span})")
            start = i
    return ", ".join(parts)
