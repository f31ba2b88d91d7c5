"""Masks that the caller gives are honoured in every method, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cases.base import Case
from helpers.caches import as_argument
from helpers.families import KEEP as FEW
from helpers.families import PROMPTS, forward
from helpers.families import usual as usual_of
from helpers.given import (
    CLOSE,
    IN_DECODER,
    IN_TOWER,
    ON_EMBEDDINGS,
    OTHER,
    additive,
    columns_kept,
    run_of,
    triangle,
)
from helpers.methods import DRAWING, EVERY, KEEP, ends, model_of, usual
from helpers.models import IMAGE, N, batch, prompt
from helpers.reference import dropped_by_stage
from pore.errors import InputError, PoreError, ScoreError
from pore.families.registry import family_of


class TestMasks:
    """4-D masks are read at the rows and columns that are left."""

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("form", ["bool", "additive"])
    @pytest.mark.parametrize("name", [name for name in EVERY if name not in DRAWING])
    def test_a_causal_one_is_as_none(self, name: str, form: str, side: str) -> None:
        inputs = batch([prompt(3, 2, 5), prompt(7, 1, 2, 1)], side)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        expected, run = run_of(name, inputs, position_ids=positions)
        mask = triangle(inputs["attention_mask"])
        mask = mask if form == "bool" else additive(mask)
        # Padding is told by nothing else, so let it be seen by nobody.
        given = dict(inputs, attention_mask=mask)
        if bool((inputs["attention_mask"] == 0).any()):
            given["attention_mask"] = mask.masked_fill(
                (inputs["attention_mask"] == 0)[:, None, None],
                False if form == "bool" else torch.finfo(torch.float64).min,
            )
        got, other = run_of(name, given, position_ids=positions)
        assert [s.images for s in run.report] == [s.images for s in other.report]
        tokens = [sample.tokens[-1] for sample in run.report]
        kept = inputs["attention_mask"]
        for a, b in zip(ends(got, kept, tokens), ends(expected, kept, tokens), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    def blind(self, inputs: Any) -> Tensor:
        """Text of the end does not see the first token, nor the one before the last image."""
        mask = triangle(inputs["attention_mask"])
        mask[:, :, -3:, 0] = False
        mask[:, :, -1, 2] = False
        return mask

    @pytest.mark.parametrize("name", IN_DECODER)
    def test_inside_the_decoder(self, name: str) -> None:
        inputs = batch([prompt(4, 1, 5), prompt(4, 1, 5, 1)])
        mask = self.blind(inputs)
        short, run = run_of(name, dict(inputs, attention_mask=mask))
        plain, _ = run_of(name, inputs)
        assert not torch.allclose(short[:, -1], plain[:, -1])
        stages = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
        with torch.no_grad(), hidden_too(stages, mask):
            dense = model_of()(**dict(inputs, attention_mask=mask), use_cache=False).logits
        kept = ~stages[-1][1]
        for row in range(2):
            torch.testing.assert_close(short[row], dense[row, kept[row]], **CLOSE)

    @pytest.mark.parametrize("name", [n for n in ON_EMBEDDINGS + IN_TOWER if n not in DRAWING])
    def test_before_the_decoder(self, name: str) -> None:
        """The decoder by itself, given the embeddings and the part of the mask that are left."""
        model, inputs = model_of(), batch([prompt(4, 1, 5), prompt(4, 1, 5, 1)])
        mask, seen = self.blind(inputs), {}
        decoder = model.model.language_model

        def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)

        with torch.no_grad(), usual(name, KEEP)(model) as run:
            hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
            logits = model(**dict(inputs, attention_mask=mask), use_cache=False).logits
            hook.remove()
        kept = [
            [c for c in columns if c not in range(4, 4 + N)]
            for columns in columns_kept(run, inputs)
        ]
        # Text sees the text that the mask shows it, and all visual tokens that are left.
        for row, text in enumerate(kept):
            left = [*text[:4], *range(4, 4 + KEEP), *text[4:]]
            part = mask[row : row + 1][:, :, left][..., left]
            with torch.no_grad():
                out = decoder(
                    inputs_embeds=seen["inputs_embeds"][row : row + 1],
                    attention_mask=part,
                    position_ids=seen["position_ids"][row : row + 1],
                    use_cache=False,
                )
                expected = model.lm_head(out.last_hidden_state)
            torch.testing.assert_close(logits[row], expected[0], **CLOSE)

    @pytest.mark.parametrize("name", [name for name in EVERY if name not in DRAWING])
    def test_over_a_cache(self, name: str) -> None:
        """A further turn that must not see some of the text before it, as in one forward."""
        model, inputs = model_of(), batch([prompt(4, 1, 3)])
        turn = torch.tensor([[5, 6, 7]])
        length = inputs["input_ids"].shape[1]
        whole = dict(inputs, input_ids=torch.cat([inputs["input_ids"], turn], 1))
        mask = triangle(torch.ones(1, length + 3))
        mask[:, :, length:, 1] = False
        mask[:, :, -1, length] = False
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad(), usual(name, KEEP)(model):
            model(**inputs, **as_argument(cache))
            got = model(
                input_ids=turn, attention_mask=mask[:, :, length:], **as_argument(cache)
            ).logits
            bent = DynamicCache(config=model.config.text_config)
            model(**inputs, **as_argument(bent))
            plain = model(input_ids=turn, **as_argument(bent)).logits
            one = [  # token by token
                model(
                    input_ids=turn[:, i : i + 1],
                    attention_mask=mask[:, :, length + i : length + i + 1, : length + i + 1],
                    **as_argument(again),
                ).logits
                for again in [self.begun(inputs)]
                for i in range(3)
            ]
        assert not torch.allclose(got, plain)
        torch.testing.assert_close(torch.cat(one, 1), got, **CLOSE)
        if name in IN_DECODER:
            _, run = run_of(name, inputs)
            dropped = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
            stages = [(k, nn.functional.pad(gone, (0, 3))) for k, gone in dropped]
            with torch.no_grad(), hidden_too(stages, mask):
                dense = model(**dict(whole, attention_mask=mask), use_cache=False).logits
            torch.testing.assert_close(got, dense[:, -3:], **CLOSE)

    def begun(self, inputs: Any) -> Any:
        cache = DynamicCache(config=model_of().config.text_config)
        model_of()(**inputs, **as_argument(cache))
        return cache

    def test_one_of_another_size_is_refused(self) -> None:
        inputs = batch([prompt(4, 1, 5)])
        for name in ("FastV", "DivPrune", "VisionZip"):
            mask = triangle(inputs["attention_mask"])[..., :-1]
            with pytest.raises(InputError, match="which of all 25 tokens so far"):
                run_of(name, dict(inputs, attention_mask=mask))

    @pytest.mark.parametrize("name", [n for n in IN_DECODER if usual(n, KEEP).reweightable])
    def test_an_image_that_no_text_sees_has_no_scores(self, name: str) -> None:
        """As where a mask keeps two prompts of a row apart."""
        inputs = batch([prompt(4, 2, 5)])
        mask = triangle(inputs["attention_mask"])
        mask[:, :, 4 + N :, : 4 + N] = False
        with pytest.raises(ScoreError, match="hides image 0 of sample 0"):
            run_of(name, dict(inputs, attention_mask=mask))


def hidden_too(stages: Any, mask: Tensor) -> Any:
    """`masked_from`, where every layer sees what a mask of the caller shows."""
    layers = model_of().model.language_model.layers
    return _Hidden(layers, stages, mask)


class _Hidden:
    def __init__(self, layers: Any, stages: Any, mask: Tensor) -> None:
        self.layers, self.stages, self.mask = layers, stages, mask

    def __enter__(self) -> None:
        def hook(i: int) -> Any:
            def hide(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
                seen = self.mask.clone()
                for first, dropped in self.stages:
                    if i >= first:
                        seen = seen & ~dropped[:, None, None]
                seen = seen | torch.eye(seen.shape[-1], dtype=torch.bool)
                return args, {**kwargs, "attention_mask": seen}

            return hide

        self.hooks = [
            layer.register_forward_pre_hook(hook(i), with_kwargs=True)
            for i, layer in enumerate(self.layers)
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(("case", "name"), OTHER)
class TestFamilies:
    """What is not of the methods alone, in every family."""

    def test_a_causal_mask(self, case: Case, name: str) -> None:
        model, inputs = case.model(), case.inputs(PROMPTS["single"])
        mask = triangle(torch.ones_like(inputs["attention_mask"]))
        plain, masked = forward(case, inputs), self.given(case, inputs, mask)
        if not torch.allclose(plain, masked, rtol=case.close, atol=case.close):
            pytest.skip("the mask takes the place of a sliding window, or of one that shows images")
        with torch.no_grad(), usual_of(name, FEW, case)(model):
            expected = forward(case, inputs)
            got = self.given(case, inputs, mask)
        torch.testing.assert_close(got, expected, rtol=case.close, atol=case.close)

    def given(self, case: Case, inputs: Any, mask: Tensor) -> Tensor:
        family, more = family_of(case.model()), {}
        if not family.mrope:
            more["position_ids"] = torch.arange(mask.shape[-1])[None] + family.first_position
        else:
            more["position_ids"] = case.model().model.get_rope_index(
                **{k: v for k, v in inputs.items() if k != "pixel_values"}
            )[0]
        with torch.no_grad():
            logits: Tensor = case.model()(**dict(inputs, attention_mask=mask), **more).logits
        return logits

    def test_prompts_in_one_row(self, case: Case, name: str) -> None:
        model, inputs = case.model(), case.inputs(PROMPTS["single"])
        length = inputs["input_ids"].shape[1]
        positions = torch.cat([torch.arange(length - 2), torch.arange(2)])[None]
        if family_of(model).mrope:
            positions = positions.expand(4, 1, -1)
        del inputs["attention_mask"]
        with torch.no_grad(), usual_of(name, FEW, case)(model), pytest.raises(PoreError) as error:
            model(**inputs, position_ids=positions)
        assert "its own row of the batch" in str(error.value)
