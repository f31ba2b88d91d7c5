"""Every correction against its formula, in every host that ranks by text-visual attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.recording import Recording, Seen
from pore.bias.where import Where
from pore.corrections import HeadBiases, NullTokenPrior, Subtracted, WithoutRoPE
from pore.cost.named import model_shape
from pore.engine.corrections import AttentionCorrection
from pore.engine.readers import null_row
from pore.engine.run import Run
from pore.errors import BudgetError, InputError, ProfileError, ProfileMismatchError, ScoreError
from pore.families.registry import shape_of
from pore.layout import Image, Layout

P = pore.PositionBias.exponential(0.3, N)
SHAPE = model_shape("llava-64x8")
# What SGL refuses, which ranks by what another model looked at, and D2Pruner, which takes all but
# None, their own tests hold.
HOSTS = [
    name
    for name, kind in pore.methods().items()
    if kind.reweightable and kind.usual(5, SHAPE) is not None
]
CORRECTIONS: dict[str, Any] = {
    "bias": P,
    "weaker": P.with_strength(0.5),
    "own": lambda scores, where: scores / P.values.to(scores)[where.raster],
    "subtracted": Subtracted(P, 0.5),
    "without RoPE": WithoutRoPE(),
    "null token": NullTokenPrior(),
    "null token, ratio": NullTokenPrior("ratio"),
}


def inputs() -> dict[str, Tensor]:
    return batch([prompt(3, 1, 5), prompt(2, 1, 7)], seed=1)


@pytest.fixture
def model() -> Any:
    return tiny_llava().double()


def first_stage(pruner: Any, model: Any) -> Seen:
    """What the first stage of a method sees and chooses."""
    recording = Recording(pruner)
    with Run(recording, model):
        model(**inputs())
    return recording.seen[0]


def scores_of(pruner: Any, model: Any) -> Tensor:
    """The corrected scores of FastV."""
    view = first_stage(pruner, model).view
    return view.corrected(view.attention)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("host", HOSTS)
def test_every_host_takes_every_correction(model: Any, host: str, correction: str) -> None:
    pruner = pore.methods()[host].usual(5, shape_of(model.config))
    with replace(pruner, reweight=CORRECTIONS[correction])(model) as run:
        logits = model(**inputs()).logits
    assert bool(torch.isfinite(logits).all())
    kept = [len(image.kept) for sample in run.report.samples for image in sample.images]
    assert all(count < N for count in kept)


def test_a_function_of_ones_own_is_what_it_computes(model: Any) -> None:
    own = pore.FastV(keep=5, reweight=CORRECTIONS["own"])
    bias = pore.FastV(keep=5, reweight=P)
    torch.testing.assert_close(scores_of(own, model), scores_of(bias, model))


def test_the_strength_is_a_power(model: Any) -> None:
    plain = scores_of(pore.FastV(keep=5), model)
    half = scores_of(pore.FastV(keep=5, reweight=P.with_strength(0.5)), model)
    torch.testing.assert_close(
        half / half.sum(-1, keepdim=True),
        (plain / P.values.sqrt()) / (plain / P.values.sqrt()).sum(-1, keepdim=True),
    )
    assert P.with_strength(0).growth == 1
    with pytest.raises(ProfileError, match="from 0 to 1"):
        P.with_strength(2)


def test_a_subtracted_bias_takes_its_share_of_the_mean_away(model: Any) -> None:
    plain = scores_of(pore.FastV(keep=5), model)
    found = scores_of(pore.FastV(keep=5, reweight=Subtracted(P, 0.25)), model)
    torch.testing.assert_close(found, plain - 0.25 * plain.mean(-1, keepdim=True) * P.values)
    with pytest.raises(ProfileError, match="from 0 to 1"):
        Subtracted(P, -1)


@pytest.mark.parametrize("by", ["log ratio", "ratio"])
def test_the_null_token_is_the_one_after_the_image(model: Any, by: Any) -> None:
    view = first_stage(pore.FastV(keep=5), model).view
    found = scores_of(pore.FastV(keep=5, reweight=NullTokenPrior(by)), model)
    rows = null_row(view.layout)
    assert rows[:, 0].tolist() == (view.layout.columns[:, -1] + 1).tolist()
    taken: list[Tensor] = []

    class Reads(AttentionCorrection):
        kind = "test"

        def beside(self, attention: Any) -> Any:
            taken.append(attention.logits(rows).softmax(-1).mean(1)[:, 0])

    scores_of(pore.FastV(keep=5, reweight=Reads()), model)
    prior = taken[0].gather(1, view.layout.columns)
    p, q = (x / x.sum(-1, keepdim=True) for x in (view.attention, prior))
    expected = p / q if by == "ratio" else p * (p / q).log()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_prompt_without_text_after_the_image_has_no_null_token(model: Any) -> None:
    with (
        pytest.raises(InputError, match="put the question after the image"),
        pore.FastV(keep=5, reweight=NullTokenPrior())(model),
    ):
        model(**batch([prompt(3, 1, 1)], seed=1))
    with pytest.raises(ScoreError, match="'log ratio' or 'ratio'"):
        NullTokenPrior("log")  # type: ignore[arg-type]


def test_without_rope_order_of_tokens_does_not_matter(model: Any) -> None:
    """Same states in another order: the same attention, in that order."""
    kept = {}
    for flip in (False, True):
        given = inputs()
        states = model.get_input_embeddings()(given["input_ids"]).detach()
        where = given["input_ids"] == IMAGE
        features = torch.randn(N, states.shape[-1], generator=torch.Generator().manual_seed(2))
        for row in range(2):
            states[row, where[row]] = (features.flip(0) if flip else features).to(states)
        pruner = pore.FastV(keep=5, layer=1, reweight=WithoutRoPE())
        recording = Recording(pruner)
        with Run(recording, model) as run:
            run.mark_visual(where)
            model(inputs_embeds=states, attention_mask=given["attention_mask"])
        view = recording.seen[0].view
        kept[flip] = view.corrected(view.attention)
    torch.testing.assert_close(kept[False], kept[True].flip(-1))


class TestHeads:
    def biases(self, rates: list[float]) -> HeadBiases:
        return HeadBiases(tuple(pore.PositionBias.exponential(rate, N) for rate in rates))

    def heads(self, model: Any) -> int:
        return int(model.config.text_config.num_attention_heads)

    def test_each_head_is_divided_before_the_mean(self, model: Any) -> None:
        rates = [0.1 * i for i in range(self.heads(model))]
        biases = self.biases(rates)
        taken: list[Tensor] = []

        class Reads(AttentionCorrection):
            kind = "test"

            def heads(self, weights: Tensor, where: Where) -> Tensor:
                taken.append(weights)
                return weights

        scores_of(pore.FastV(keep=5, reweight=Reads()), model)
        found = scores_of(pore.FastV(keep=5, reweight=biases), model)
        each = torch.stack([bias.values for bias in biases.biases])
        torch.testing.assert_close(found, (taken[0][:, :, 0] / each).mean(1))

    def test_equal_biases_are_one(self, model: Any) -> None:
        one = scores_of(pore.FastV(keep=5, reweight=P), model)
        every = scores_of(
            pore.FastV(keep=5, reweight=self.biases([0.3] * self.heads(model))), model
        )
        torch.testing.assert_close(every, one)

    def test_another_number_of_heads_or_positions_is_refused(self, model: Any) -> None:
        few = self.biases([0.1] * (self.heads(model) + 1))
        with pytest.raises(ProfileMismatchError, match="heads"), pore.FastV(5, reweight=few)(model):
            model(**inputs())
        with pytest.raises(ProfileError, match="all over the same positions"):
            HeadBiases((P, pore.PositionBias.exponential(0.1, N + 1)))
        with pytest.raises(ProfileError, match="1 to"):
            HeadBiases(())

    def test_it_is_saved_and_read(self, tmp_path: Any) -> None:
        biases = self.biases([0.1, 0.2])
        assert HeadBiases.load(biases.save(tmp_path / "heads.json")) == biases
        (tmp_path / "other.json").write_text(P.to_json())
        with pytest.raises(ProfileError, match="no position bias of heads"):
            HeadBiases.load(tmp_path / "other.json")


def test_what_is_no_correction_is_refused(model: Any) -> None:
    with pytest.raises(ScoreError, match="is none of them"):
        pore.FastV(keep=5, reweight=3).stages()  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="must return the same shape"):
        scores_of(pore.FastV(keep=5, reweight=lambda scores, where: scores[:, :1]), model)
    with pytest.raises(BudgetError, match="faithful=False"):
        pore.FastV(keep=5, faithful=True, reweight=WithoutRoPE())


class TestWhere:
    """Places and distances, counted by hand."""

    def layout(self) -> Layout:
        # text, image of 3, text; text, image of 2, text, padding
        images = [Image(0, 0, [2, 3, 4]), Image(1, 0, [1, 2])]
        tokens = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
        return Layout.of(images, tokens)

    def test_as_it_came(self) -> None:
        where = Where(self.layout())
        assert where.counts[:, 0].tolist() == [3, 2]
        assert where.raster[0].tolist() == [0, 1, 2]
        assert where.distance[0].tolist() == [4, 3, 2]
        assert where.distance[1, :2].tolist() == [3, 2]

    def test_after_tokens_were_dropped(self) -> None:
        layout = self.layout()
        keep = torch.tensor([[True, False, True], [False, True, False]])
        index = torch.tensor([[0, 1, 2, 4, 5, 6], [0, 2, 3, 4, 5, 6]])
        tokens = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        short = layout.shorten(keep, index, tokens)
        original, dense = Where(short), Where(short, "dense")
        assert original.raster[0].tolist() == [0, 2]
        assert original.distance[0].tolist() == [4, 2]
        assert original.distance[1, 0].item() == 2
        assert dense.raster[0].tolist() == [1, 2]
        assert dense.distance[0].tolist() == [3, 2]
        assert dense.raster[1, 0].item() == 1
