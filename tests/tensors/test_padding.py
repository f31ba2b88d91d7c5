"""Letterbox padding and its suppression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaImageProcessorPil

from helpers.padding import padding_fraction, unpadded_cells
from pore.errors import InputError
from pore.tensors.padding import cap, letterbox_padding, visible_patches

sides = st.integers(1, 2000)


def test_bars_lie_along_the_longer_side() -> None:
    wide, tall, square = padding_fraction(
        torch.tensor([[640, 480], [480, 640], [336, 336]]), (24, 24), 336
    ).view(3, 24, 24)
    assert (wide[:3] == 1).all()
    assert (wide[3:21] == 0).all()
    assert torch.equal(tall, wide.T)
    assert (square == 0).all()


@settings(max_examples=60)
@given(sides, sides, st.integers(1, 30), st.integers(1, 16))
def test_shares_add_up_to_the_bars(width: int, height: int, cells: int, patch: int) -> None:
    share = padding_fraction(torch.tensor([[width, height]]), (cells, cells), cells * patch)
    assert share.min() >= 0
    assert share.max() <= 1
    assert share.mean().item() == pytest.approx(
        1 - min(width, height) / max(width, height), abs=1e-9
    )


@settings(max_examples=40)
@given(st.lists(st.tuples(sides, sides), min_size=2, max_size=5), st.floats(0, 1))
def test_a_batch_equals_its_images(sizes: list[tuple[int, int]], threshold: float) -> None:
    batch = torch.tensor(sizes)
    padding = padding_fraction(batch, (12, 12), 168)
    counts = torch.full((len(sizes),), 100)
    for i, size in enumerate(batch):
        alone = padding_fraction(size[None], (12, 12), 168)
        assert torch.equal(padding[i : i + 1], alone)
        assert torch.equal(
            unpadded_cells(batch, (12, 12))[i : i + 1], unpadded_cells(size[None], (12, 12))
        )
        assert torch.equal(
            visible_patches(padding, threshold)[i : i + 1], visible_patches(alone, threshold)
        )
        assert cap(counts, padding, threshold)[i] == cap(counts[:1], alone, threshold)[0]


def test_the_share_on_the_threshold_is_kept() -> None:
    padding = torch.tensor([[0.0, 0.3, 0.5, 0.6]])
    assert visible_patches(padding).tolist() == [[True, True, True, False]]
    assert visible_patches(padding, 0.3).tolist() == [[True, True, False, False]]
    assert cap(torch.tensor([4, 2])[:, None], padding).tolist() == [[3], [2]]


def test_an_image_thinner_than_half_a_patch_keeps_its_middle() -> None:
    padding = padding_fraction(torch.tensor([[1000, 10]]), (24, 24), 336)
    visible = visible_patches(padding).view(24, 24)
    assert visible[11:13].all()
    assert visible.sum() == 48
    assert cap(torch.tensor([128]), padding).tolist() == [48]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="from 0 to 1"):
        visible_patches(torch.zeros(4), threshold)


def test_a_grid_finer_than_the_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="does not fit"):
        padding_fraction(torch.tensor([[4, 5]]), (24, 24), 20)


class TestRead:
    """Bars read from the pixels that the vision tower gets."""

    @staticmethod
    def pixels(size: tuple[int, int], *, seed: int = 0) -> torch.Tensor:
        """A random picture as LLaVA's processor hands it on, letterboxed."""
        width, height = size
        picture = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        processor = LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": 168}, crop_size={"height": 168, "width": 168}
        )
        image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        return processor(image, return_tensors="pt")["pixel_values"]

    @pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 333), (300, 300), (900, 250)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_as_the_size_says(self, size: tuple[int, int], dtype: torch.dtype) -> None:
        read = letterbox_padding(self.pixels(size).to(dtype), (12, 12))
        assert read.dtype == torch.float32
        said = padding_fraction(torch.tensor([size]), (12, 12), 168)
        assert (read - said).abs().max() < 0.15

    def test_a_batch_equals_its_images(self) -> None:
        batch = torch.cat([self.pixels(size) for size in ((640, 480), (300, 640), (300, 300))])
        read = letterbox_padding(batch, (12, 12))
        for i in range(3):
            assert torch.equal(read[i : i + 1], letterbox_padding(batch[i : i + 1], (12, 12)))

    @pytest.mark.parametrize("value", [0.0, 1.5])
    def test_a_plain_image_has_no_bars(self, value: float) -> None:
        assert (letterbox_padding(torch.full((1, 3, 48, 48), value), (6, 6)) == 0).all()

    def test_a_strip_at_one_edge_is_no_bar(self) -> None:
        pixels = torch.randn(1, 3, 48, 48).clamp(0.1)
        pixels[:, :, :16] = 0
        assert (letterbox_padding(pixels, (6, 6)) == 0).all()

    def test_pixels_of_another_shape_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"\(images, 3, H, W\)"):
            letterbox_padding(torch.zeros(3, 8, 8), (2, 2))
