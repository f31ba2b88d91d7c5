"""Logits of some tokens and a loss, asked in positions of the whole prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import pore
from cases import CASES
from cases.base import Case
from helpers.caches import as_argument
from helpers.families import KEEP as FEW
from helpers.families import PROMPTS, refusal
from helpers.families import usual as usual_of
from helpers.methods import EVERY, KEEP, model_of, usual
from helpers.models import IMAGE, N, batch, prompt
from pore.errors import InputError

PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in CASES
    for name in ("FastV", "PyramidDrop", "DivPrune", "VisionZip")
    if refusal(case, name) is None
]
RAGGED = {  # in which some positions are text of all of them
    "left": [prompt(3, 2, 5), prompt(7, 1, 2, 1), prompt(9, 0, 4, 2)],
    "right": [prompt(3, 2, 5), prompt(20, 1, 4, 1), prompt(20, 0, 20, 2)],
}


def text_rows(mask: Tensor, ids: Tensor, left: list[int], side: str) -> list[list[tuple[int, int]]]:
    """For every sample, pairs of (position in the prompt, row of what is left) of its last text."""
    found = []
    for row, (own, tokens) in enumerate(zip(mask, ids, strict=True)):
        places = own.nonzero().flatten().tolist()
        visual = [p for p in places if tokens[p] == IMAGE]
        text = [p for p in places if not visual or p > visual[-1]]
        end = left[row] if side == "right" else max(left)
        found.append([(p, end - (places[-1] - p) - 1) for p in text])
    return found


class TestLogits:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("name", EVERY)
    def test_are_those_of_the_tokens_asked_for(self, name: str, side: str) -> None:
        """One by one, in any order and from the end, by number, position or mark."""
        if name == "Random":
            pytest.skip("two forwards choose otherwise")
        model, inputs = model_of(), batch(RAGGED[side], side)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad(), usual(name, KEEP)(model) as run:
            full = model(**inputs).logits
            left = [sample.tokens[-1] for sample in run.report]
            pairs = text_rows(inputs["attention_mask"], inputs["input_ids"], left, side)
            shared = set.intersection(*({p for p, _ in row} for row in pairs))
            wanted = sorted(shared, reverse=True)
            assert wanted
            marks = torch.zeros(length, dtype=torch.bool)
            marks[wanted] = True
            asked = {
                "positions": torch.tensor(wanted),
                "from the end": torch.tensor(wanted) - length,
                "marks": marks,
            }
            if side == "left":
                asked["number"] = len(wanted)
            for what, given in asked.items():
                got = model(**inputs, logits_to_keep=given).logits
                order = wanted if what in ("positions", "from the end") else sorted(wanted)
                assert got.shape[1] == len(order)
                for row, own in enumerate(pairs):
                    rows = [dict(own)[p] for p in order]
                    torch.testing.assert_close(got[row], full[row, rows])

    @pytest.mark.parametrize("name", EVERY)
    def test_the_last_token_is_the_longest_s_own(self, name: str) -> None:
        """Padded on the right, a row that keeps fewer tokens than another ends before it."""
        if name == "Random":
            pytest.skip("two forwards choose otherwise")
        model, inputs = model_of(), batch([prompt(3, 2, 5), prompt(20, 1, 5, 1)], "right")
        with torch.no_grad(), usual(name, KEEP)(model) as run:
            full = model(**inputs).logits
            got = model(**inputs, logits_to_keep=1).logits
        longest = int(inputs["attention_mask"].sum(1).argmax())
        last = run.report.samples[longest].tokens[-1] - 1
        torch.testing.assert_close(got[longest, 0], full[longest, last])

    @pytest.mark.parametrize("name", [n for n in EVERY if n != "Random"])
    def test_a_token_that_was_dropped_has_none(self, name: str) -> None:
        model, inputs = model_of(), batch([prompt(3, 1, 5)])
        with torch.no_grad(), usual(name, KEEP)(model) as run:
            model(**inputs)
            kept = set(run.report.samples[0].images[0].kept)
            gone = 3 + next(i for i in reversed(range(N)) if i not in kept)
            for wanted in (torch.tensor([1, gone]), N + 5):
                with pytest.raises(InputError, match="a token that was dropped"):
                    model(**inputs, logits_to_keep=wanted)
            assert len(run.report) == 1
            with pytest.raises(InputError, match="positions from 0 to 23"):
                model(**inputs, logits_to_keep=torch.tensor([24]))

    @pytest.mark.parametrize("name", EVERY)
    def test_of_a_further_turn(self, name: str) -> None:
        model, inputs, turn = model_of(), batch([prompt(3, 1, 5)]), torch.tensor([[5, 6, 7, 8]])
        found = []
        for wanted in (0, torch.tensor([2, 0])):
            cache = DynamicCache(config=model.config.text_config)
            pruner = usual(name, KEEP)
            with torch.no_grad(), pruner(model):
                model(**inputs, **as_argument(cache))
                out = model(input_ids=turn, **as_argument(cache), logits_to_keep=wanted)
            found.append(out.logits)
        torch.testing.assert_close(found[1], found[0][:, [2, 0]])

    @pytest.mark.parametrize(("case", "name"), PAIRS)
    def test_in_every_family(self, case: Case, name: str) -> None:
        model, inputs = case.model(), case.inputs(PROMPTS["ragged"])
        length = inputs["input_ids"].shape[1]
        with torch.no_grad(), usual_of(name, FEW, case)(model):
            full = model(**inputs).logits
            last = model(**inputs, logits_to_keep=2).logits
            some = model(**inputs, logits_to_keep=torch.tensor([length - 1, length - 2])).logits
        assert last.shape[1] == some.shape[1] == 2
        torch.testing.assert_close(last, full[:, -2:], rtol=case.close, atol=case.close)
        torch.testing.assert_close(some, full[:, [-1, -2]], rtol=case.close, atol=case.close)


def labelled(inputs: dict[str, Tensor], ending: int = 3) -> Tensor:
    """(B, L) labels of the last tokens, -100 elsewhere."""
    labels = inputs["input_ids"].clone()
    labels[:, :-ending] = -100
    return labels.masked_fill(inputs["attention_mask"] == 0, -100)


class TestLoss:
    @pytest.mark.parametrize("name", EVERY)
    def test_is_of_the_whole_prompt_s_labels(self, name: str) -> None:
        if name == "Random":
            pytest.skip("two forwards choose otherwise")
        model, inputs = model_of(), batch([prompt(3, 2, 5), prompt(7, 1, 6, 1)])
        labels = labelled(inputs)
        with torch.no_grad(), usual(name, KEEP)(model):
            logits = model(**inputs).logits
            loss = model(**inputs, labels=labels).loss
            as_tuple = model(**inputs, labels=labels, return_dict=False)
        asked = labels[:, -3:]
        expected = nn.functional.cross_entropy(
            logits[:, -4:-1].float().flatten(0, 1), asked.flatten()
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(as_tuple[0], expected)
        torch.testing.assert_close(as_tuple[1], logits)

    @pytest.mark.parametrize(("case", "name"), PAIRS)
    def test_of_everything_is_the_model_s_own(self, case: Case, name: str) -> None:
        model, inputs = case.model(), case.inputs(PROMPTS["ragged"])
        labels = labelled(inputs, 1)
        with torch.no_grad():
            expected = model(**inputs, labels=labels).loss
            with usual_of(name, 1.0, case)(model):
                own = model(**inputs, labels=labels).loss
                # An older Llama 4 itself takes it in float64.
                torch.testing.assert_close(own, expected, check_dtype=False)
            with usual_of(name, FEW, case)(model):
                logits = model(**inputs).logits
                loss = model(**inputs, labels=labels).loss
        by_hand = nn.functional.cross_entropy(logits[:, -2].float(), labels[:, -1])
        torch.testing.assert_close(loss, by_hand)

    @pytest.mark.parametrize("name", [n for n in EVERY if n != "Random"])
    def test_a_label_that_nothing_says_is_refused(self, name: str) -> None:
        """The first word after the image, where its last visual token was dropped."""
        model, inputs = model_of(), batch([prompt(3, 1, 5)])
        with torch.no_grad(), usual(name, KEEP)(model) as run:
            model(**inputs)
            kept = set(run.report.samples[0].images[0].kept)
            gone = 3 + next(i for i in reversed(range(N)) if i not in kept)
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[0, gone + 1] = 5
            with pytest.raises(InputError, match="follows a token that was dropped"):
                model(**inputs, labels=labels)

    def test_without_images_it_is_untouched(self) -> None:
        model, inputs = model_of(), batch([prompt(9, 0, 3)])
        labels = labelled(inputs)
        with torch.no_grad():
            expected = model(**inputs, labels=labels).loss
            with pore.FastV(KEEP)(model):
                assert torch.equal(model(**inputs, labels=labels).loss, expected)

    def test_with_some_logits_alone_is_refused(self) -> None:
        model, inputs = model_of(), batch([prompt(3, 1, 5)])
        with (
            pore.FastV(KEEP)(model),
            pytest.raises(InputError, match="A loss needs all tokens"),
        ):
            model(**inputs, labels=labelled(inputs), logits_to_keep=2)

    @pytest.mark.parametrize("name", ["FastV", "DivPrune", "VisionZip"])
    def test_arguments_by_place(self, name: str) -> None:
        model, inputs = model_of(), batch([prompt(3, 1, 5)])
        with torch.no_grad(), usual(name, KEEP)(model):
            expected = model(**inputs).logits
            got = model(
                inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
            ).logits
        assert torch.equal(got, expected)


def arguments() -> dict[str, dict[str, Any]]:
    return {
        "return_dict": {"return_dict": False},
        "hidden states": {"output_hidden_states": True},
        "no cache": {"use_cache": False},
    }


@pytest.mark.parametrize("what", arguments())
@pytest.mark.parametrize("name", [n for n in EVERY if n != "Random"])
def test_other_arguments_change_no_logits(name: str, what: str) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    with torch.no_grad(), usual(name, KEEP)(model):
        expected = model(**inputs).logits
        out = model(**inputs, **arguments()[what])
    assert torch.equal(out[0] if isinstance(out, tuple) else out.logits, expected)
