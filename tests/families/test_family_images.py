"""Where adapters find images in prompts as the families' own processors write them."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.aya_vision.processing_aya_vision import AyaVisionProcessor
from transformers.models.cohere2_vision.processing_cohere2_vision import Cohere2VisionProcessor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
from transformers.models.video_llava.processing_video_llava import VideoLlavaProcessor

import pore
from cases.aya_vision import AyaVision, Cohere2Vision
from cases.base import Case
from cases.idefics3 import SmolVLM
from cases.llava_next import LlavaOnevision
from cases.mistral3 import LightOnOcr, Mistral3, Pixtral
from cases.video_llava import VideoLlava
from helpers.models import IMAGE
from pore.errors import InputError, UnsupportedModelError
from pore.families.registry import family_of
from pore.layout import Image

PIXELS = {"pixel_values": torch.zeros(1)}


def tokens(text: str) -> Tensor:
    """(1, L) one id for every tag, newline and word; runs of newlines are one token."""
    found = re.findall(r"<[^>]*>|\n+|\w+", text)
    ids = {word: i for i, word in enumerate(sorted({*found} - {"<image>"}), 1)}
    return torch.tensor([[ids.get(word, IMAGE) for word in found]])


def tokenizer(special: dict[str, int], **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, with special tokens of some ids, and names of some of them."""
    words = {"<pad>": 0, "<unk>": 1, "look": 5, "and": 6, "what": 7}
    made = Tokenizer(WordLevel(words | special, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )


def picture(height: int, width: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def images(case: Case, input_ids: Tensor, **inputs: Any) -> list[Image]:
    model = case.model()
    return family_of(model).images(model, {"input_ids": input_ids, **PIXELS, **inputs})


class TestSmolVLM:
    case = SmolVLM()

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
        tilings = family_of(self.case.model()).prompt_tilings(self.case.model(), ids)
        assert [tiling.grid for tiling in tilings] == [(2, 2), (4, 4), (4, 4), (1, 1)]
        assert [tiling.whole for tiling in tilings] == [4, 0, 0, 1]
        # fake and tag between two tiles, and newlines before the next row and the whole view
        assert [len(image.structure) for image in found] == [2 + 3 + 2 + 3, 0, 0, 3]

    def test_tiles_without_marks_are_images_of_their_own(self) -> None:
        ids = torch.tensor([[5, *[IMAGE] * 16, 7, 8, *[IMAGE] * 32, 9]])
        assert [len(image.columns) for image in images(self.case, ids)] == [16, 16, 16]

    @pytest.mark.parametrize("row", [[IMAGE] * 17, [IMAGE] * 8 + [5] + [IMAGE] * 8])
    def test_broken_tiles_are_refused(self, row: list[int]) -> None:
        with pytest.raises(InputError, match="not a whole number of tiles of 16"):
            images(self.case, torch.tensor([[5, *row, 7]]))


class TestLlavaOnevision:
    case = LlavaOnevision()

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


class TestMistral3:
    """The processor of transformers itself, with the image processor that needs no torchvision."""

    special = {"[IMG]": 100, "[IMG_BREAK]": 101, "[IMG_END]": 102}  # noqa: RUF012
    sizes = ((30, 50), (10, 6), (200, 100), (100, 6))
    grids = ((4, 7), (2, 1), (8, 4), (8, 1))
    text = ("look [IMG] and [IMG] what", "[IMG][IMG] what")

    def processed(self, case: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
        from transformers.models.pixtral import image_processing_pil_pixtral as pil

        name = "transformers.models.pixtral.image_processing_pixtral"
        monkeypatch.setitem(sys.modules, name, pil)
        from transformers.models.lighton_ocr.processing_lighton_ocr import LightOnOcrProcessor
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor

        marked = not isinstance(case, LightOnOcr)
        names = {f"image{mark[4:-1].lower()}_token": mark for mark in self.special}
        kind = PixtralProcessor if marked else LightOnOcrProcessor
        processor = kind(
            image_processor=pil.PixtralImageProcessorPil(
                size={"longest_edge": 32 * case.merge}, patch_size=4 * case.merge
            ),
            tokenizer=tokenizer(self.special, **({} if marked else names)),
            patch_size=4,
            spatial_merge_size=case.merge,
        )
        pictures = [picture(*(side * case.merge // 2 for side in size)) for size in self.sizes]
        split = [pictures[:2], pictures[2:]]
        return dict(processor(text=list(self.text), images=split, padding=True))

    @pytest.mark.parametrize(
        "case",
        [Mistral3(), Pixtral(), LightOnOcr()],
        ids=lambda case: case.name,
    )
    def test_rows_end_with_a_token(self, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs, model = self.processed(case, monkeypatch), case.model()
        ids = inputs["input_ids"]
        found = family_of(model).images(model, inputs)
        assert [(image.row, image.index) for image in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert tuple(image.grid for image in found) == self.grids
        for image, (height, width) in zip(found, self.grids, strict=True):
            text = ids[image.row].tolist()
            assert [text[column] for column in image.columns] == [100] * (height * width)
            marks = [101] * (height - 1) + [102] if 102 in text else []
            assert [text[column] for column in image.structure] == marks
            if marks:
                both = sorted([*image.columns, *image.structure])
                assert both == list(range(both[0], both[0] + height * (width + 1)))
                assert set(image.structure) == set(both[width :: width + 1])
        marked = [c for image in found for c in (*image.columns, *image.structure)]
        assert len(marked) == int((ids >= 100).sum())

        dense = ids.ne(0).sum(1).tolist()
        with pore.FastV(keep=0.5)(model) as run, torch.no_grad():
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        kept = [[len(image.kept) for image in sample.images] for sample in run.report]
        assert kept == [[14, 1], [16, 4]]
        assert [s.tokens[-1] for s in run.report] == [dense[0] - 15, dense[1] - 20]

    def test_other_numbers_of_tokens_are_refused(self) -> None:
        case = Mistral3()
        inputs = case.inputs([[5, -1, 6]])
        inputs["input_ids"][0, 1] = 7
        with pytest.raises(InputError, match="1 visual tokens fewer than its images come to"):
            images(case, **inputs)

    def test_pixels_without_sizes_are_not_padded(self) -> None:
        case = Pixtral()
        inputs = case.inputs([[5, -1, 6, -1, 7]])
        with torch.no_grad(), pore.FastV(keep=6)(case.model()) as run:
            first = case.model()(**inputs).logits
            del inputs["image_sizes"]
            second = case.model()(**inputs).logits
        assert torch.equal(first, second)
        assert [image.grid for image in images(case, **inputs)] == [(4, 6), (4, 6)]
        one, other = run.report
        assert one.images == other.images

    def test_rows_without_marks_have_no_structure(self) -> None:
        case = Mistral3()
        inputs = case.inputs([[5, -1, 6]])
        inputs["input_ids"] = torch.tensor([[5, *[100] * 24, 6]])
        (found,) = images(case, **inputs)
        assert list(found.structure) == []
        assert list(found.columns) == list(range(1, 25))


class TestAyaVision:
    def check(self, case: Case, kind: Any, marks: list[int], **names: Any) -> None:
        processor: Any = SimpleNamespace(**names)
        made = {"num_patches": [5, 1, 1, 3]}
        one, two, three, four = (kind.replace_image_token(processor, made, i) for i in range(4))
        ids = tokens(f"look {one} {two}{three} and {four} what")
        found = images(case, ids)
        assert [len(image.columns) for image in found] == [5 * 16, 16, 16, 3 * 16]
        assert [image.grid for image in found] == [None, (4, 4), (4, 4), None]
        assert [len(image.structure) for image in found] == marks
        assert sorted(c for image in found for c in image.columns) == (
            (ids[0] == IMAGE).nonzero().flatten().tolist()
        )
        for image in found:
            both = sorted([*image.columns, *image.structure])
            assert both == list(range(both[0], both[0] + len(both)))

    @pytest.mark.parametrize("case", [AyaVision(), Cohere2Vision()])
    def test_tokens_are_made_of_squares_of_patches(self, case: Case) -> None:
        model = case.model()
        family = family_of(model)
        projector: Any = family.projector(model)
        numbers = torch.arange(64.0)[None, :, None].expand(1, 64, 16)
        shuffled = projector.pixel_shuffle(numbers).reshape(16, 4, 16)[..., 0]
        expected = family.groups(model, 64).sort(1).values
        assert torch.equal(shuffled.long().sort(1).values, expected)

    @pytest.mark.parametrize(("tag", "length"), [("TILE", 1), ("TI LE", 2)])
    def test_images_end_with_the_global_tile(self, tag: str, length: int) -> None:
        self.check(
            AyaVision(),
            AyaVisionProcessor,
            [4 * length, 0, 0, 2 * length],
            img_size=32,
            patch_size=8,
            start_of_img_token="<start>",
            end_of_img_token="<end>",
            img_patch_token="<image>",
            tile_token=tag,
            tile_global_token=f"{tag}_GLOBAL",
        )

    def test_tiles_end_with_a_line_break(self) -> None:
        self.check(
            Cohere2Vision(),
            Cohere2VisionProcessor,
            [4, 0, 0, 2],
            patch_size=4,
            boi_token="<start>",
            eoi_token="<end>",
            image_token="<image>",
            img_line_break_token="<break>",
        )


class TestVideoLlava:
    """What the processor writes; it cannot be made without torchvision, its parts can."""

    case = VideoLlava()

    def processed(
        self, text: list[str], pictures: list[PIL.Image.Image], videos: Tensor
    ) -> dict[str, Tensor]:
        size = {"height": 32, "width": 32}
        prepare = VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        made = dict(prepare(pictures, return_tensors="pt")) | {"pixel_values_videos": videos}
        processor: Any = SimpleNamespace(
            patch_size=8,
            num_additional_image_tokens=1,
            vision_feature_select_strategy="default",
            image_token="<image>",
            video_token="<video>",
        )
        (image,) = {
            VideoLlavaProcessor.replace_image_token(processor, made, i)
            for i in range(len(pictures))
        }
        (video,) = {
            VideoLlavaProcessor.replace_video_token(processor, made, i) for i in range(len(videos))
        }
        text = [one.replace("<image>", image).replace("<video>", video) for one in text]
        ids = tokenizer({"<image>": IMAGE, "<video>": 101})
        return made | dict(ids(text, padding=True, return_tensors="pt"))

    def test_images_and_videos_of_a_prompt(self) -> None:
        model = self.case.model()
        inputs = self.processed(
            ["look <image> and <video> what <image>and", "look <image> what"],
            [picture(30, 50), picture(70, 20), picture(5, 5)],
            torch.randn(1, 3, 3, 32, 32),
        )
        with pore.FastV(keep=6)(model) as run, torch.no_grad():
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        seen = [[image.seen for image in sample.images] for sample in run.report]
        assert seen == [[16, 3 * 17, 16], [16]]
        assert all(len(i.kept) == 6 for s in run.report for i in s.images)
        inputs["pixel_values"] = inputs.pop("pixel_values_images")
        found = family_of(model).images(model, inputs)
        assert [image.grid for image in found] == [(4, 4), None, (4, 4), (4, 4)]
        assert [image.index for image in found] == [0, 1, 2, 0]
        ids = inputs["input_ids"].tolist()
        assert [{ids[i.row][c] for c in i.columns} for i in found] == [
            {IMAGE},
            {101},
            {IMAGE},
            {IMAGE},
        ]

    def test_generated_placeholders_are_no_images(self) -> None:
        inputs = self.case.inputs([[5, -100, 6]])
        inputs["input_ids"][0, -1] = IMAGE
        model = self.case.model()
        (found,) = family_of(model).images(model, inputs)
        assert len(found.columns) == 2 * 17
