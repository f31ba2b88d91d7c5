"""What the caller gives beside tokens and pixels is honoured in every method, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import pore
from cases import CASES
from cases.base import Case
from helpers.engine import tolerance
from helpers.families import KEEP as FEW
from helpers.families import PROMPTS, forward, refusal
from helpers.families import usual as usual_of
from helpers.methods import DRAWING, EVERY, KEEP, LAYERS, ends, in_decoder, model_of, usual
from helpers.models import IMAGE, N, batch, prompt
from helpers.reference import dropped_by_stage, masked_from
from pore.engine.stages import Stage
from pore.errors import BudgetError, InputError, PoreError, ScoreError
from pore.families.registry import family_of

CLOSE = tolerance("sdpa")
IN_DECODER = [name for name in EVERY if in_decoder(usual(name, KEEP))]
IN_TOWER = [name for name in EVERY if usual(name, KEEP).tower_stage is not None]
ELSEWHERE = [name for name in EVERY if name not in IN_TOWER]
ON_EMBEDDINGS = [
    name
    for name in ELSEWHERE
    if all(stage.layer == 0 for stage in usual(name, KEEP).stages() if isinstance(stage, Stage))
]
ANEW = [  # positions of what is left are numbered anew
    name
    for name in EVERY
    if any(not isinstance(stage, Stage) or stage.dense for stage in usual(name, KEEP).stages())
]


def triangle(mask: Tensor) -> Tensor:
    """(B, 1, L, L) the causal mask of a 2-D one; padding sees itself."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None]
    return (seen | torch.eye(length, dtype=torch.bool))[:, None]


def additive(mask: Tensor) -> Tensor:
    low = torch.finfo(torch.float64).min
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)


def run_of(name: str, inputs: Any, keep: float = KEEP, **more: Any) -> tuple[Tensor, pore.Run]:
    with torch.no_grad(), usual(name, keep)(model_of()) as run:
        return model_of()(**inputs, **more).logits, run


def columns_kept(run: pore.Run, inputs: Any) -> list[list[int]]:
    """For each sample, the columns that are left, of methods that merge nothing."""
    found = []
    for sample, ids, mask in zip(
        run.report, inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        visual = (ids == IMAGE).nonzero().flatten().tolist()
        kept = {
            visual[N * image.image + raster] for image in sample.images for raster in image.kept
        }
        tokens = mask.nonzero().flatten().tolist()
        found.append([c for c in tokens if c in kept or c not in visual])
    return found


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
            model(**inputs, past_key_values=cache)
            got = model(
                input_ids=turn, attention_mask=mask[:, :, length:], past_key_values=cache
            ).logits
            bent = DynamicCache(config=model.config.text_config)
            model(**inputs, past_key_values=bent)
            plain = model(input_ids=turn, past_key_values=bent).logits
            one = [  # token by token
                model(
                    input_ids=turn[:, i : i + 1],
                    attention_mask=mask[:, :, length + i : length + i + 1, : length + i + 1],
                    past_key_values=again,
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
        model_of()(**inputs, past_key_values=cache)
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

    @pytest.mark.parametrize("name", sorted({*ON_EMBEDDINGS, *IN_TOWER} - {"G-Prune"}))
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
                model(**inputs, position_ids=positions, past_key_values=cache)
                new = torch.tensor([[5]])
                after = positions[:, -1:] + 1
                model(input_ids=new, position_ids=after, past_key_values=cache)
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
        with pytest.raises(InputError, match="give every prompt a row of the batch"):
            run_of(name, row, position_ids=positions, use_cache=use_cache)
        starts = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        with pytest.raises(InputError, match="give every prompt a row of the batch"):
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
            model(**first, position_ids=start, past_key_values=cache)
            return model(
                input_ids=torch.tensor(ids),
                attention_mask=torch.cat([first["attention_mask"], mask], 1),
                position_ids=positions,
                past_key_values=cache,
            ).logits[:, -1]

        with torch.no_grad(), usual(name, KEEP)(model):
            together = ask([0, 1])
            alone = torch.cat([ask([0]), ask([1])])
        torch.testing.assert_close(together, alone, **CLOSE)


class TestHidden:
    """Visual tokens that the attention mask hides are no candidates."""

    def inputs(self) -> tuple[Any, set[int]]:
        inputs = batch([prompt(3, 2, 5), prompt(4, 1, 3, 1)])
        visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
        shown = {1, 2, 5, 7, 8, 11, 12, 15}
        for raster in set(range(N)) - shown:
            inputs["attention_mask"][0, visual[raster]] = 0
        return inputs, shown

    @pytest.mark.parametrize("name", [n for n in ELSEWHERE if n != "Downsample"])
    def test_what_is_kept_was_shown(self, name: str) -> None:
        inputs, shown = self.inputs()
        logits, run = run_of(name, inputs)
        first, second = run.report.samples[0].images
        assert set(first.kept) <= shown
        assert (len(first.kept) + first.extra, first.hidden, first.seen) == (KEEP, N - 8, N)
        assert (len(second.kept) + second.extra, second.hidden) == (KEEP, 0)
        assert logits.shape[1] == max(sample.tokens[-1] for sample in run.report)
        counts = usual(name, KEEP).counts(N, LAYERS)
        assert run.report.samples[1].mean_visual_tokens == pytest.approx(sum(counts) / LAYERS)

    @pytest.mark.parametrize("name", [n for n in IN_DECODER if n not in DRAWING])
    def test_equals_masked_dense(self, name: str) -> None:
        inputs, _ = self.inputs()
        short, run = run_of(name, inputs)
        tokens = inputs["attention_mask"].bool()
        stages = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
        layers = model_of().model.language_model.layers
        with torch.no_grad(), masked_from(layers, stages, tokens):
            dense = model_of()(**inputs, use_cache=False).logits
        kept = tokens & ~stages[-1][1]
        # Hidden tokens lie inside the sequence; what is left of every sample ends together.
        for row, got in enumerate(short):
            count = int(kept[row].sum())
            torch.testing.assert_close(got[-count:], dense[row, kept[row]], **CLOSE)

    @pytest.mark.parametrize("name", [n for n in ELSEWHERE if n != "Downsample"])
    def test_more_than_is_shown_is_refused(self, name: str) -> None:
        inputs, _ = self.inputs()
        with pytest.raises(BudgetError, match="8"):
            run_of(name, inputs, keep=9)

    @pytest.mark.parametrize("name", IN_TOWER)
    def test_the_tower_knows_of_no_mask(self, name: str) -> None:
        inputs, _ = self.inputs()
        with pytest.raises(InputError, match="in the vision tower, which knows of no mask"):
            run_of(name, inputs)

    @pytest.mark.parametrize("name", ELSEWHERE)
    def test_an_image_that_is_hidden_is_not_there(self, name: str) -> None:
        inputs = batch([prompt(3, 1, 5)])
        inputs["attention_mask"][inputs["input_ids"] == IMAGE] = 0
        with torch.no_grad():
            expected = model_of()(**inputs).logits
        logits, run = run_of(name, inputs)
        assert torch.equal(logits, expected)
        assert run.report.samples[0].images == ()
        assert run.report.samples[0].tokens == (8,) * LAYERS


@pytest.mark.parametrize("wrong", [-3, 4])
@pytest.mark.parametrize("name", [n for n in ELSEWHERE if n not in ("CDPruner",)])
def test_marks_of_another_length_are_refused(name: str, wrong: int) -> None:
    model, inputs = model_of(), batch([prompt(5, 1, 6)])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    marks = inputs["input_ids"] == IMAGE
    marks = marks[:, -wrong:] if wrong < 0 else nn.functional.pad(marks, (0, wrong))
    with torch.no_grad(), usual(name, KEEP)(model) as run:
        run.mark_visual(marks)
        with pytest.raises(InputError, match="mark every prompt before it is given"):
            model(inputs_embeds=embeds)


def test_marks_hold_for_an_answer_without_a_cache() -> None:
    """Then the prompt comes again with every token; another one that is as long is refused."""
    model, inputs = model_of(), batch([prompt(5, 1, 6)])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    more = model.get_input_embeddings()(torch.tensor([[7, 8]]))
    with torch.no_grad(), pore.DivPrune(KEEP)(model) as run:
        run.mark_visual(inputs["input_ids"] == IMAGE)
        model(inputs_embeds=embeds, use_cache=False)
        model(inputs_embeds=torch.cat([embeds, more], 1), use_cache=False)
        first, second = run.report
        assert first.images == second.images
        assert second.tokens[-1] == first.tokens[-1] + 2
        with pytest.raises(InputError, match="mark every prompt before it is given"):
            model(inputs_embeds=torch.cat([more, embeds], 1), use_cache=False)


@pytest.mark.parametrize("name", EVERY)
def test_a_static_cache_that_was_reset(name: str) -> None:
    """Then a prompt of one token, which sees nothing but itself."""
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    new = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[0]])}
    expected = model(**new).logits
    cache = StaticCache(config=model.config.text_config, max_cache_len=60)
    with torch.no_grad(), usual(name, KEEP)(model):
        model(**inputs, past_key_values=cache)
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        cache.reset()
        got = model(**new, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", EVERY)
def test_a_prefill_that_fails_is_not_in_the_report(name: str) -> None:
    """Wherever it does: the answers go with the entries of the report."""
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    decoder = model.model.language_model

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    places = [
        *(model.model.vision_tower, model.model.multi_modal_projector, decoder.layers[0]),
        *(decoder.layers[-1].mlp, decoder.norm, model.lm_head),
    ]
    with torch.no_grad(), usual(name, KEEP)(model) as run:
        model(**inputs)
        for place in places:
            hook = place.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                model(**inputs)
            hook.remove()
            assert len(run.report) == len(run.report.samples) == 1
        model(**inputs)
        model.model(**inputs)  # without its head
    assert len(run.report) == len(run.report.samples) == 3
    assert run.report.samples[0].images == run.report.samples[1].images or name in DRAWING


OTHER = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in CASES
    for name in ("FastV", "DivPrune", "VisionZip")
    if refusal(case, name) is None
]


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
        assert "a row of the batch" in str(error.value)
