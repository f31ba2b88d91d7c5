"""Prompts that come in pieces: `prefill_chunk_size`, one token, embeddings over one cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import pore
from cases import CASES
from cases.base import Case
from helpers.caches import as_argument
from helpers.engine import fingerprint
from helpers.families import KEEP, KINDS, PROMPTS, refusal, usual
from helpers.methods import DRAWING, EVERY, model_of
from helpers.methods import usual as in_llava
from helpers.models import IMAGE, batch, prompt, tiny_llava
from pore.errors import InputError

FAMILIES = {"LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL", "Qwen3-VL", "InternVL", "Gemma 3"}
PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in CASES
    for name in sorted(KINDS)
    if case.name in FAMILIES and refusal(case, name) is None
]


def outcome(out: Any, run: pore.Run) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Tokens, logits and what was kept."""
    return out.sequences, torch.stack(out.logits), [sample.images for sample in run.report]


class TestPrefillChunkSize:
    """A method needs the whole prompt: whatever the chunks, the answer is that in one piece."""

    settings: dict[str, Any] = {  # noqa: RUF012
        "max_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }

    @pytest.mark.parametrize(("case", "name"), PAIRS)
    def test_is_as_in_one_piece(self, case: Case, name: str) -> None:
        model, inputs, pruner = (
            case.model(),
            case.inputs(PROMPTS["ragged"]),
            usual(name, KEEP, case),
        )
        length = inputs["input_ids"].shape[1]
        with torch.no_grad(), pruner(model) as run:
            whole = model.generate(**inputs, **self.settings)
        expected, before = outcome(whole, run), fingerprint(model)
        assert not any("prefill_chunk_size" in note for note in run.report.notes)
        # Inside the image; the image and half of the question; all but the last token; all of it.
        for size in (5, length - 3, length - 1, length):
            with torch.no_grad(), pruner(model) as run:
                pieces = model.generate(**inputs, **self.settings, prefill_chunk_size=size)
            got = outcome(pieces, run)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
            assert got[2] == expected[2]
            assert sum("prefill_chunk_size" in note for note in run.report.notes) == 1
        assert fingerprint(model) == before

    @pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 2}])
    def test_with_caches_and_beams(self, options: dict[str, Any]) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5), prompt(7, 1, 2, 1)])
        settings = {**self.settings, **options}
        with torch.no_grad(), pore.FastV(keep=5)(model) as run:
            whole = model.generate(**inputs, **settings)
            pieces = model.generate(**inputs, **settings, prefill_chunk_size=4)
        assert torch.equal(pieces.sequences, whole.sequences)
        images = [sample.images for sample in run.report]
        assert images[: len(images) // 2] == images[len(images) // 2 :]

    @pytest.mark.parametrize(
        "pruner", [pore.FastV(keep=5), pore.PyramidDrop(keep=5, layers=(2, 3))], ids=repr
    )
    def test_in_a_conversation(self, pruner: Any) -> None:
        """A second image with its question, given in chunks over the cache of the first."""
        model, found = tiny_llava(), []
        first, second = batch([prompt(3, 1, 5)]), batch([prompt(2, 1, 4, 1)], seed=1)
        for chunks in ({}, {"prefill_chunk_size": 6}):
            cache = DynamicCache(config=model.config.text_config)
            with torch.no_grad(), pruner(model) as run:
                said = model.generate(**first, **self.settings, **as_argument(cache), **chunks)
                # Of the answer, the last token is not in the cache.
                new = torch.cat([said.sequences[:, -1:], second["input_ids"]], 1)
                mask = torch.ones(1, said.sequences.shape[1] + second["input_ids"].shape[1])
                out = model.generate(
                    input_ids=new,
                    attention_mask=mask.long(),
                    pixel_values=second["pixel_values"],
                    **as_argument(cache),
                    **self.settings,
                    **chunks,
                )
            found.append(outcome(out, run))
        assert torch.equal(found[0][1], found[1][1])
        assert found[0][2] == found[1][2]
        assert [len(image.kept) for images in found[1][2] for image in images] == [5, 5]


class TestOneToken:
    @pytest.mark.parametrize("cached", [False, True])
    def test_a_prompt_of_one_token_says_that_nothing_was_pruned(self, cached: bool) -> None:
        model, ids = tiny_llava(), torch.tensor([[7], [9]])
        with torch.no_grad():
            dense = model(input_ids=ids, use_cache=cached).logits
            with pore.FastV(keep=5)(model) as run:
                assert torch.equal(model(input_ids=ids, use_cache=cached).logits, dense)
        assert [sample.images for sample in run.report] == [(), ()]
        assert [sample.tokens for sample in run.report] == [(1,) * 5] * 2

    @pytest.mark.parametrize("implementation", [None, "static"])
    def test_the_answer_to_one_is_no_prompt(self, implementation: str | None) -> None:
        model = tiny_llava()
        ids = torch.tensor([[7]])
        with torch.no_grad(), pore.FastV(keep=5)(model) as run:
            model.generate(input_ids=ids, max_new_tokens=3, cache_implementation=implementation)
        assert len(run.report) == 1

    @pytest.mark.parametrize("name", [name for name in EVERY if name not in DRAWING | {"PriorTR"}])
    @pytest.mark.parametrize("before", [0, 3])
    def test_after_an_image(self, name: str, before: int) -> None:
        """A question of one token, alone and beside a longer one."""
        model, pruner = model_of(), in_llava(name, KEEP)
        prompts = [prompt(before, 1, 1), prompt(7, 1, 4, 1)]
        both = batch(prompts)
        # As `generate` counts them; DART's scores depend on it.
        positions = (both["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        alone = {"input_ids": torch.tensor([prompts[0]]), "pixel_values": both["pixel_values"][:1]}
        with torch.no_grad(), pruner(model) as run:
            logits = model(**both, position_ids=positions).logits[0, -1]
            single = model(**alone).logits[0, -1]
        first, _, again = run.report.samples
        assert [len(image.kept) + image.extra for image in again.images] == [KEEP]
        assert first.images == again.images
        torch.testing.assert_close(logits, single, rtol=1e-9, atol=1e-9)


class TestPiecesOverOneCache:
    """A caller's own pieces are turns: each with an image has its question with it."""

    def test_an_image_without_its_question_is_refused(self) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
        cache = DynamicCache(config=model.config.text_config)
        refused = pytest.raises(InputError, match="pass both in one piece")
        with torch.no_grad(), pore.FastV(keep=5)(model), refused:
            model(
                input_ids=inputs["input_ids"][:, :-5],
                pixel_values=inputs["pixel_values"],
                **as_argument(cache),
            )

    def test_a_method_that_reads_no_question_takes_it(self) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
        ids = inputs["input_ids"]
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad(), pore.DivPrune(keep=5)(model) as run:
            whole = model(**inputs).logits
            model(input_ids=ids[:, :-5], pixel_values=inputs["pixel_values"], **as_argument(cache))
            rest = model(input_ids=ids[:, -5:], **as_argument(cache)).logits
        torch.testing.assert_close(rest, whole[:, -5:], rtol=1e-9, atol=1e-9)
        assert run.report.samples[0].images == run.report.samples[1].images

    @pytest.mark.parametrize("pruner", [pore.FastV(keep=5), pore.DivPrune(keep=5)], ids=repr)
    def test_embeddings_are_marked_piece_by_piece(self, pruner: Any) -> None:
        """Text, an image with its question, and more text; as token ids, and as embeddings."""
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        visual = ids == IMAGE
        cuts = [(0, 2), (2, 21), (21, 24)]
        assert not visual[:, :2].any()
        with torch.no_grad():
            features = model.get_image_features(pixels).pooler_output[0]
            embeds = model.get_input_embeddings()(ids).masked_scatter(visual[..., None], features)
            given = [{"input_ids": ids[:, a:b]} for a, b in cuts]
            given[1]["pixel_values"] = pixels
            found = []
            for parts in (given, [{"inputs_embeds": embeds[:, a:b]} for a, b in cuts]):
                cache, logits = DynamicCache(config=model.config.text_config), []
                with pruner(model) as run:
                    for (a, b), part in zip(cuts, parts, strict=True):
                        if b != 24:  # the last piece is text, as what is not marked
                            run.mark_visual(visual[:, a:b])
                        logits.append(model(**part, **as_argument(cache)).logits)
                found.append((torch.cat(logits, 1), [sample.images for sample in run.report]))
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]
        assert [len(image.kept) for images in found[1][1] for image in images] == [5]
