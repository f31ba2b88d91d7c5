"""Turns over one cache, and candidates of an assistant: what was dropped stays dropped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import pore
from cases import CASES
from cases.base import TEXT, Case, since
from cases.mistral3 import Mistral4
from helpers.caches import as_argument
from helpers.conversations import positions
from helpers.families import KEEP, PROMPTS, forward, hidden_from
from helpers.recording import Recording
from pore.engine.pruner import Pruner
from pore.errors import ModelStateError, UnsupportedModelError

BY_NAME = {case.name: case for case in CASES}


ON_EMBEDDINGS = pore.DivPrune(keep=KEEP)


IN_DECODER = pore.FastV(keep=KEEP)


ANSWER = 4


FIRST, SECOND = PROMPTS["ragged"], [[9, 10, 11], [12, 13, 14]]


def families(*names: str) -> Any:
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names], ids=lambda c: c.name)


def settings(case: Case) -> dict[str, Any]:
    words = range(case.model().config.get_text_config().vocab_size)
    return {
        "max_new_tokens": ANSWER,
        "do_sample": False,
        "suppress_tokens": sorted(set(words) - set(TEXT)),
        "output_logits": True,
        "return_dict_in_generate": True,
    }


@families(
    "LLaVA-NeXT",
    "Qwen2.5-VL",
    "Qwen3-VL",
    "Qwen3.5",
    "GLM-4V",
    "InternVL",
    "SmolVLM",
    "Mistral 3",
    "Gemma 4",
)
class TestTurns:
    """A question is asked once the first is answered, by `generate` over the same cache."""

    def talk(self, case: Case, pruner: Pruner, whole: bool) -> tuple[pore.Run, Any]:
        """Two answers; the second turn is given the whole conversation, or what is new in it."""
        model, inputs = case.model(), case.inputs(FIRST)
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad(), pruner(model) as run:
            said = model.generate(**inputs, **settings(case), **as_argument(cache)).sequences
            ids = torch.cat([said, torch.tensor(SECOND)], 1)
            mask = inputs["attention_mask"]
            mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            if whole:
                more = {"input_ids": ids, **case.extra(ids, mask)}
            else:  # of the answer, the last token is not in the cache
                more = {"input_ids": ids[:, said.shape[1] - 1 :]}
            more["attention_mask"] = mask
            out = model.generate(**more, **settings(case), **as_argument(cache))
        out.sequences = torch.cat([ids, out.sequences[:, -ANSWER:]], 1)
        return run, out

    @pytest.mark.parametrize(
        ("pruner", "whole"),
        [(IN_DECODER, True), (IN_DECODER, False), (ON_EMBEDDINGS, False)],
        ids=["in the decoder, whole", "in the decoder, new", "on the embeddings, new"],
    )
    def test_what_was_dropped_stays_dropped(self, case: Case, pruner: Pruner, whole: bool) -> None:
        recording = Recording(pruner)
        run, out = self.talk(case, recording, whole)
        assert len(run.report) == len(FIRST)  # the second turn brings no image
        recording.replays = True
        inputs, ids = case.inputs(FIRST), out.sequences[:, :-1]
        mask = inputs["attention_mask"]
        mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        full = {**inputs, "input_ids": ids, "attention_mask": mask, **case.extra(ids, mask)}
        with recording(case.model()):
            logits = forward(case, full, use_cache=False)[:, -ANSWER:]
        got = torch.stack(out.logits, 1)
        torch.testing.assert_close(got, logits.float(), rtol=case.close, atol=case.close)

    def test_generate_cuts_by_a_cache_that_is_too_short(self, case: Case) -> None:
        with pytest.raises(ModelStateError, match="give only the tokens that are not in it yet"):
            self.talk(case, ON_EMBEDDINGS, whole=True)


@families("LLaVA-NeXT", "Qwen2.5-VL", "Qwen3-VL", "InternVL", "Gemma 4")
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_a_second_image_is_pruned_for_itself(case: Case, layer: int) -> None:
    model, turns = case.model(), [[5, -1, 6, 7], [8, -2, 9, 10], [11, 12]]
    whole = [[token for turn in turns for token in turn]]
    both = case.inputs(whole)
    everywhere = positions(case, {k: v for k, v in both.items() if k != "pixel_values"})
    cache = DynamicCache(config=model.config.get_text_config())
    logits, start = [], 0
    with torch.no_grad(), pore.FastV(KEEP, layer=layer)(model) as run:
        for turn in turns:
            inputs = case.inputs([turn])
            del inputs["attention_mask"]
            end = start + inputs["input_ids"].shape[1]
            inputs["position_ids"] = everywhere[..., start:end]
            logits.append(model(**inputs, **as_argument(cache)).logits[0])
            start = end
    assert [len(image.kept) for sample in run.report for image in sample.images] == [KEEP, KEEP]
    # The report has a sample for each turn with an image; here both are of one.
    visual, first = case.visual(whole), len(case.row(turns[0]))
    parts = (visual.clone(), visual.clone())
    parts[0][:, first:], parts[1][:, :first] = False, False
    hidden = torch.zeros_like(visual)
    for sample, part in zip(run.report, parts, strict=True):
        kept = set(sample.images[0].kept)
        columns = part[0].nonzero().flatten().tolist()
        hidden[0, [c for i, c in enumerate(columns) if i not in kept]] = True
    tokens = torch.ones_like(visual)
    with hidden_from(case, [(layer, hidden)], tokens):
        dense = forward(case, both, use_cache=False)
    expected = dense[0, ~hidden[0]]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=case.close, atol=case.close)


@families("LLaVA-1.5", "Qwen2.5-VL", "Qwen3.5", "Gemma 3")
@pytest.mark.parametrize("pruner", [IN_DECODER, ON_EMBEDDINGS], ids=["decoder", "embeddings"])
class TestCachesFromElsewhere:
    def begin(self, case: Case) -> Any:
        model = case.model()
        cache = DynamicCache(config=model.config.get_text_config())
        model(**case.inputs([[5, -1, 6, 7]]), **as_argument(cache))
        return cache

    def go_on(self, case: Case, cache: Any, turn: list[int]) -> Tensor:
        ids = torch.tensor([turn])
        more = {k: v for k, v in case.extra(ids, torch.ones_like(ids)).items() if "mm" not in k}
        logits: Tensor = case.model()(input_ids=ids, **as_argument(cache), **more).logits
        return logits

    def test_a_copy_knows_what_was_dropped(self, case: Case, pruner: Pruner) -> None:
        """Several questions about one image, each over a copy of its cache."""
        if case.name == "Gemma 3" and pruner is IN_DECODER and not since("5.20"):
            pytest.skip("older ones make masks of a further turn for the wrong layer")
        questions = [[9, 10, 11], [12, 13, 14, 15]]
        with torch.no_grad():
            expected = []
            for question in questions:
                with pruner(case.model()):
                    cache = self.begin(case)
                    self.go_on(case, cache, [16, 17])
                    expected.append(self.go_on(case, cache, question))
            with pruner(case.model()):
                cache = self.begin(case)
                copies = [copy.deepcopy(cache) for _ in questions]
                for one, question, answer in zip(copies, questions, expected, strict=True):
                    self.go_on(case, one, [16, 17])
                    assert torch.equal(self.go_on(case, one, question), answer)

    def test_a_cache_of_the_unpruned_model_has_everything(self, case: Case, pruner: Pruner) -> None:
        with torch.no_grad():
            expected = self.go_on(case, self.begin(case), [9, 10, 11])
            cache = self.begin(case)
            with pruner(case.model()):
                assert torch.equal(self.go_on(case, cache, [9, 10, 11]), expected)


@families("LLaVA-1.5", "Qwen2.5-VL", "InternVL")
def test_a_question_is_taken_back(case: Case) -> None:
    """Cropped to the end of the image, the next question is as the first; farther is refused."""
    elsewhere = TestCachesFromElsewhere()
    with torch.no_grad(), IN_DECODER(case.model()):
        expected = elsewhere.go_on(case, elsewhere.begin(case), [9, 10, 11])
        cache = elsewhere.begin(case)
        elsewhere.go_on(case, cache, [16, 17])
        cache.crop(-2)
        assert torch.equal(elsewhere.go_on(case, cache, [9, 10, 11]), expected)
        with pytest.raises(ModelStateError, match="no further back than the end of the image"):
            cache.crop(-(3 + len([6, 7]) + len(case.image_ids(0)) - 1))
        cache.crop(-3)  # nothing was lost
        assert torch.equal(elsewhere.go_on(case, cache, [9, 10, 11]), expected)


@families("LLaVA-1.5", "Qwen2.5-VL", "Gemma 3", "Qwen3.5")
@pytest.mark.parametrize(
    ("pruner", "other"),
    [(IN_DECODER, ON_EMBEDDINGS), (ON_EMBEDDINGS, IN_DECODER), (IN_DECODER, pore.FastV(KEEP + 1))],
    ids=["decoder", "embeddings", "settings"],
)
class TestBlocks:
    def test_a_conversation_goes_on_in_a_block_of_the_same(
        self, case: Case, pruner: Pruner, other: Pruner
    ) -> None:
        if case.name == "Gemma 3" and pruner is not ON_EMBEDDINGS and not since("5.20"):
            pytest.skip("older ones make masks of a further turn for the wrong layer")
        elsewhere = TestCachesFromElsewhere()
        with torch.no_grad():
            with pruner(case.model()):
                cache = elsewhere.begin(case)
                expected = elsewhere.go_on(case, cache, [9, 10, 11])
            with pruner(case.model()):
                cache = elsewhere.begin(case)
            with copy.copy(pruner)(case.model()):
                assert torch.equal(elsewhere.go_on(case, cache, [9, 10, 11]), expected)

    def test_other_blocks_and_none_refuse_it(
        self, case: Case, pruner: Pruner, other: Pruner
    ) -> None:
        if case.name == "Gemma 3" and pruner is not ON_EMBEDDINGS and not since("5.20"):
            pytest.skip("older ones make masks of a further turn for the wrong layer")
        elsewhere = TestCachesFromElsewhere()
        with torch.no_grad():
            with pruner(case.model()):
                cache = elsewhere.begin(case)
                expected = elsewhere.go_on(case, copy.deepcopy(cache), [9, 10, 11])
            with other(case.model()), pytest.raises(ModelStateError, match="in another block"):
                elsewhere.go_on(case, cache, [9, 10, 11])
            with pytest.raises(ModelStateError, match="the model is not pruned now"):
                elsewhere.go_on(case, cache, [9, 10, 11])
            with pruner(case.model()):  # nothing was lost
                assert torch.equal(elsewhere.go_on(case, cache, [9, 10, 11]), expected)


@pytest.mark.parametrize("pruner", [IN_DECODER, ON_EMBEDDINGS], ids=["decoder", "embeddings"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "Qwen3.5"], ids=lambda c: c.name)
def test_an_assistant_takes_rejected_tokens_back(case: Case, pruner: Pruner) -> None:
    model, inputs = case.model(), case.inputs([[5, -1, 7, 8]])
    options = {"max_new_tokens": 12, "do_sample": False}
    with torch.no_grad(), pruner(model) as run:
        expected = model.generate(**inputs, **options)
        got = model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(got, expected)
    plain, assisted = run.report.samples  # drafts are no prompts
    assert plain.tokens == assisted.tokens


def test_latent_states_are_no_keys_to_look_ahead_with() -> None:
    """PyramidDrop looks at its layer before it runs; Mistral 4's cache holds no keys for that."""
    case = Mistral4()
    model, inputs = case.model(), case.inputs([FIRST[0]])
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), pore.PyramidDrop(keep=KEEP, layers=(1, 3))(model) as run:
        model(**inputs, **as_argument(cache))
        assert [len(image.kept) for image in run.report.samples[0].images] == [KEEP]
        inputs["attention_mask"] = torch.ones(1, 2 * inputs["input_ids"].shape[1])
        with pytest.raises(UnsupportedModelError, match="latent states in place of keys"):
            model(**inputs, **as_argument(cache))
