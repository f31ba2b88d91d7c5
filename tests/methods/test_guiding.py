"""What a small model looked at while it answered, against eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pore
from helpers.engine import fingerprint
from helpers.guiding import CLOSE, PROMPTS, STEPS, alone, with_attention
from helpers.models import IMAGE, N, batch, prompt
from pore.errors import InputError, ModelStateError, ScoreError
from pore.layout import Image, Layout
from pore.methods import guiding


class TestGuide:
    @pytest.mark.parametrize("row", [0, 2])
    def test_importance_is_that_of_eager_attention(
        self, small: Any, guide: pore.Guide, row: int
    ) -> None:
        """Sums over layers, heads and rows: from the last visual token to the last token fed."""
        one = alone(PROMPTS, batch(PROMPTS), row)
        answer = guide.sequences[row : row + 1]
        full = {**one, "input_ids": torch.cat([one["input_ids"], answer[:, :-1]], 1)}
        out = with_attention(small, "eager")(**full, output_attentions=True, use_cache=False)
        visual = one["input_ids"][0] == IMAGE
        start = int(visual.nonzero().max())
        expected = sum(weights[0, :, start:].sum((0, 1)) for weights in out.attentions)
        expected = expected[: len(visual)][visual]
        got = torch.cat(
            [v for v, i in zip(guide.importance, guide.images, strict=True) if i.row == row]
        )
        # Eager attention takes its softmax in float32.
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-7)

    @pytest.mark.parametrize("attention", ["sdpa", "flash_test"])
    def test_batch_equals_singles(self, small: Any, attention: str) -> None:
        model, inputs = with_attention(small, attention), batch(PROMPTS)
        together = pore.guide(model, inputs, max_new_tokens=STEPS)
        assert len(together) == 3
        for row in range(3):
            one = pore.guide(model, alone(PROMPTS, inputs, row), max_new_tokens=STEPS)
            part = together.select([row])
            assert len(part.images) == len(one.images)
            torch.testing.assert_close(
                part.importance, one.importance, **CLOSE, check_dtype=len(one.images) > 0
            )
            assert torch.equal(part.sequences, one.sequences)
            torch.testing.assert_close(part.confidence, one.confidence)

    def test_answers_that_end_early(self, small: Any, guide: pore.Guide) -> None:
        """What is generated after the end of a shorter answer counts for nothing."""
        model, inputs = with_attention(small, "sdpa"), batch(PROMPTS)
        end = int(guide.sequences[0, 1])
        assert end not in guide.sequences[2]
        model.generation_config.eos_token_id = [end, 95]
        together = pore.guide(model, inputs, max_new_tokens=STEPS)
        assert together.answered[0].tolist() == [True, True, False, False]
        assert together.answered[2].all()
        for row in range(3):
            one = pore.guide(model, alone(PROMPTS, inputs, row), max_new_tokens=STEPS)
            part = together.select([row]).importance
            torch.testing.assert_close(part.double(), one.importance.double(), **CLOSE)
            torch.testing.assert_close(together.confidence[row], one.confidence[0])
            got = pore.consistency(model, inputs, together, keep=3)[row]
            alone_got = pore.consistency(model, alone(PROMPTS, inputs, row), one, keep=3)[0]
            torch.testing.assert_close(got, alone_got, **CLOSE)
        assert together.importance[0].sum() < guide.importance[0].sum()

    def test_confidence_is_a_geometric_mean(self, small: Any, guide: pore.Guide) -> None:
        out = small.generate(
            **batch(PROMPTS),
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences[:, -STEPS:], guide.sequences)
        greatest = torch.stack(out.logits, 1).softmax(-1).amax(-1)
        torch.testing.assert_close(guide.confidence, greatest.prod(1) ** (1 / STEPS))

    def test_a_static_cache_and_settings_of_the_model(self, small: Any, guide: pore.Guide) -> None:
        """It is greedy whatever the model's own settings are."""
        model = with_attention(small, "sdpa")
        model.generation_config.update(
            cache_implementation="static", num_beams=2, do_sample=True, return_dict_in_generate=True
        )
        got = pore.guide(model, batch(PROMPTS), max_new_tokens=STEPS)
        torch.testing.assert_close(got.importance, guide.importance, **CLOSE)
        assert torch.equal(got.sequences, guide.sequences)

    def test_many_rows_are_taken_in_parts(self, small: Any, monkeypatch: Any) -> None:
        inputs = batch([prompt(2, 1, 20), prompt(2, 1, 3, 1)])
        whole = pore.guide(small, inputs, max_new_tokens=2)
        monkeypatch.setattr(guiding, "_ROWS", 3)
        parts = pore.guide(small, inputs, max_new_tokens=2)
        torch.testing.assert_close(parts.importance, whole.importance, **CLOSE)

    def test_prompts_given_as_embeddings(self, small: Any, guide: pore.Guide) -> None:
        inputs = batch(PROMPTS)
        visual = inputs["input_ids"] == IMAGE
        embeds = small.get_input_embeddings()(inputs["input_ids"]).detach()
        features = small.get_image_features(inputs["pixel_values"]).pooler_output
        embeds[visual] = torch.cat(list(features)).detach()
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        got = pore.guide(small, given, max_new_tokens=STEPS, visual=visual)
        assert torch.equal(got.sequences, guide.sequences)
        torch.testing.assert_close(got.importance, guide.importance, **CLOSE)
        torch.testing.assert_close(
            pore.consistency(small, given, got, keep=4),
            pore.consistency(small, inputs, guide, keep=4),
            **CLOSE,
        )
        with pytest.raises(InputError, match="visual=mask"):
            pore.guide(small, given, max_new_tokens=STEPS)

    def test_prompts_without_image(self, small: Any, large: Any) -> None:
        inputs = batch([prompt(5, 0, 3)])
        got = pore.guide(small, inputs, max_new_tokens=2)
        assert got.importance.shape == (0, 0)
        dense = large(**inputs).logits
        with pore.SGL(4, layer=2, guide=got)(large):
            assert torch.equal(large(**inputs).logits, dense)
        answered = pore.consistency(small, inputs, got)
        torch.testing.assert_close(answered, got.confidence.double() ** 2, rtol=1e-6, atol=0.0)

    def test_a_prompt_that_ends_with_its_image(self, small: Any) -> None:
        """The last visual token's own row is among those summed, so there is one."""
        inputs = batch([[5, 6, *[IMAGE] * N]])
        got = pore.guide(small, inputs, max_new_tokens=1).importance
        assert bool((got > 0).all())
        assert got.sum() < 3 * 4  # at most one row of 4 heads in 3 layers

    def test_leaves_the_model_as_it_was(self, small: Any) -> None:
        before, inputs = fingerprint(small), batch(PROMPTS)
        made = pore.guide(small, inputs, max_new_tokens=2)
        pore.consistency(small, inputs, made, keep=2)
        assert fingerprint(small) == before

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = small.model.language_model.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            pore.guide(small, inputs, max_new_tokens=2)
        hook.remove()
        assert fingerprint(small) == before

    def test_refusals(self, small: Any) -> None:
        with pytest.raises(InputError, match="pad on the left"):
            pore.guide(small, batch(PROMPTS, "right"), max_new_tokens=2)
        with pore.FastV(4)(small), pytest.raises(ModelStateError, match="already pruned"):
            pore.guide(small, batch(PROMPTS), max_new_tokens=2)
        broken = with_attention(small, "sdpa")
        broken.model.language_model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
        with pytest.raises(ScoreError, match="NaN or infinity"):
            pore.guide(broken, batch(PROMPTS), max_new_tokens=2)


class TestSelectAndMatch:
    def layout(self, counts: list[int], copies: int = 1) -> Layout:
        images = [
            Image(row * copies + copy, index, range(index * 9, index * 9 + 4 + index))
            for row, count in enumerate(counts)
            for copy in range(copies)
            for index in range(count)
        ]
        return Layout.of(images, torch.ones(len(counts) * copies, 40, dtype=torch.bool))

    def guide(self, counts: list[int]) -> pore.Guide:
        images, rows = self.layout(counts).images, len(counts)
        importance = torch.arange(len(images))[:, None].expand(-1, 8).double()
        return pore.Guide(
            images=images,
            importance=importance,
            valid=torch.ones_like(importance, dtype=torch.bool),
            sequences=torch.arange(rows)[:, None],
            answered=torch.ones(rows, 1, dtype=torch.bool),
            confidence=torch.linspace(0, 1, rows),
            provenance=pore.Provenance(),
        )

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 3), st.data())
    def test_repeated_samples_find_their_images(
        self, counts: list[int], copies: int, data: Any
    ) -> None:
        guide = self.guide(counts)
        chosen = data.draw(st.permutations(range(len(counts))))
        part = guide.select(chosen)
        assert part.sequences[:, 0].tolist() == chosen
        which = part.match(self.layout([counts[i] for i in chosen], copies))
        numbers = part.importance[which, 0].tolist() if which else []
        rows = [guide.images[int(number)].row for number in numbers]
        expected = [i for i in chosen for _ in range(copies * counts[i])]
        assert rows == expected

    @given(
        st.lists(st.integers(0, 3), min_size=1, max_size=4),
        st.lists(st.integers(0, 3), min_size=1, max_size=4),
    )
    def test_other_images_are_refused(self, here: list[int], there: list[int]) -> None:
        guide = self.guide(here)
        copies = max(len(there) // len(here), 1)
        if there == [count for count in here for _ in range(copies)]:
            guide.match(self.layout(there))
        else:
            with pytest.raises(InputError, match="same batch of prompts"):
                guide.match(self.layout(there))

    def test_no_such_sample(self) -> None:
        with pytest.raises(InputError, match="0 to 1"):
            self.guide([1, 1]).select([2])
