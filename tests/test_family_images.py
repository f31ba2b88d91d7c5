"""Where adapters find images in prompts as the families' own processors write them."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

import family_cases
from models import IMAGE
from pore.errors import InputError
from pore.families import family_of
from pore.layout import Image

PIXELS = {"pixel_values": torch.zeros(1)}


def tokens(text: str) -> Tensor:
    """(1, L) one id for every tag, newline and word; runs of newlines are one token."""
    found = re.findall(r"<[^>]*>|\n+|\w+", text)
    ids = {word: i for i, word in enumerate(sorted({*found} - {"<image>"}), 1)}
    return torch.tensor([[ids.get(word, IMAGE) for word in found]])


def images(case: family_cases.Case, ids: Tensor, **inputs: Any) -> list[Image]:
    model = case.model()
    return family_of(model).images(model, {"input_ids": ids, **PIXELS, **inputs})


class TestSmolVLM:
    case = family_cases.SmolVLM()

    @pytest.mark.parametrize("kind", [Idefics3Processor, SmolVLMProcessor])
    def test_tiles_end_with_the_whole_view(self, kind: Any) -> None:
        processor: Any = SimpleNamespace(
            fake_image_token="<fake>",
            global_image_tag="<global>",
            global_image_token="<global>",
            image_token="<image>",
            image_seq_len=16,
        )
        sizes: dict[str, Any] = {"rows": [[2, 0, 0, 1]], "cols": [[2, 0, 0, 1]]}
        one, two, three, four = (kind.replace_image_token(processor, sizes, i) for i in range(4))
        ids = tokens(f"look {one} {two}{three} and {four} what")
        found = images(self.case, ids)
        assert [len(image.columns) for image in found] == [5 * 16, 16, 16, 2 * 16]
        assert [image.grid for image in found] == [None, (4, 4), (4, 4), None]
        assert [image.index for image in found] == [0, 1, 2, 3]
        assert sorted(c for image in found for c in image.columns) == (
            (ids[0] == IMAGE).nonzero().flatten().tolist()
        )
        # fake and tag between two tiles, and newlines before the next row and the whole view
        assert [len(image.structure) for image in found] == [2 + 3 + 2 + 3, 0, 0, 3]

    def test_tiles_without_marks_are_images_of_their_own(self) -> None:
        ids = torch.tensor([[5, *[IMAGE] * 16, 7, 8, *[IMAGE] * 32, 9]])
        assert [len(image.columns) for image in images(self.case, ids)] == [16, 16, 16]

    @pytest.mark.parametrize("row", [[IMAGE] * 17, [IMAGE] * 8 + [5] + [IMAGE] * 8])
    def test_broken_tiles_are_refused(self, row: list[int]) -> None:
        with pytest.raises(InputError, match="no whole tiles of 16"):
            images(self.case, torch.tensor([[5, *row, 7]]))
