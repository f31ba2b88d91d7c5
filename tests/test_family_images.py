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
import pore
from models import IMAGE
from pore.errors import InputError, UnsupportedModelError
from pore.families import family_of
from pore.layout import Image

PIXELS = {"pixel_values": torch.zeros(1)}


def tokens(text: str) -> Tensor:
    """(1, L) one id for every tag, newline and word; runs of newlines are one token."""
    found = re.findall(r"<[^>]*>|\n+|\w+", text)
    ids = {word: i for i, word in enumerate(sorted({*found} - {"<image>"}), 1)}
    return torch.tensor([[ids.get(word, IMAGE) for word in found]])


def images(case: family_cases.Case, input_ids: Tensor, **inputs: Any) -> list[Image]:
    model = case.model()
    return family_of(model).images(model, {"input_ids": input_ids, **PIXELS, **inputs})


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


class TestLlavaOnevision:
    case = family_cases.LlavaOnevision()

    def inputs(self, size: tuple[int, int], tokens: int) -> dict[str, Tensor]:
        pixels = torch.randn(1, 5, 3, 32, 32, dtype=torch.float64)
        ids = torch.tensor([[5, *[IMAGE] * tokens, 7, 8]])
        return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([size])}

    def test_a_large_image_is_blended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """64 patches at most for 2 tiles of 16: 5 by 5 tokens, each near a patch of its own."""
        model = self.case.model()
        monkeypatch.setattr(model.config, "vision_aspect_ratio", "anyres_max_2")
        inputs = self.inputs((64, 64), 16 + 5 * 6)
        (image,) = images(self.case, **inputs)
        assert image.tiling is not None
        assert image.tiling.blended
        assert len(image.columns) == 16 + 25
        assert len(image.structure) == 5
        shown = image.tiling.shown
        assert shown[:16] == tuple(range(16))
        assert len(set(shown)) == 41
        corners = [shown[16 + i] for i in (0, 4, 20, 24)]  # one in every tile
        assert corners == [1 * 16 + 0, 2 * 16 + 3, 3 * 16 + 12, 4 * 16 + 15]
        with pore.FastV(keep=6)(model) as run, torch.no_grad():
            assert model(**inputs).logits.shape[1] == 3 + 5 + 6
        assert len(run.report.samples[0].images[0].kept) == 6
        with pytest.raises(UnsupportedModelError), pore.FasterVLM(keep=6)(model):
            model(**inputs)

    @pytest.mark.parametrize("pruner", [pore.FastV(6), pore.DivPrune(6), pore.FasterVLM(6)])
    def test_several_images_in_a_sample_have_no_tiles(self, pruner: pore.Pruner) -> None:
        model = self.case.model()
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([[5, *[IMAGE] * 17, 7, *[IMAGE] * 17, 8]]),
            "pixel_values": torch.randn(2, 5, 3, 32, 32, dtype=torch.float64),
            "image_sizes": torch.tensor([(60, 50), (20, 60)]),
            "batch_num_images": torch.tensor([2]),
        }
        found = images(self.case, **inputs)
        assert [image.grid for image in found] == [(4, 4), (4, 4)]
        assert [list(image.structure) for image in found] == [[17], [35]]
        with torch.no_grad():
            dense = model(**inputs).logits
            with pruner(model) as run:
                assert model(**inputs).logits.shape[1] == 3 + 2 * 7
            with type(pruner)(keep=1.0)(model):
                assert torch.equal(model(**inputs).logits, dense)
        assert [len(image.kept) for image in run.report.samples[0].images] == [6, 6]
