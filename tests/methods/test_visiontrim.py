"""VisionTrim against its definition, image by image; prompts, tiles, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

import pore
from cases import CASES
from helpers.families import forward, together
from helpers.models import IMAGE, N, batch, prompt, tiny_llava, tiny_siglip_llava
from helpers.recording import Recording
from pore.errors import BudgetError, InputError, PoreError, UnsupportedModelError
from pore.methods.visiontrim import from_other_patches
from pore.tower.stages import TowerSelection, TowerView

BEGIN, END = 62, 63
QUESTIONS = ("5 7 9", "1", "9 8 4 3")
PROMPTS = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 1, 2)]


class Words:
    """A tokenizer of numbers: "5 7" is begin, 5, 7, end."""

    pad_token_id = END

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [BEGIN, *map(int, text.split()), END]}


def clip(width: int = 16) -> CLIPModel:
    torch.manual_seed(3)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = CLIPModel._from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


CLIP = clip()


def method(keep: int | float, questions: Any = QUESTIONS, **more: Any) -> pore.VisionTrim:
    return pore.VisionTrim(keep, pore.ClipQuestions(CLIP, Words(), questions), **more)


def seen(pruner: pore.VisionTrim, inputs: dict[str, Tensor]) -> tuple[TowerView, TowerSelection]:
    recording, model = Recording(pruner), tiny_llava()
    with torch.no_grad(), recording(model):
        model(**inputs)
    ((_, view, selection),) = recording.seen
    return view, selection


def by_hand(
    view: TowerView, image: int, question: str, keep: int, more: int
) -> tuple[list[int], list[int], Tensor]:
    """Dominant patches, complements and the features of both, by the letter of the spec."""
    features = view.features[image]
    query, key = view.queries[0][image], view.keys[0][image]
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean(0)
    received = torch.tensor(
        [sum(weights[1 + m, 1 + n] for m in range(N) if m != n) for n in range(N)]
    ).to(weights)
    metric = (normalize(weights[0, 1:], dim=0) + normalize(received, dim=0)) / 2
    dominant = sorted(metric.topk(keep - more).indices.tolist())
    left = [n for n in range(N) if n not in dominant]
    ids = torch.tensor([Words()(question)["input_ids"]])
    words = normalize(CLIP.text_projection(CLIP.text_model(ids).last_hidden_state[0]), dim=-1)

    def projected(some: Tensor) -> Tensor:
        return normalize(CLIP.visual_projection(some), dim=-1)

    score = {n: float((words @ projected(features[n])).mean()) for n in left}
    targets = sorted(sorted(left, key=lambda n: -score[n])[:more])
    rest = [n for n in left if n not in targets]
    grown = features[targets].clone()
    for _ in range(3):
        alike = projected(features[rest]) @ words.mT @ words @ projected(grown).mT
        goes = alike.argmax(1)
        members = [torch.tensor(rest)[goes == i] for i in range(more)]
        grown = torch.stack(
            [
                one + features[own].mean(0) if len(own) else one
                for one, own in zip(grown, members, strict=True)
            ]
        )
    return dominant, targets, torch.cat([features[dominant], grown])


@torch.no_grad()
@pytest.mark.parametrize("keep", [4, 8, 13])
def test_it_does_what_the_spec_says(keep: int) -> None:
    """Of every image with the question of its own prompt, in a batch of questions of any length."""
    view, selection = seen(method(keep), batch(PROMPTS))
    assert view.prompts is not None
    assert view.prompts.rows == [0, 0, 2]
    for image, row in enumerate((0, 0, 2)):
        dominant, targets, features = by_hand(view, image, QUESTIONS[row], keep, keep // 4)
        assert selection.raster[image].tolist() == [*dominant, *targets]
        torch.testing.assert_close(selection.features[image], features)


def test_attention_from_other_patches_leaves_out_cls_and_a_patch_itself() -> None:
    query, key = (torch.zeros(1, 2, 5, 3, dtype=torch.float64) for _ in range(2))
    got = from_other_patches(query, key)
    torch.testing.assert_close(got, torch.full((1, 4), 3 / 5, dtype=torch.float64))


def test_budgets_are_met_and_keeping_all_changes_nothing() -> None:
    model, inputs = tiny_llava(), batch(PROMPTS)
    with torch.no_grad():
        dense = model(**inputs).logits
        with method(1.0)(model):
            assert torch.equal(model(**inputs).logits, dense)
        for keep in (1, 2, 6, N - 1):
            with method(keep)(model) as run:
                model(**inputs)
            kept = [image.kept for sample in run.report for image in sample.images]
            assert [len(set(some)) for some in kept] == [keep] * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_can_be_read_off_the_prompts(side: str) -> None:
    read: list[list[int]] = []

    def question(ids: list[int]) -> str:
        read.append(ids)
        return QUESTIONS[len(ids) % 3]

    inputs = batch(PROMPTS, side)
    _, selection = seen(method(6, question), inputs)
    texts = [[i for i in ids if i != IMAGE] for ids in PROMPTS]
    assert sorted(read) == sorted([texts[0], texts[2]])
    _, listed = seen(method(6, [QUESTIONS[len(text) % 3] for text in texts]), inputs)
    assert torch.equal(selection.features, listed.features)


def test_a_batch_equals_its_samples_and_generating_chooses_the_same() -> None:
    model, inputs = tiny_llava(), batch(PROMPTS)
    with torch.no_grad(), method(6)(model) as run:
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    images = [sample.images for sample in run.report]
    assert images[:3] == images[3:]
    with torch.no_grad(), method(6, QUESTIONS[2])(model) as alone:
        model(**batch(PROMPTS[2:]) | {"pixel_values": inputs["pixel_values"][2:]})
    assert alone.report.samples[0].images == images[2]


def test_faithful_counts_what_fills_up_questions() -> None:
    """What it does with them is in the golden files."""
    asked = pore.ClipQuestions(CLIP, Words(), "")
    questions = ["5", "9 8 4 3 2 1"]
    plain, filled = asked.tokens(questions), asked.tokens(questions, fill=True)
    assert torch.equal(plain[1], filled[1])
    assert torch.equal(plain[0, :3], filled[0, :3])
    assert plain.any(-1).sum(1).tolist() == [3, 8]
    assert filled.any(-1).all()
    _, theirs = seen(method(8, ("5", "1", questions[1]), faithful=True), batch(PROMPTS))
    _, ours = seen(method(8, ("5", "1", questions[1])), batch(PROMPTS))
    torch.testing.assert_close(theirs.features[2], ours.features[2])


@torch.no_grad()
def test_long_questions_come_in_pieces_or_are_cut_off() -> None:
    asked = pore.ClipQuestions(CLIP, Words(), "")
    long = " ".join(map(str, range(1, 10)))
    pieces = [asked.tokens([" ".join(map(str, some))]) for some in (range(1, 7), range(7, 10))]
    every = asked.tokens([long, "3"])
    torch.testing.assert_close(every[0, :8], pieces[0][0])
    torch.testing.assert_close(every[0, 8:13], pieces[1][0])
    assert not every[0, 13:].any()
    torch.testing.assert_close(every[1, :3], asked.tokens(["3"])[0])
    assert not every[1, 3:].any()
    torch.testing.assert_close(asked.tokens([long], cut_off=True), pieces[0])


def test_tiles_share_the_budget() -> None:
    (case,) = (case for case in CASES if case.name == "LLaVA-NeXT")
    inputs = case.inputs([[5, -1, 6, 7], [5, -2, 7, 8, 9]])
    pruner = pore.VisionTrim(10, pore.ClipQuestions(CLIP, Words(), QUESTIONS[:2]))
    _, run = together(case, pruner, inputs)
    assert [len(s.images[0].kept) + s.images[0].extra for s in run.report] == [10, 10]
    whole = pore.VisionTrim(1.0, pruner.clip)
    assert torch.equal(together(case, whole, inputs)[0], forward(case, inputs))


def test_bad_input_is_refused() -> None:
    inputs = batch(PROMPTS)
    with pytest.raises(BudgetError, match="no dominant patch of 4"):
        method(4, complement=4)
    with pytest.raises(BudgetError, match="not a number of tokens"):
        method(4, complement=-1)
    with pytest.raises(InputError, match="2 questions for a batch of 3 prompts"):
        seen(method(4, ["1", "2"]), inputs)
    other = pore.VisionTrim(4, pore.ClipQuestions(clip(8), Words(), "1"))
    with pytest.raises(UnsupportedModelError, match="16 wide, the CLIP model's 8"):
        other.apply(tiny_llava())
    with pytest.raises(UnsupportedModelError, match="no CLS token"), method(4)(tiny_siglip_llava()):
        pass
    model = tiny_llava()
    with (
        torch.no_grad(),
        method(4, "1")(model),
        pytest.raises(InputError, match="reads the prompt"),
    ):
        model.model.get_image_features(inputs["pixel_values"])


@pytest.mark.parametrize("name", ["Video-LLaVA", "Qwen2-VL", "Gemma 3", "Mistral 3"])
def test_where_patches_are_not_those_of_clip(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    prompts = [[5, -100, 7, 8]] if case.videos else [[5, -1, 7, 8]]
    with pytest.raises(PoreError, match=r"patches of single|single patches|made of"):
        together(case, method(4, "1"), case.inputs(prompts))
