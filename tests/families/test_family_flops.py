"""FLOPs of every family: a tiny model's forward by PyTorch's own counter, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pore
from cases import CASES, COUSINS
from cases.base import Case
from cases.qwen_vl import Qwen25VL
from helpers.described import Described
from helpers.families import PROMPTS, forward
from helpers.flops import sdpa_on_cpu
from pore.bench.measuring import measure
from pore.cost.flops import model_flops
from pore.engine.prefill import TowerWork
from pore.errors import UnsupportedModelError
from pore.evaluation.guided import Guiding
from pore.evaluation.results import SurveySettings
from pore.evaluation.sizes import ImageSizes
from pore.evaluation.survey import lineup
from pore.families.registry import family_of, shape_of
from pore.methods.support import support

EVERY = [case for case in [*CASES, *COUSINS] if case.counted]
UNCOUNTED = [case for case in [*CASES, *COUSINS] if not case.counted]
ALONE = {"text": [5, 6, 7], "images": [5, -1, 6, 7, -2, 8], "videos": [5, -100, 6, -101, 7]}


class Counted:
    """FLOPs of a forward of one prompt by part, without rotary angles, which we leave out."""

    def __init__(self, case: Case, prompt: Sequence[int]) -> None:
        model = case.model()
        family = family_of(model)
        self.inputs = case.inputs([prompt])
        names = {part: f"{type(model).__name__}.{name}" for name, part in model.named_modules()}
        cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        counter = FlopCounterMode(display=False, custom_mapping={cpu_kernel: sdpa_on_cpu})
        with counter:
            forward(case, self.inputs, use_cache=False)

        def part(module: nn.Module, products: bool = False) -> int:
            found = counter.flop_counts[names[module]]
            return found[torch.ops.aten.mm] if products else sum(found.values())

        # Of a recurrent layer the matrices alone.
        layers = family.layers(model)
        self.layers = tuple(part(layer, family.recurrent(layer)) for layer in layers)
        self.head = part(model.get_output_embeddings())
        self.images = counter.get_total_flops() - part(family.decoder(model)) - self.head


def recurrence(config: Any) -> int:
    """Multiply-adds of a token beside those with matrices, in a recurrent layer of Qwen3.5."""
    text = config.get_text_config()
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = text.linear_num_value_heads * text.linear_value_head_dim
    convolution = (2 * keys + values) * text.linear_conv_kernel_dim
    # The state, keys by values, is read, written to, and read.
    return int(convolution + 3 * values * text.linear_key_head_dim)


@pytest.mark.parametrize(
    ("case", "prompt"),
    [
        pytest.param(case, prompt, id=f"{case.name}-{situation}")
        for case in EVERY
        for situation, prompt in ALONE.items()
        if situation != "videos" or case.videos
    ],
)
@pytest.mark.at_once(8)
def test_every_part_of_a_forward(case: Case, prompt: list[int]) -> None:
    measured = Counted(case, prompt)
    model, inputs = case.model(), measured.inputs
    family, n = family_of(model), inputs["input_ids"].shape[1]
    shape = shape_of(model.config)
    work = TowerWork.of(shape, family.images(model, family.inputs(model, (), inputs)))
    expected = model_flops(shape, [n] * case.layers, **work._asdict(), logits=n)
    for layer, found, counted in zip(
        family.layers(model), measured.layers, expected.per_layer, strict=True
    ):
        beside = recurrence(model.config) if family.recurrent(layer) else 0
        assert found == counted - 2 * n * beside
    assert measured.head == expected.head
    assert measured.images == expected.tower + expected.projector


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
@pytest.mark.at_once(4)
def test_what_a_run_reports(case: Case) -> None:
    """Of a batch, for every sample by itself; dropping tokens takes from the decoder alone."""
    inputs = case.inputs(PROMPTS["without"])
    with pore.DivPrune(keep=6)(case.model()) as run:
        forward(case, inputs)
    with_image, without = run.report.samples
    assert with_image.flops_of == without.flops_of == "model"
    assert (with_image.cost.tower, with_image.cost.projector) == (
        with_image.unpruned_cost.tower,
        with_image.unpruned_cost.projector,
    )
    assert with_image.cost.tower > without.cost.tower == 0
    assert with_image.flops < with_image.unpruned_flops
    assert without.flops == without.unpruned_flops
    text = len(PROMPTS["without"][0]) - 1
    seen = with_image.unpruned[0]
    assert text < with_image.tokens[0] == seen - with_image.images[0].seen + 6


@pytest.mark.parametrize("case", UNCOUNTED, ids=lambda case: case.name)
def test_what_is_not_counted_is_unknown(case: Case) -> None:
    """How many tokens go through the layers that share keys depends on the logits asked for."""
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        shape_of(case.model().config)
    with pore.DivPrune(keep=6)(case.model()) as run:
        forward(case, case.inputs(PROMPTS["single"]))
    (sample,) = run.report.samples
    assert sample.flops is sample.unpruned_flops is sample.flops_of is None


@pytest.mark.parametrize(
    "case",
    [case for case in EVERY if family_of(case.model()).tower_refusal is None],
    ids=lambda case: case.name,
)
@pytest.mark.at_once(4)
def test_only_what_is_kept_in_the_tower_is_projected(case: Case) -> None:
    """What a run reports to be saved before the decoder, by matrices and convolutions there."""
    model = case.model()
    inputs, family = case.inputs([[5, -1, 6, 7, -2, 8]]), family_of(model)
    inside = {*family.decoder(model).modules(), model.get_output_embeddings()}
    projector = family.projector(model)
    # Gemma 3's has its matrix in itself.
    itself = projector if any(True for _ in projector.parameters(recurse=False)) else None
    outside = {
        f"{type(model).__name__}.{name}"
        for name, module in model.named_modules()
        if module not in inside
        and (module is itself or isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d))
    }
    aten = torch.ops.aten

    def products() -> int:
        with FlopCounterMode(display=False) as counter:
            forward(case, inputs, use_cache=False)
        # Rules multiply queries with keys besides, in batches.
        found = (counter.flop_counts[name] for name in outside & counter.flop_counts.keys())
        return sum(one[op] for one in found for op in (aten.mm, aten.addmm, aten.convolution))

    unpruned = products()
    with pore.FasterVLM(keep=6)(model) as run:
        pruned = products()
    (sample,) = run.report.samples
    saved = sample.unpruned_cost.projector - sample.cost.projector
    assert unpruned - pruned == saved > 0
    assert sample.unpruned_cost.tower == sample.cost.tower


def test_a_tower_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder of a described model is known by its own type; its tower is not."""
    monkeypatch.setattr(pore.Family, "registry", dict(pore.Family.registry))
    type("MyVLM", (pore.Family,), {"name": "My VLM", "model_types": ("my_vlm",)})
    case = Described()
    with pore.DivPrune(keep=6)(case.model()) as run:
        forward(case, case.inputs([[5, -1, 7]]))
    (sample,) = run.report.samples
    assert sample.flops_of == "decoder"
    assert sample.cost.tower is sample.cost.projector is None
    assert sample.cost.decoder == sum(Counted(case, [5, 6, 7, 8, 9, 10, 11, 12]).layers)
    assert sample.flops == sample.cost.decoder + sample.cost.head
    assert "FLOPs are of the decoder alone" in str(run.report)
    assert run.report.to_dict()["samples"][0]["flops_of"] == "decoder"
    shape = shape_of(case.model().config)
    with pytest.raises(UnsupportedModelError, match="they are not known"):
        pore.schedule("FastV", shape, 0.5)
    with pytest.raises(UnsupportedModelError, match="vision tower are not known"):
        pore.HiPrune.usual(6, shape)


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_one_number_of_tokens_or_the_reason_why_not(case: Case) -> None:
    shape = shape_of(case.model().config)
    if family_of(case.model()).grid(case.model()) is None or case.tiled:
        with pytest.raises(UnsupportedModelError, match="in this model images"):
            _ = shape.image_tokens
    else:
        assert shape.image_tokens == len([x for x in case.content(0) if x])


OFTEN_MEASURED = ("LLaVA-1.5", "Gemma 3")
"""With what is attainable, and without."""
FIXED = [
    case
    for case in EVERY
    if case.name.startswith(("LLaVA-1.5", "Video-LLaVA", "Gemma 3", "PaliGemma"))
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, id=case.name, marks=() if case.name in OFTEN_MEASURED else pytest.mark.slow
        )
        for case in FIXED
    ],
)
@pytest.mark.slow
def test_speed_and_budgets_of_images_of_one_size(case: Case) -> None:
    model = case.model()
    pruner = pore.schedule("FastV", model, 8)
    result = measure(
        model, [pruner], text_before=3, text_after=4, new_tokens=2, repeats=1, warmup=0
    )
    unpruned, pruned = result.settings
    assert unpruned.tokens == (3 + 16 + 4,) * case.layers
    assert sum(unpruned.tokens) - sum(pruned.tokens) == (16 - 8) * case.layers
    assert pruned.flops.tower == unpruned.flops.tower > 0
    # What is attainable is a loop over LLaMA-like layers.
    assert (pruned.attainable is not None) == ("LLaVA" in case.name)


def test_a_survey_plans_what_a_family_takes() -> None:
    """Gemma 3 does not take all methods; what is left out says why."""
    case = next(case for case in FIXED if case.name == "Gemma 3")
    model = case.model()
    planned, left_out = lineup(
        model,
        SurveySettings(keeps=(8,)),
        Guiding(model, None, max_new_tokens=4, itself=True),
        ImageSizes(16, 16, 16, any_size=False),
    )
    names = {name for name, limits in limits_of(model).items() if not limits}
    assert {pruner.name for _, pruner in planned} - {"SGL"} <= names
    assert {one.method for one in left_out} >= set(limits_of(model)) - names


def limits_of(model: Any) -> Any:
    """What a model's family does not take of every method."""
    kind = type(family_of(model))
    (found,) = (one.limits for one in support() if type(one.family) is kind)
    return found


def test_windows_at_the_edges_of_an_image() -> None:
    """Windows of 4 x 4 patches in frames of 6 x 10: 2 x 3, those at the edges cut off."""
    shape = shape_of(Qwen25VL().model().config)
    tower = shape.tower
    assert tower is not None
    assert (tower.window, tower.full) == (4, (1,))
    windows = [16, 16, 8, 8, 8, 4]
    one, two = (
        model_flops(replace(shape, tower=replace(tower, full=full)), [9] * 6, images=[(2, 6, 10)])
        for full in ((), (0, 1))
    )
    pairs = 2 * (60**2 - sum(n * n for n in windows))  # in 2 frames
    assert two.tower - one.tower == tower.layers * 4 * tower.hidden * pairs
