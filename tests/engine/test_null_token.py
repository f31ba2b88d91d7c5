"""The token after an image, which sees the image but not the question."""

from __future__ import annotations

import pytest
import torch

from pore.engine.readers import LayerAttention, NullToken, null_row
from pore.errors import InputError, ScoreError
from pore.layout import Image, Layout


def layout_of(images: list[Image], length: int, padding: tuple[int, ...] = ()) -> Layout:
    """A layout of a row for every entry of `padding`: on the left, or below 0 on the right."""
    tokens = torch.ones(len(padding) or 1, length, dtype=torch.bool)
    for row, count in enumerate(padding):
        tokens[row, slice(0, count) if count >= 0 else slice(count, None)] = False
    return Layout.of(images, tokens)


class TestNullRow:
    def test_it_is_the_first_text_after_every_image(self) -> None:
        images = [Image(0, 0, [1, 2]), Image(0, 1, [5, 6]), Image(1, 0, [3, 4])]
        layout = layout_of(images, 10, (0, 2))
        assert null_row(layout).tolist() == [[3], [7], [5]]
        assert null_row(layout, 1).tolist() == [[4], [8], [6]]

    def test_the_end_of_a_row_of_patches_belongs_to_the_image(self) -> None:
        layout = layout_of([Image(0, 0, [1, 2, 4, 5], structure=[3, 6])], 9)
        assert null_row(layout).tolist() == [[7]]

    def test_the_next_image_is_passed_over(self) -> None:
        layout = layout_of([Image(0, 0, [1, 2]), Image(0, 1, [3, 4])], 8)
        assert null_row(layout).tolist() == [[5], [5]]

    @pytest.mark.parametrize("padding", [0, -2])
    def test_a_last_token_alone_is_refused(self, padding: int) -> None:
        length = 4 - padding
        with pytest.raises(InputError, match="Image 0 of sample 0"):
            null_row(layout_of([Image(0, 0, [1, 2])], length, (padding,)))

    def test_too_little_text_is_refused(self) -> None:
        layout = layout_of([Image(0, 0, [1, 2])], 6)
        assert null_row(layout, 1).tolist() == [[4]]
        for offset in (2, 7):
            with pytest.raises(InputError, match=f"fewer than {offset + 2} tokens"):
                null_row(layout, offset)


class TestNullToken:
    def test_it_reads_what_a_shorter_prompt_would_give(self) -> None:
        """By causality: nothing of the question is in it."""
        torch.manual_seed(0)
        query, key = torch.randn(1, 4, 9, 8).double(), torch.randn(1, 2, 9, 8).double()
        for reader in (NullToken(), NullToken("visual"), NullToken(offset=1)):
            read = []
            for length in (9, 7):
                layout = layout_of([Image(0, 0, [1, 2, 3])], length)
                read.append(
                    reader(
                        LayerAttention(
                            layout=layout,
                            query=query[:, :, :length],
                            key=key[:, :, :length],
                            mask=None,
                            scaling=0.5,
                            softcap=None,
                            past=torch.zeros(1, 0, dtype=torch.bool),
                            origin=torch.arange(length)[None],
                        )
                    )
                )
            torch.testing.assert_close(*read)
            row = 4 + reader.offset
            keys = key[0].repeat_interleave(2, 0)
            logits = (query[0, :, row, None] * keys).sum(-1)[:, : row + 1] * 0.5
            if reader.normalize == "visual":
                expected = logits[:, 1:4].softmax(-1).mean(0)
            else:
                expected = logits.softmax(-1)[:, 1:4].mean(0)
            torch.testing.assert_close(read[0][0], expected)

    def test_an_unknown_normalisation_is_refused(self) -> None:
        with pytest.raises(ScoreError, match="normalize"):
            NullToken("question")  # type: ignore[arg-type]
