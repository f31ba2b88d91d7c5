"""LLaVA-NeXT: tiles, cut-off padding and newline tokens, on a tiny random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import pore
from helpers.methods import EVERY, usual
from helpers.models import IMAGE, PAD, in_float64
from pore.errors import BudgetError, InputError
from pore.families.registry import family_of
from pore.tensors.selection import even_shares

# ToMe cannot meet a budget here.
IN_TOWER = [n for n in EVERY if usual(n, 6).tower_stage is not None and n != "ToMe"]
SIZES = [(60, 50), (20, 60)]
TEXTS = [([1, 2, 3], [4, 5]), ([1], [4, 5, 6])]
PRUNERS = [
    pore.FastV(keep=8),
    pore.FasterVLM(keep=21),
    pore.VTCCLS(keep=0.3, start_layer=0),
    pore.DivPrune(keep=9),
]


@pytest.fixture(scope="module")
def model() -> LlavaNextForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaNextConfig(
        text_config=LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            pad_token_id=PAD,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=16,
            initializer_range=0.3,
        ),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    made = LlavaNextForConditionalGeneration._from_config(config, dtype=torch.float64).eval()
    made.generation_config.pad_token_id = PAD
    made.generation_config.eos_token_id = None
    return in_float64(made)


def inputs_of(model: Any, which: list[int], side: str = "left") -> dict[str, torch.Tensor]:
    """A batch of the prompts `which`, padded."""
    sizes = torch.tensor([SIZES[i] for i in which])
    tilings = family_of(model).tilings(model, {"image_sizes": sizes})
    rows = [
        [*TEXTS[i][0], *[IMAGE] * len(tiling.slots), *TEXTS[i][1]]
        for i, tiling in zip(which, tilings, strict=True)
    ]
    longest = max(map(len, rows))
    fill = [[PAD] * (longest - len(row)) for row in rows]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 5, 3, 32, 32, generator=generator, dtype=torch.float64)
    join = (lambda a, b: b + a) if side == "right" else (lambda a, b: a + b)
    ids = torch.tensor([join(f, row) for f, row in zip(fill, rows, strict=True)])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": pixels[which],
        "image_sizes": sizes,
    }


def test_tokens_are_the_patches_in_the_order_of_the_models_own_packing(model: Any) -> None:
    """Features that are the numbers of their patches come out as the tiling says."""
    sizes = torch.tensor(SIZES)
    first, second = family_of(model).tilings(model, {"image_sizes": sizes})
    assert (first.tiles, first.grid) == (5, (2, 2))
    assert (second.tiles, second.grid) == (3, (1, 2))
    # 60 x 50 on a 64 x 64 canvas: 53 pixels wide, so one column of patches goes on either side.
    assert first.slots[:16] == tuple(range(16))
    rows = [first.slots[16 + 7 * r : 16 + 7 * (r + 1)] for r in range(8)]
    assert all(row[-1] == -1 for row in rows)
    # Row 0 of the canvas: patches 1 to 3 of the first tile and 0 to 2 of the second.
    assert rows[0][:-1] == (17, 18, 19, 32, 33, 34)
    assert rows[4][:-1] == (49, 50, 51, 64, 65, 66)
    image = first.image(0, 0, range(10, 10 + len(first.slots)))
    assert len(image.columns) == 64
    assert len(image.structure) == 8


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [pore.FastV, pore.FasterVLM, pore.DivPrune], ids=str)
def test_keep_all_is_bit_equal(model: Any, kind: Any, side: str) -> None:
    inputs = inputs_of(model, [0, 1], side)
    with torch.no_grad():
        dense = model(**inputs).logits
        with kind(keep=1.0)(model):
            assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("name", IN_TOWER)
def test_keep_all_in_the_tower_is_bit_equal_where_padding_was_cut(model: Any, name: str) -> None:
    """Patches that show nothing but padding are not in the prompt, but they are projected."""
    pruner = usual(name, 1.0)
    for which in ([0], [1], [0, 1]):
        inputs = inputs_of(model, which)
        with torch.no_grad():
            dense = model(**inputs).logits
            with pruner(model):
                assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_batch_equals_singles(model: Any, pruner: Any, side: str) -> None:
    inputs = inputs_of(model, [0, 1], side)
    with torch.no_grad(), pruner(model) as run:
        together = model(**inputs).logits
    for row in range(2):
        with torch.no_grad(), pruner(model) as alone:
            single = model(**inputs_of(model, [row])).logits[0]
        sample = alone.report.samples[0]
        assert sample.images == run.report.samples[row].images
        budget = pruner.keep if isinstance(pruner.keep, int) else round(0.3 * sample.images[0].seen)
        assert len(sample.images[0].kept) == budget
        n = sample.tokens[-1]
        got = together[row, :n] if side == "right" else together[row, -n:]
        torch.testing.assert_close(got, single[-n:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_generate_continues_the_prefill(model: Any, pruner: Any) -> None:
    """`generate` encodes images beforehand and repeats samples for beams."""
    inputs = inputs_of(model, [0, 1])
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), pruner(model) as run:
        prefill = model(**inputs).logits[:, -1]
        out = model.generate(**inputs, max_new_tokens=3, **settings)
        model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    torch.testing.assert_close(out.logits[0], prefill.float())
    samples = run.report.samples
    assert len(samples) == 2 + 2 + 4
    assert [s.images for s in samples[4:]] == [samples[i].images for i in (0, 0, 1, 1)]


def test_what_the_tower_keeps_is_the_models_own_features_and_newlines_stay(model: Any) -> None:
    inputs = inputs_of(model, [0])
    seen: list[torch.Tensor] = []
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(**inputs)
        with pore.FasterVLM(keep=21)(model) as run:
            model(**inputs)
        hook.remove()
    tiling = family_of(model).tilings(model, inputs)[0]
    slots = [i for i, slot in enumerate(tiling.slots) if slot >= 0]
    columns = {3 + slots[i] for i in run.report.samples[0].images[0].kept}
    columns |= {3 + i for i, slot in enumerate(tiling.slots) if slot < 0}
    columns |= {0, 1, 2, 75, 76}
    torch.testing.assert_close(seen[1], seen[0][:, sorted(columns)])


def test_wrong_number_of_placeholders_is_an_error(model: Any) -> None:
    inputs = inputs_of(model, [0])
    inputs["input_ids"] = inputs["input_ids"][:, :-5]
    family = family_of(model)
    with pytest.raises(InputError, match="Sample 0 has 3 visual tokens fewer"):
        family.images(model, inputs)


def test_the_model_is_left_as_it_was(model: Any) -> None:
    before = sorted(model.model.__dict__)
    with pore.FasterVLM(keep=4)(model):
        assert "get_image_features" in model.model.__dict__
    assert sorted(model.model.__dict__) == before


def test_more_than_the_image_shows_is_refused(model: Any) -> None:
    with pytest.raises(BudgetError, match="are \\(64\\)"), pore.FasterVLM(keep=65)(model):
        model(**inputs_of(model, [0]))


@pytest.mark.parametrize(
    ("total", "room", "shares"),
    [
        (7, [4, 4, 4], [3, 2, 2]),
        (9, [1, 2, 9], [1, 2, 6]),
        (0, [3], [0]),
        (6, [0, 3, 3], [0, 3, 3]),
    ],
)
def test_even_shares(total: int, room: list[int], shares: list[int]) -> None:
    assert even_shares(total, room) == shares


def test_a_guide_of_tiled_images(model: Any) -> None:
    """SGL: images of different sizes, whose last token is no patch but the end of a row."""
    inputs = inputs_of(model, [0, 1])
    guide = pore.guide(model, inputs, max_new_tokens=3)
    assert guide.valid.sum(1).tolist() == [64, 32]
    for row in range(2):
        one = pore.guide(model, inputs_of(model, [row]), max_new_tokens=3)
        part = guide.select([row])
        torch.testing.assert_close(part.importance, one.importance, rtol=1e-9, atol=1e-9)
    with torch.no_grad(), pore.SGL(5, layer=2, guide=guide)(model) as run:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for sample, importance in zip(run.report, guide.importance, strict=True):
        best = importance.argsort(descending=True)[:5].sort().values
        assert list(sample.images[0].kept) == best.tolist()
