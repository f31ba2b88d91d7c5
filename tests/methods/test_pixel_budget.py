"""The pixel budget: sizes, processors of every family, evaluation, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pore
from cases import CASES
from helpers.models import batch, prompt, tiny_llava
from helpers.photographs import photograph
from pore.cli.drawing import draw_kept
from pore.cli.generate import _answer
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.data.scaling import size_for, tokens_of
from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.evaluation.batches import Batches
from pore.evaluation.running import evaluate, time_prefill
from pore.families.registry import family_of
from processors import KINDS
from processors.base import Kind, parts_or_skip

SIZES = ((800, 600), (640, 1280))
ANY_SIZE = [k for k in KINDS if k.name not in ("Gemma 3", "Gemma 3, pan and scan", "PaliGemma")]
ANY_SIZE = [k for k in ANY_SIZE if not k.name.startswith(("LLaVA-1.5", "LLaVA with", "Video"))]


def samples() -> list[Sample]:
    return [Sample(f"{i}", Image.new("RGB", size), "look", "no") for i, size in enumerate(SIZES)]


def kind_of(name: str) -> Any:
    (found,) = (kind for kind in KINDS if kind.name == name)
    return parts_or_skip(found)


# -- sizes -----------------------------------------------------------------------------------------


@given(st.integers(40, 2000), st.integers(40, 2000), st.integers(1, 400), st.integers(8, 40))
def test_the_largest_size_with_so_few_tokens(w: int, h: int, keep: int, side: int) -> None:
    """Against all scales in steps of 1 %, where tokens are whole squares of pixels."""

    def tokens(size: tuple[int, int]) -> int:
        return max(size[0] // side, 1) * max(size[1] // side, 1)

    try:
        found = size_for(tokens, (w, h), keep)
    except BudgetError:
        assert keep < tokens((w * 8 // min(w, h) + 1, h * 8 // min(w, h) + 1)) * 4
        return
    assert tokens(found) <= keep
    assert found[0] <= w
    assert found[1] <= h
    assert abs(found[0] * h - found[1] * w) <= max(w, h)
    steps = [(round(w * i / 100), round(h * i / 100)) for i in range(1, 101)]
    best = max(
        (tokens(size) for size in steps if min(size) > 8 and tokens(size) <= keep), default=0
    )
    assert tokens(found) >= 0.9 * best - 2 * max(w, h) / side / 10 - 1


def test_a_picture_of_few_tokens_stays() -> None:
    assert size_for(lambda size: size[0] * size[1] // 100, (80, 60), 48) == (80, 60)


def test_refused_sizes_are_passed_over() -> None:
    assert size_for(lambda s: None if 200 < s[0] < 900 else s[0], (1000, 500), 150)[0] <= 150
    with pytest.raises(InputError, match="refuses pictures of 9 x 9"):
        size_for(lambda _: None, (9, 9), 4)
    with pytest.raises(BudgetError, match="at least 7 visual tokens"):
        size_for(lambda _: 7, (90, 90), 4)


# -- processors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ANY_SIZE, ids=str)
def test_a_family_that_takes_images_of_any_size(kind: Kind) -> None:
    """Fewer tokens, at most `keep`; the report has the real number, and nothing else changes."""
    processor, model = parts_or_skip(kind)
    whole = [tokens_of(model, processor, size) for size in SIZES]
    keep = min(filter(None, whole)) * 3 // 4
    pruner = pore.PixelBudget(keep)
    try:
        inputs = build_inputs(
            processor, samples(), dtype=torch.float32, resize=pruner.resizing(model, processor)
        )
    except BudgetError:
        assert kind.name.startswith("LLaVA-NeXT")  # its least grid has two tiles
        return
    with torch.no_grad():
        plain = model(**inputs).logits
        with pruner(model) as run:
            assert torch.equal(model(**inputs).logits, plain)
    for sample, full in zip(run.report, whole, strict=True):
        assert full is not None
        (image,) = sample.images
        assert len(image.kept) == image.seen <= keep < full
        if family_of(model).packed:
            assert image.seen > 0.8 * keep


@pytest.mark.parametrize("name", ["InternVL", "Aya Vision", "SmolVLM", "Idefics3", "Gemma 4"])
def test_settings_of_processors(name: str) -> None:
    """Where the processor decides on the size, its setting says how many tokens there are."""
    processor, model = kind_of(name)
    most = []
    for keep in (300, 1100, 4000):
        settings = pore.PixelBudget(keep).resizing(model, processor).settings
        counts = [tokens_of(model, processor, (w, h), settings) for w, h in (*SIZES, (3000, 500))]
        assert all(count is not None and count <= keep for count in counts)
        most.append(max(filter(None, counts)))
    assert most[0] <= most[1] <= most[2]
    assert most[0] < most[2] or name == "Gemma 4"
    with pytest.raises(BudgetError, match="at its least setting"):
        pore.PixelBudget(9).resizing(model, processor)
    with pytest.raises(BudgetError, match="ask for a number of tokens"):
        pore.PixelBudget(0.5).resizing(model, processor)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "PaliGemma", "Gemma 3", "Video-LLaVA"])
def test_families_of_one_size_refuse_it(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    with pytest.raises(UnsupportedModelError, match=r"whatever its size\. Use"):
        pore.PixelBudget(6).apply(case.model())


# -- evaluation ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_an_evaluation_scales_every_picture() -> None:
    processor, model = kind_of("Qwen2-VL")
    batches = Batches(model, processor, samples(), batch_size=2)
    outcome = evaluate(model, processor, batches, pore.PixelBudget(64), max_new_tokens=1)
    assert [sum(map(len, answer.kept)) for answer in outcome.answers] == [63, 55]
    share = evaluate(model, processor, batches, pore.PixelBudget(0.25), max_new_tokens=1)
    assert [sum(map(len, answer.kept)) for answer in share.answers] == [140, 253]
    whole = evaluate(model, processor, batches, None, max_new_tokens=1)
    assert [answer.mean_tokens for answer in whole.answers] == [609, 1058]
    assert len(time_prefill(model, batches, [None, pore.PixelBudget(64)], rounds=1)) == 2


@pytest.mark.parametrize(("name", "keep", "left"), [("Qwen2-VL", 64, 63), ("InternVL", 800, 256)])
def test_what_generate_draws_is_the_picture_that_the_model_saw(
    name: str, keep: int, left: int, tmp_path: Path
) -> None:
    processor, model = kind_of(name)
    sample, pruner = Sample("one", photograph("photograph"), "look"), pore.PixelBudget(keep)
    answer, report = _answer(model, processor, [sample], pruner, {"max_new_tokens": 1})
    assert report is not None
    assert len(report.samples[0].images[0].kept) == left
    images = report.samples[0].images
    draw_kept(tmp_path / "a.png", model, processor, [sample], images, pruner, answer)
    assert Image.open(tmp_path / "a.png").size > (100, 100)


def test_pictures_that_were_not_scaled_are_refused() -> None:
    (case,) = (case for case in CASES if case.name == "Qwen2-VL")
    model = case.model()
    refused = pytest.raises(InputError, match=r"resize=pruner\.resizing")
    with refused, torch.no_grad(), pore.PixelBudget(0.5)(model):
        model(**case.inputs([[5, -1, 7, 8]]))
    with pytest.raises(UnsupportedModelError), pore.PixelBudget(5)(tiny_llava()) as run:
        run.model(**batch([prompt(3, 1, 5)]))


def test_counts_are_the_most_that_there_may_be() -> None:
    assert pore.PixelBudget(0.25).counts(100, 3) == [25, 25, 25]
