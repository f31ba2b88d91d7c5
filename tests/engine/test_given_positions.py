"""Positions that the caller gives are honoured in every method, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from helpers.caches import as_argument
from helpers.given import ANEW, CLOSE, IN_DECODER, IN_TOWER, ON_EMBEDDINGS, run_of
from helpers.methods import DRAWING, EVERY, KEEP, model_of, usual
from helpers.models import IMAGE, N, batch, prompt
from helpers.reference import dropped_by_stage, masked_from
from pore.errors import InputError


class TestPositions:
    @pytest.mark.parametrize("name", IN_DECODER)
    def test_gaps_are_kept(self, name: str) -> None:
        """Text after the image far away, as a caller may put it."""
        inputs = batch([prompt(4, 1, 5), prompt(4, 1, 5, 1)])
        positions = torch.arange(inputs["input_ids"].shape[1]).repeat(2, 1)
        positions[:, 4 + N :] += torch.tensor([[11], [3]])
        short, run = run_of(name, inputs, position_ids=positions)
        stages = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
        layers = model_of().model.language_model.layers
        with torch.no_grad(), masked_from(layers, stages, inputs["attention_mask"]):
            dense = model_of()(**inputs, position_ids=positions, use_cache=False).logits
        for row in range(2):
            torch.testing.assert_close(short[row], dense[row, ~stages[-1][1][row]], **CLOSE)

    @pytest.mark.parametrize("name", sorted({*ON_EMBEDDINGS, *IN_TOWER} & {*ANEW}))
    def test_what_cannot_be_numbered_anew_is_refused(self, name: str) -> None:
        inputs = batch([prompt(4, 1, 5)])
        positions = torch.arange(inputs["input_ids"].shape[1])[None].clone()
        positions[:, -3:] += 2
        with pytest.raises(InputError, match="do not count up by one"):
            run_of(name, inputs, position_ids=positions)

    @pytest.mark.parametrize("name", [*ON_EMBEDDINGS, *IN_TOWER])
    def test_an_offset_is_kept(self, name: str) -> None:
        """What enters the decoder is at the caller's positions, and so is what follows."""
        model, inputs, seen = model_of(), batch([prompt(4, 1, 5)]), []
        length = inputs["input_ids"].shape[1]
        decoder = model.model.language_model
        hook = None
        with torch.no_grad(), usual(name, KEEP)(model):
            hook = decoder.register_forward_pre_hook(
                lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
            )
            for start in (0, 40):
                cache = DynamicCache(config=model.config.text_config)
                positions = torch.arange(start, start + length)[None]
                model(**inputs, position_ids=positions, **as_argument(cache))
                new = torch.tensor([[5]])
                after = positions[:, -1:] + 1
                model(input_ids=new, position_ids=after, **as_argument(cache))
            hook.remove()
        assert torch.equal(seen[2], seen[0] + 40)
        assert torch.equal(seen[3], seen[1] + 40)

    @pytest.mark.parametrize("use_cache", [False, True])
    @pytest.mark.parametrize("name", EVERY)
    def test_prompts_in_one_row_are_refused(self, name: str, use_cache: bool) -> None:
        one, two = batch([prompt(4, 1, 5)]), batch([prompt(2, 1, 3)], seed=1)
        row = {key: torch.cat([one[key], two[key]], int(key != "pixel_values")) for key in one}
        del row["attention_mask"]
        counts = [one["input_ids"].shape[1], two["input_ids"].shape[1]]
        positions = torch.cat([torch.arange(count) for count in counts])[None]
        with pytest.raises(InputError, match="give every prompt its own row of the batch"):
            run_of(name, row, position_ids=positions, use_cache=use_cache)
        starts = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        with pytest.raises(InputError, match="give every prompt its own row of the batch"):
            run_of(name, row, cu_seq_lens_q=starts, cu_seq_lens_k=starts)

    @pytest.mark.parametrize("name", [name for name in EVERY if name not in DRAWING])
    def test_padded_questions_of_a_second_turn(self, name: str) -> None:
        """Questions of two lengths, padded on the left, at the positions that follow."""
        model, inputs = model_of(), batch([prompt(4, 1, 5), prompt(4, 1, 5, 1)])
        length, questions = inputs["input_ids"].shape[1], [[5, 6, 7], [8]]

        def ask(rows: list[int]) -> Tensor:
            ids = [[0] * (3 - len(q)) + q for q in (questions[r] for r in rows)]
            mask = torch.tensor(
                [[0] * (3 - len(questions[r])) + [1] * len(questions[r]) for r in rows]
            )
            positions = (mask.cumsum(-1) - 1).clamp(min=0) + length
            if len(rows) == 1:
                cut = 3 - len(questions[rows[0]])
                ids, mask, positions = [ids[0][cut:]], mask[:, cut:], positions[:, cut:]
            first = {key: value[rows] for key, value in inputs.items()}
            cache = DynamicCache(config=model.config.text_config)
            start = torch.arange(length).expand(len(rows), -1)
            model(**first, position_ids=start, **as_argument(cache))
            return model(
                input_ids=torch.tensor(ids),
                attention_mask=torch.cat([first["attention_mask"], mask], 1),
                position_ids=positions,
                **as_argument(cache),
            ).logits[:, -1]

        with torch.no_grad(), usual(name, KEEP)(model):
            together = ask([0, 1])
            alone = torch.cat([ask([0]), ask([1])])
        torch.testing.assert_close(together, alone, **CLOSE)
