"""HAWK: signed similarities by head, the question, budgets, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

import pore
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from pore.engine.stages import Selection, View
from pore.errors import BudgetError, InputError, ScoreError
from pore.families.registry import shape_of
from pore.layout import Image, Layout
from pore.methods.hawk import QWEN25_VL_7B, normalized, question_rows, weighted
from pore.tensors.selection import top_k

WEIGHTS = (0.5, 0.0, 0.2, 0.3)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava()


class Noting(pore.HAWK):
    """HAWK that notes its scores."""

    def _select(self, view: View) -> Selection:
        seen.append(view.attention)
        return super()._select(view)


seen: list[Tensor] = []


def by_hand(model: Any, ids: list[int], start: int, rows: list[int]) -> Tensor:
    """(H, N) likeness of the visual tokens from `start` on and the rows of one prompt."""
    with torch.no_grad():
        states = model(**batch([ids]), output_hidden_states=True).hidden_states[0][0]
        block = model.model.language_model.layers[0]
        states = block.input_layernorm(states)
        queries = block.self_attn.q_proj(states[rows]).view(len(rows), 4, 8)
        keys = block.self_attn.k_proj(states[start : start + N]).view(N, 2, 8)
    heads = [
        sum(keys[:, head // 2] @ query[head] / 8**0.5 for query in queries) / len(rows)
        for head in range(4)
    ]
    return torch.stack(heads)  # type: ignore[arg-type]


class TestScores:
    def test_they_are_the_definition(self, model: Any) -> None:
        ids = prompt(3, 1, 5)
        heads = by_hand(model, ids, 3, list(range(3 + N, 8 + N)))
        expected = sum(
            weight * head / head.norm() for weight, head in zip(WEIGHTS, heads, strict=True)
        )
        seen.clear()
        with torch.no_grad(), Noting(6, WEIGHTS)(model) as run:
            model(**batch([ids]))
        torch.testing.assert_close(seen[0][0], expected)
        kept = top_k(expected[None], [6])[0].nonzero()[:, 0].tolist()  # type: ignore[index]
        assert list(run.report.samples[0].images[0].kept) == kept
        assert run.report.samples[0].tokens == (8 + 6,) * 5

    def test_the_question_after_the_last_image_counts_for_all(self, model: Any) -> None:
        ids = prompt(2, 2, 4)
        rows = list(range(len(ids) - 4, len(ids)))
        seen.clear()
        with torch.no_grad(), Noting(6, None, "softmax")(model):
            model(**batch([ids]))
        for number, start in enumerate((2, 2 + N + 2)):
            expected = by_hand(model, ids, start, rows).softmax(1).sum(0)
            torch.testing.assert_close(seen[0][number], expected)

    def test_ids_tell_the_question(self, model: Any) -> None:
        ids = [5, *[IMAGE] * N, 81, 6, 7, 8, 82, 9]
        seen.clear()
        with torch.no_grad(), Noting(6, WEIGHTS, between=(81, 82))(model):
            model(**batch([ids]))
        heads = by_hand(model, ids, 1, [N + 2, N + 3, N + 4])
        values = weighted(heads[None], torch.ones(1, N, dtype=torch.bool), "l2", WEIGHTS)
        torch.testing.assert_close(seen[0], values)

    def test_a_prompt_in_embeddings_has_no_ids(self, model: Any) -> None:
        ids = torch.tensor([[5, *[3] * N, 81, 6, 7, 82, 9]])
        embeds = torch.randn(1, ids.shape[1], 32, dtype=torch.float64)
        seen.clear()
        with torch.no_grad(), Noting(6, WEIGHTS, between=(81, 82))(model) as run:
            run.mark_visual(ids == 3)
            model(inputs_embeds=embeds)
            run.mark_visual(ids[:, :-1] == 3)
            model(inputs_embeds=embeds[:, :-1])
        assert not torch.allclose(
            seen[0], seen[1]
        )  # its last token counts, though it comes after 82


class TestNormalization:
    values = torch.tensor([[[3.0, -4.0, 0.0, 99.0], [0.0, 0.0, 0.0, 99.0]]])
    valid = torch.tensor([[True, True, True, False]])

    @pytest.mark.parametrize(
        ("how", "expected"),
        [
            ("l2", [[0.6, -0.8, 0.0], [0.0, 0.0, 0.0]]),
            ("minmax", [[1.0, 0.0, 4 / 7], [0.0, 0.0, 0.0]]),
            (
                "softmax",
                [
                    [math.exp(x) / (math.exp(3) + math.exp(-4) + 1) for x in (3, -4, 0)],
                    [1 / 3] * 3,
                ],
            ),
        ],
    )
    def test_by_hand_and_without_filling(self, how: Any, expected: list[list[float]]) -> None:
        got = normalized(self.values, self.valid, how)[0, :, :3]
        torch.testing.assert_close(got, torch.tensor(expected))

    def test_heads_are_summed_by_weight(self) -> None:
        values = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        valid = torch.tensor([[True, True]])
        assert weighted(values, valid, "l2", (0.25, 0.75)).tolist() == [[0.25, 0.75]]
        assert weighted(values, valid, "l2", None).tolist() == [[1.0, 1.0]]


class TestQuestion:
    def rows(self, ids: list[int], between: Any = (81, 82), padding: int = 0) -> list[list[int]]:
        columns = [i for i, token in enumerate(ids) if token == IMAGE]
        tokens = torch.ones(1, len(ids), dtype=torch.bool)
        tokens[:, :padding] = False
        layout = Layout.of([Image(0, 0, columns)], tokens)
        found = question_rows(layout, torch.tensor([ids]), between)
        return [row.nonzero()[:, 0].tolist() for row in found]

    def test_between_the_last_of_the_first_id_and_the_last_of_the_second(self) -> None:
        assert self.rows([5, 82, IMAGE, 81, 6, 82, 7, 82, 8]) == [[4, 5, 6]]
        assert self.rows([5, 81, 4, IMAGE, 81, 6, 7, 82]) == [[5, 6]]

    def test_without_the_second_up_to_the_end(self) -> None:
        assert self.rows([82, IMAGE, 81, 6, 7]) == [[3, 4]]

    def test_with_nothing_between_them_the_first(self) -> None:
        assert self.rows([5, IMAGE, 81, 82, 6]) == [[2]]
        assert self.rows([5, IMAGE, 6, 81]) == [[3]]

    def test_without_the_first_all_text_after_the_image(self) -> None:
        assert self.rows([5, IMAGE, 6, 82, 7]) == [[2, 3, 4]]
        assert self.rows([5, IMAGE, 81, 6, 82, 7], None) == [[2, 3, 4, 5]]

    def test_padding_does_not_count(self) -> None:
        assert self.rows([81, 82, 5, IMAGE, 6, 7], padding=2) == [[4, 5]]

    def test_a_prompt_that_ends_with_the_image_is_refused(self, model: Any) -> None:
        with pore.HAWK(6, None)(model), pytest.raises(InputError, match="ends with a visual token"):
            model(**batch([[5, *[IMAGE] * N]]))


class TestSettings:
    def test_fractions_are_rounded_up(self) -> None:
        assert pore.HAWK(0.198).kept(1000) == 198
        assert pore.HAWK(0.07).kept(100) == 8  # the product is 7.000000000000001
        assert pore.HAWK(0.001).kept(16) == 1
        assert pore.HAWK(1.0).kept(16) == 16
        assert pore.HAWK(0.2).counts(16, 3) == [4, 4, 4]
        with pytest.raises(BudgetError, match="more visual tokens"):
            pore.HAWK(17).kept(16)

    def test_the_published_weights_are_of_one_model(self, model: Any) -> None:
        assert len(QWEN25_VL_7B) == 28
        assert max(range(28), key=QWEN25_VL_7B.__getitem__) == 1
        with pore.HAWK(6)(model), pytest.raises(ScoreError, match="28 heads, but layer 0 of this"):
            model(**batch([prompt(3, 1, 5)]))

    def test_usual_takes_them_for_that_model_alone(self, model: Any) -> None:
        alike = pore.HAWK(6, None, between=None)
        assert pore.HAWK.usual(6, shape_of(model.config)) == alike
        text = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
        assert pore.HAWK.usual(6, shape_of(Qwen2_5_VLConfig(text_config=text))) == pore.HAWK(6)
        assert pore.HAWK.usual(6, shape_of(Qwen2VLConfig(text_config=text))) == alike
        assert pore.HAWK.usual(6, shape_of(Qwen2_5_VLConfig())) == alike

    def test_lists_of_a_file_are_taken(self) -> None:
        assert pore.HAWK(6, [1.0, 2.0], between=[1, 2]) == pore.HAWK(  # type: ignore[arg-type]
            6, (1.0, 2.0), between=(1, 2)
        )

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"keep": 3, "normalize": "l1"}, "normalize must be"),
            ({"keep": 3, "weights": (1.0, math.nan)}, "not all finite"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, settings: Any, words: str) -> None:
        with pytest.raises(ScoreError, match=words):
            pore.HAWK(**settings)

    def test_it_takes_no_bias(self) -> None:
        assert not pore.HAWK.reweightable
        with pytest.raises(TypeError, match="reweight"):
            pore.HAWK(3, reweight=None)  # type: ignore[call-arg]
