"""PriorTR: the question against the token before it, written out; what is refused."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import pore
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from pore.engine.stages import Selection, View
from pore.errors import BudgetError, InputError, ScoreError
from pore.methods.priortr import gained
from pore.tensors.selection import top_k


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=5, attention="eager")


class Noting(pore.PriorTR):
    """PriorTR that notes what it saw and how that scored."""

    def _select(self, stage: int, view: View) -> Selection:
        seen.append((view.attention, self.score(stage, view)))
        return super()._select(stage, view)


seen: list[tuple[Tensor, Tensor]] = []


def read(model: Any, ids: list[int], *settings: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """What the first stage saw of one prompt, (2, N), and how it scored (N,)."""
    seen.clear()
    with torch.no_grad(), Noting(6, (2,), *settings, **named)(model):
        model(**batch([ids]))
    attention, scores = seen[0]
    return attention[0], scores[0]


def weights(model: Any, ids: list[int]) -> Tensor:
    """(H, L, L) attention of layer 1."""
    with torch.no_grad():
        found: Tensor = model(**batch([ids]), output_attentions=True).attentions[1][0]
    return found


def test_the_score_by_hand() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    expected = [x * math.log(x / y) for x, y in zip(p, q, strict=True)]
    # Sums do not matter; a filled place has 0 in both.
    question, null = torch.tensor([[*p, 0.0]]) * 0.3, torch.tensor([[*q, 0.0]]) * 0.1
    scores = gained(question.double(), null.double())
    torch.testing.assert_close(
        scores, torch.tensor([[*expected, 0.0]]).double(), rtol=1e-6, atol=1e-9
    )


class TestRows:
    ids = prompt(3, 1, 5)
    first, last = 3 + N, 3 + N + 4  # of the text after the image
    close: ClassVar[dict[str, Any]] = {
        "rtol": 1e-5,
        "atol": 1e-7,
    }  # eager: its softmax is in float32

    @pytest.mark.parametrize("heads", ["mean", "max"])
    @pytest.mark.parametrize("offset", [0, 1])
    @pytest.mark.parametrize(
        ("query", "with_last", "end"),
        [("question", True, 5), ("question", False, 4), ("last", True, 0)],
    )
    def test_they_are_the_definition(
        self, model: Any, heads: str, offset: int, query: str, with_last: bool, end: int
    ) -> None:
        attention, _ = read(model, self.ids, query, heads, with_last, offset)
        visual = weights(model, self.ids)[:, :, 3 : 3 + N]
        rows = range(self.first, self.first + end) if end else [self.last]
        both = [visual[:, list(rows)].mean(1), visual[:, self.first + offset]]
        found = [x.mean(0) if heads == "mean" else x.amax(0) for x in both]
        torch.testing.assert_close(attention, torch.stack(found).to(attention), **self.close)

    def test_the_null_token_has_seen_nothing_of_the_question(self, model: Any) -> None:
        """So it could be read of a prompt that ends before it: the authors' second variant."""
        attention, _ = read(model, self.ids)
        other, _ = read(model, [*self.ids[: self.first + 1], 33, 44])
        torch.testing.assert_close(attention[1], other[1])
        assert not torch.allclose(attention[0], other[0])

    def test_without_causality_it_has(self, model: Any) -> None:
        attention, _ = read(model, self.ids, faithful=True)
        other, _ = read(model, [*self.ids[: self.first + 1], 33, 44, 55, 66], faithful=True)
        assert not torch.allclose(attention[1], other[1])
        causal, _ = read(model, self.ids, "last")
        both, _ = read(model, self.ids, "last", faithful=True)
        torch.testing.assert_close(causal[0], both[0])  # the last row sees all in any case

    def test_the_best_stay(self, model: Any) -> None:
        _, scores = read(model, self.ids)
        with torch.no_grad(), pore.PriorTR(6, (2,))(model) as run:
            model(**batch([self.ids]))
        kept = top_k(scores[None], [6])[0].nonzero()[:, 0].tolist()
        assert list(run.report.samples[0].images[0].kept) == kept

    def test_every_image_has_its_own(self, model: Any) -> None:
        ids = prompt(2, 2, 4)
        seen.clear()
        with torch.no_grad(), Noting(6, (2,))(model):
            model(**batch([ids]))
        attention = seen[0][0]
        every = weights(model, ids)
        for number, (start, text) in enumerate(
            [(2, [18, 19, 36, 37, 38, 39]), (20, [36, 37, 38, 39])]
        ):
            visual = every[:, :, start : start + N]
            expected = torch.stack([visual[:, text].mean((0, 1)), visual[:, text[0]].mean(0)])
            torch.testing.assert_close(attention[number], expected.to(attention), **self.close)


class TestSettings:
    def test_a_prompt_without_a_question_is_refused(self, model: Any) -> None:
        ids = [5, 6, *[IMAGE] * N, 7]
        with (
            pore.PriorTR(6, (2,))(model),
            pytest.raises(InputError, match="put the question after"),
        ):
            model(**batch([ids]))

    def test_too_little_text_for_an_offset_is_refused(self, model: Any) -> None:
        ids = [5, 6, *[IMAGE] * N, 7, 8]
        with (
            pore.PriorTR(6, (2,), offset=1)(model),
            pytest.raises(InputError, match="fewer than 3"),
        ):
            model(**batch([ids]))

    def test_budgets(self) -> None:
        assert pore.PriorTR(0.25).remaining(37) == [9]  # truncated, as by the authors
        assert pore.PriorTR(4, (2, 4)).remaining(16) == [8, 4]
        assert pore.PriorTR((9, 4), (2, 4)).counts(16, 5) == [16, 16, 9, 9, 4]
        with pytest.raises(BudgetError, match="more visual tokens"):
            pore.PriorTR(17).remaining(16)

    @pytest.mark.parametrize(
        ("settings", "error", "words"),
        [
            ({"keep": (3, 4), "layers": (2, 4)}, BudgetError, "rises"),
            ({"keep": (3,), "layers": (2, 4)}, BudgetError, "1 numbers for 2 stages"),
            ({"keep": 3, "query": "answer"}, ScoreError, "query must be"),
            ({"keep": 3, "heads": "sum"}, ScoreError, "heads must be"),
            ({"keep": 3, "offset": -1}, BudgetError, "offset must be"),
            ({"keep": 3, "layers": (0,)}, BudgetError, "first pruned layer of each stage"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, settings: Any, error: Any, words: str) -> None:
        with pytest.raises(error, match=words):
            pore.PriorTR(**settings)

    def test_it_takes_no_bias(self) -> None:
        assert not pore.PriorTR.reweightable
        with pytest.raises(TypeError, match="reweight"):
            pore.PriorTR(3, reweight=None)  # type: ignore[call-arg]
