"""NaN and infinity are refused by every method, by name; zeros are like nothing, and no reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pore
from cases import CASES
from cases.base import Case
from helpers.families import refusal
from helpers.families import usual as in_family
from helpers.golden_models import tower_view
from helpers.methods import EVERY, KEEP, model_of, usual
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from pore.engine.pruner import Pruner
from pore.errors import ScoreError
from pore.tower.stages import TowerStage

FAMILIES = {"LLaVA-1.5 with SigLIP", "LLaVA-NeXT", "Qwen2.5-VL", "Qwen3-VL", "Gemma 3", "SmolVLM"}
OTHERS: list[Pruner] = [
    pore.DivPrune(KEEP, faithful=True),
    pore.FastV(KEEP, suppress_padding=0.5),
    pore.FastV(KEEP, faithful=True),
    pore.GPrune(KEEP, faithful=True),
    pore.HiRED(KEEP, faithful=True),
    pore.PruMerge(),
    pore.PruMergePlus(),
    pore.Scored(KEEP, lambda states, layout, _: layout.gather(states)[..., 0], layer=0),
    pore.SparseVLM(pore.RankBudget(0.5), (2, 4)),
    pore.ToMe(r=2),
    pore.VisionZip(N, faithful=True),
    pore.Chain(pore.VisionZip(9), pore.FastV(KEEP)),
]


def every() -> list[Any]:
    named = [pytest.param(usual(name, KEEP), id=name) for name in EVERY]
    all_ = [pytest.param(usual(name, N), id=f"{name} keeping all") for name in EVERY]
    return [
        *named,
        *all_,
        *(pytest.param(pruner, id=repr(pruner).partition(" at 0x")[0]) for pruner in OTHERS),
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pruner", every())
def test_pixels(pruner: Pruner, bad: float) -> None:
    """One pixel of one image of the batch."""
    model, inputs = model_of(), batch([prompt(3, 1, 5), prompt(7, 2, 4, 1)])
    inputs["pixel_values"][1, 0, 5, 5] = bad
    refused = pytest.raises(ScoreError, match="NaN or infinity")
    with torch.no_grad(), pruner(model) as run, refused:
        model(**inputs)
    inputs["pixel_values"][1, 0, 5, 5] = 0.0
    with torch.no_grad(), pruner(model) as run:  # nothing of it stays
        model(**inputs)
    assert len(run.report) == 2


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES
        for name in EVERY
        if case.name in FAMILIES and refusal(case, name) is None
    ],
)
def test_pixels_in_other_families(case: Case, name: str) -> None:
    model, inputs = case.model(), case.inputs([[5, -1, 7, 8]])
    inputs["pixel_values"].view(-1)[7] = float("nan")
    refused = pytest.raises(ScoreError, match="NaN or infinity")
    with torch.no_grad(), in_family(name, KEEP, case)(model), refused:
        model(**inputs)


@pytest.mark.parametrize("pruner", every())
def test_what_the_projector_gives(pruner: Pruner) -> None:
    """A weight of the projector that is damaged, after everything that the tower sees."""
    model = copy.deepcopy(tiny_llava(layers=8, tower_layers=4))
    model.model.multi_modal_projector.linear_2.weight.data[3, 3] = float("nan")
    refused = pytest.raises(ScoreError, match="NaN or infinity")
    with torch.no_grad(), pruner(model), refused:
        model(**batch([prompt(3, 1, 5)]))


@pytest.mark.parametrize("place", [0, 5, N - 1])
@pytest.mark.parametrize("pruner", every())
def test_one_token_that_the_decoder_gets(pruner: Pruner, place: int) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])

    def damage(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.view(-1, output.shape[-1])[min(place, output.shape[-2] - 1)] = torch.inf
        return output

    hook = model.model.multi_modal_projector.register_forward_hook(damage)
    refused = pytest.raises(ScoreError, match="NaN or infinity")
    try:
        with torch.no_grad(), pruner(model), refused:
            model(**inputs)
    finally:
        hook.remove()


@pytest.mark.parametrize("pruner", every())
def test_an_embedding_of_zeros(pruner: Pruner) -> None:
    """What the decoder gets of one patch is nothing: it has cosine 0 to all others."""
    model, inputs = model_of(), batch([prompt(3, 1, 5), prompt(7, 2, 4, 1)])

    def vanish(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.view(-1, output.shape[-1])[0] = 0.0
        return output

    hook = model.model.multi_modal_projector.register_forward_hook(vanish)
    try:
        with torch.no_grad(), pruner(model) as run:
            logits = model(**inputs).logits
    finally:
        hook.remove()
    assert bool(torch.isfinite(logits).all())
    for sample in run.report:
        for image in sample.images:
            assert 0 < len(image.kept) + image.extra <= N


@pytest.mark.parametrize("dead", [[3], list(range(N))], ids=["one", "all"])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(
    "pruner",
    [
        pytest.param(pruner, id=repr(pruner).partition(" at 0x")[0])
        for pruner in [*(usual(name, KEEP) for name in EVERY), *OTHERS[:-1]]
        if pruner.tower_stage is not None and pruner.tower_stage.merge is None
    ],
)
def test_patches_of_zeros_in_the_tower(pruner: Pruner, cls: bool, dead: list[int]) -> None:
    """Features, queries and keys of zeros: a tower's rule goes on, and gives numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = N + cls
    layers = len(pruner.tower_stage.layers(2, 4))  # type: ignore[union-attr]
    features, keys = draw(2, N, 6), tuple(draw(2, 2, n, 4) for _ in range(layers))
    queries = tuple(draw(2, 2, n, 4) for _ in range(layers))
    features[:, dead] = 0.0
    for part in (*keys, *queries):
        part[:, :, [place + cls for place in dead]] = 0.0
    view = tower_view(
        features,
        draw(layers, 2, 2, N).softmax(-1),
        cls_feature=draw(2, 6) if cls else None,
        queries=queries,
        keys=keys,
    )
    stage = pruner.tower_stage
    assert isinstance(stage, TowerStage)
    assert bool(torch.isfinite(stage.rule(view).features).all())


@pytest.mark.parametrize("name", EVERY)
def test_an_image_of_zeros(name: str) -> None:
    """All tokens are the same nothing, and the budget is met all the same."""
    model, pruner = model_of(), usual(name, KEEP)
    if pruner.reads_tower:
        inputs: dict[str, Any] = batch([prompt(3, 1, 5)])
        inputs["pixel_values"].zero_()
        visual = None
    else:
        ids = torch.tensor([prompt(3, 1, 5)])
        visual = ids == IMAGE
        embeds = model.get_input_embeddings()(ids).detach().clone()
        embeds[visual] = 0.0
        inputs = {"inputs_embeds": embeds}
    with torch.no_grad(), pruner(model) as run:
        run.mark_visual(visual)
        assert bool(torch.isfinite(model(**inputs).logits).all())
    (image,) = run.report.samples[0].images
    assert len(image.kept) + image.extra == KEEP
