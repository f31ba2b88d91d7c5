"""Layouts of pictures of real sizes, through each family's own processor.

Where a visual token lies in a picture is found out in two ways that know nothing of each other:
from what the processor makes of a coloured slope (`pore.data.coverage`), and from which features of
the model change when a mark is painted somewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor

import pore
from helpers.padding import padding_fraction
from helpers.photographs import SIZES, in_pixels, marked, photograph
from pore import plotting
from pore.data.coverage import Coverage, coverage_of
from pore.data.prompts import render
from pore.errors import InputError
from pore.families.registry import family_of
from pore.tensors.selection import budget
from processors import KINDS
from processors.base import Kind, features, parts, parts_or_skip

FAST = "portrait"
EXTREME = {"LLaVA with SigLIP": "one pixel high", "LLaVA-NeXT": "tiny", "Qwen2-VL": "tiny"}
"""Pictures of another kind, of some families: the others are slow."""
MARKS = ((0.42, 0.55, 0.5, 0.63), (0.88, 0.04, 0.96, 0.12))
"""(left, top, right, bottom) as shares of the picture."""


def slow(kind: Kind, name: str) -> bool:
    return name not in (FAST, EXTREME.get(kind.name))


CASES = [
    pytest.param(kind, name, marks=[pytest.mark.slow] * slow(kind, name), id=f"{kind}-{name}")
    for kind in KINDS
    for name in SIZES
]


def encoded(kind: Kind, pictures: list[Image.Image]) -> Any:
    processor, _ = parts(kind)
    prompts = [render(processor, "look")] * len(pictures)
    nested = [[picture] for picture in pictures]
    return processor(
        images=nested, text=prompts, padding=True, padding_side="left", return_tensors="pt",
        **kind.kwargs,
    )  # fmt: skip


def tokens(kind: Kind, model: Any, inputs: Any) -> list[Tensor]:
    """(n, D) the features of every image's visual tokens, by what `Family.images` says."""
    found = features(model, inputs)
    placeholder = inputs["input_ids"] == model.config.image_token_id
    assert int(placeholder.sum()) == len(found)
    places = torch.zeros(*placeholder.shape, found.shape[-1])
    places[placeholder] = found
    family = family_of(model)
    images = family.images(model, family.inputs(model, (), inputs))
    newlines = 0
    for image in images:
        assert placeholder[image.row, image.columns].all()
        newlines += int(placeholder[image.row, image.structure].sum()) if image.structure else 0
    assert sum(len(image.columns) for image in images) + newlines == len(found)
    return [places[image.row, image.columns] for image in images]


def overlap(boxes: Tensor, mark: tuple[int, int, int, int], reach: Tensor | float = 0.0) -> Tensor:
    """(n,) area of the part of every box, widened by a reach, that lies in a mark."""
    low, high = torch.tensor(mark[:2]), torch.tensor(mark[2:])
    sides = torch.minimum(boxes[:, 2:] + reach, high) - torch.maximum(boxes[:, :2] - reach, low)
    return sides.clamp(min=0).prod(-1)


def check(boxes: Coverage, changed: Tensor, mark: tuple[int, int, int, int], blended: bool) -> None:
    """That what changed is where the mark is, to a fraction of a token."""
    known = ~boxes.boxes.isnan().any(1)
    assert not changed[~known].any()  # nothing but padding
    box, changed = boxes.boxes[known], changed[known]
    span = box[:, 2:] - box[:, :2]
    size = torch.tensor(boxes.size, dtype=torch.float64)
    # Resizing reaches 3 pixels to either side, of the picture or of what it becomes; a token has 14
    # of those at least. Blended tokens reach into the patches beside them.
    reach = 3 * (span / 14).clamp(min=1) + 0.003 * size + 0.5 + (span if blended else 0)
    inside = torch.minimum(box[:, 2:], size) - box[:, :2].clamp(min=0)
    own = overlap(box, mark)
    area = (mark[2] - mark[0]) * (mark[3] - mark[1])
    must = (own > 0.25 * inside.clamp(min=1e-9).prod(-1)) | (own > 0.5 * area)
    may = overlap(box, mark, reach) > 0
    assert not (changed & ~may).any()
    assert changed[must].all()


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.in_ci(30)
def test_a_mark_changes_the_tokens_that_show_it(kind: Kind, name: str) -> None:
    processor, model = parts_or_skip(kind)
    picture = photograph(name)
    if name in kind.refuses:
        with pytest.raises(InputError, match=kind.refuses[name]):
            coverage_of(model, processor, picture, **kind.kwargs)
        return
    if name in kind.breaks:
        pytest.skip(f"the model itself fails: {kind.breaks[name]}")
    inputs = encoded(kind, [picture])
    plain = tokens(kind, model, inputs)
    found = coverage_of(model, processor, picture, **kind.kwargs)
    assert [len(one.boxes) for one in found] == [len(one) for one in plain]
    family = family_of(model)
    images = family.images(model, family.inputs(model, (), inputs))
    blended = [image.tiling is not None and image.tiling.blended for image in images]
    for share in MARKS:
        mark = in_pixels(picture, share)
        other = tokens(kind, model, encoded(kind, [marked(picture, share)]))
        scale = max(float(one.abs().max()) for one in plain)
        for one, before, after, mixed in zip(found, plain, other, blended, strict=True):
            check(one, (after - before).abs().amax(1) > 1e-4 * scale, mark, mixed)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.at_once(4)
def test_pictures_of_a_batch_are_told_apart(kind: Kind) -> None:
    """Two pictures of different shape: each has the tokens that it has alone."""
    _, model = parts_or_skip(kind)
    pictures = [photograph("photograph"), photograph("portrait")]
    together = tokens(kind, model, encoded(kind, pictures))
    alone = [one for picture in pictures for one in tokens(kind, model, encoded(kind, [picture]))]
    assert len(together) == len(alone)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["tiny", pytest.param("one pixel wide", marks=pytest.mark.slow)])
def test_what_a_processor_makes_is_pruned(kind: Kind, name: str) -> None:
    """Half of every image is dropped before the second layer, whatever its shape."""
    _, model = parts_or_skip(kind)
    if name in kind.breaks:
        pytest.skip(f"the model itself fails: {kind.breaks[name]}")
    inputs = encoded(kind, [photograph(name)])
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    given.pop("labels", None)
    with torch.no_grad(), pore.FastV(keep=0.5, layer=1)(model) as run:
        logits = model(**given).logits
    (sample,) = run.report
    assert len(sample.images) == len(tokens(kind, model, inputs))
    dropped = 0
    for image in sample.images:
        assert len(image.kept) == budget(0.5, image.seen)
        dropped += image.seen - len(image.kept)
    assert logits.shape[1] == inputs["input_ids"].shape[1] - dropped
    assert logits.isfinite().all()


def kind_of(name: str) -> Kind:
    (found,) = (kind for kind in KINDS if kind.name == name)
    return found


class TestCoverage:
    def test_a_centre_crop(self) -> None:
        """CLIP: the shorter side becomes 336 pixels, and the middle is kept."""
        kind = kind_of("LLaVA-1.5")
        (found,) = coverage_of(*reversed(parts(kind)), photograph("portrait"))
        torch.testing.assert_close(found.frames, frame(0, 280, 480, 760), rtol=0, atol=0.5)
        assert found.views.eq(0).all()
        steps = (found.boxes[:, 2:] - found.boxes[:, :2]) / 20
        torch.testing.assert_close(steps, torch.ones(576, 2).double(), rtol=0, atol=0.01)
        assert found.padding.max() == 0

    def test_a_letterbox(self) -> None:
        """The share of padding is what `pore.padding` computes from the size."""
        kind = kind_of("LLaVA-1.5, letterboxed")
        for name in ("photograph", "panorama"):
            (found,) = coverage_of(*reversed(parts(kind)), photograph(name))
            expected = padding_fraction(torch.tensor([SIZES[name]]), (24, 24), 336)[0]
            torch.testing.assert_close(found.padding, expected, rtol=0, atol=0.03)
        # It is padded by whole pixels of its own.
        (found,) = coverage_of(*reversed(parts(kind)), photograph("tiny"))
        torch.testing.assert_close(found.frames, frame(0, -3, 24, 21), rtol=0, atol=0.1)

    def test_tiles_with_padding(self) -> None:
        """LLaVA-NeXT: 480 by 1040 pixels on 336 by 1008 leave 140 to the top and the bottom."""
        kind = kind_of("LLaVA-NeXT")
        (found,) = coverage_of(*reversed(parts(kind)), photograph("portrait"))
        edges = [-200, 280, 760, 1240]
        expected = [(0, 0, 480, 1040), *((0, edges[i], 480, edges[i + 1]) for i in range(3))]
        torch.testing.assert_close(found.frames, frame(*expected), rtol=0, atol=0.5)
        assert found.views.bincount().tolist() == [576, 14 * 24, 576, 14 * 24]
        assert found.padding.max() < 0.01  # rows of nothing else are cut off

    def test_a_side_of_one_pixel(self) -> None:
        kind = kind_of("LLaVA with SigLIP")
        (found,) = coverage_of(*reversed(parts(kind)), photograph("one pixel high"))
        torch.testing.assert_close(found.frames, frame(0, 0, 250, 1), rtol=0, atol=1e-6)

    def test_crops_are_images(self) -> None:
        kind = kind_of("Gemma 3, pan and scan")
        found = coverage_of(*reversed(parts(kind)), photograph("portrait"), do_pan_and_scan=True)
        expected = frame((0, 0, 480, 1040), (0, 0, 480, 520), (0, 520, 480, 1040))
        torch.testing.assert_close(
            torch.cat([one.frames for one in found]), expected, rtol=0, atol=0.5
        )
        assert len(coverage_of(*reversed(parts(kind)), photograph("portrait"))) == 1

    def test_a_prompt_of_ones_own(self) -> None:
        processor, model = parts(kind_of("LLaVA with SigLIP"))
        (found,) = coverage_of(model, processor, photograph("tiny"), text="<image> look")
        assert len(found.boxes) == 729
        with pytest.raises(InputError, match=r"refuses a picture of 24 × 17|1 views of a picture"):
            coverage_of(model, processor, photograph("tiny"), text="look")

    def test_a_processor_that_does_not_fit(self) -> None:
        processor, model = parts(kind_of("LLaVA with SigLIP"))

        def other(text: Any, **kwargs: Any) -> Any:
            return processor(text="<image>", **kwargs) | {"input_ids": torch.tensor([[3]])}

        with pytest.raises(InputError, match=r"1 views of a picture, but .* tokens for 0"):
            coverage_of(model, other, photograph("tiny"), text="look")


def frame(*boxes: Any) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float64).view(-1, 4)


class TestLayout:
    picture = Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8))

    def coverage(self) -> Coverage:
        """The whole picture in 2 × 2 tokens, and two tiles of 2 × 2 that reach beyond it."""
        frames = frame((0, 0, 60, 40), (0, -10, 30, 50), (30, -10, 60, 50))
        boxes = []
        for left, top, right, bottom in frames.tolist():
            x, y = (left + right) / 2, (top + bottom) / 2
            boxes += [(left, top, x, y), (x, top, right, y)]
            boxes += [(left, y, x, bottom), (x, y, right, bottom)]
        views = torch.arange(3).repeat_interleave(4)
        return Coverage((60, 40), frame(*boxes), views, frames)

    def test_views_that_overlap_have_panels_of_their_own(self) -> None:
        figure = plotting.layout(self.picture, [self.coverage()], title="why?")
        assert [axis.get_xlabel() for axis in figure.axes] == [
            "one view, 4 tokens",
            "2 tiles, 8 tokens",
        ]
        assert [axis.get_ylim() for axis in figure.axes] == [(40, 0), (50, -10)]
        assert figure.get_suptitle() == "why?"

    def test_dropped_tokens_are_pale(self) -> None:
        figure = plotting.layout(self.picture, [self.coverage()], [[0, 4, 7, 8]])
        whole, tiles = figure.axes
        assert whole.get_xlabel() == "one view, 1 of 4 tokens"
        assert tiles.get_xlabel() == "2 tiles, 3 of 8 tokens"
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        drawn = np.asarray(canvas.buffer_rgba())
        found = []
        for axis in figure.axes:
            for point in ((7, 5), (37, 5), (7, 25), (37, 35)):
                x, y = axis.transData.transform(point)
                found.append(int(drawn[len(drawn) - round(y), round(x), 0]))
        pale, full = 241, 200
        assert found == [full, pale, pale, pale, full, full, pale, pale]

    def test_nonsense_is_refused(self) -> None:
        coverage = self.coverage()
        with pytest.raises(InputError, match="of a picture of"):
            plotting.layout(self.picture.resize((30, 40)), [coverage])
        with pytest.raises(InputError, match="1 images, but `kept` has 2 entries"):
            plotting.layout(self.picture, [coverage], [[0], [1]])
        with pytest.raises(InputError, match="lies outside"):
            plotting.layout(self.picture, [coverage], [[12]])
