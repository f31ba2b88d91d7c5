"""The engine against the house's invariants, on tiny random LLaVAs in float64."""

from __future__ import annotations

import copy
import gc
import inspect
import json
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from helpers.engine import BATCHES, _flash, _forward_text, fingerprint, tolerance
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.reference import dropped_columns, last_rows, masked_from
from pore.errors import InputError, ModelStateError, PoreError, UnsupportedModelError

K = 2


P = pore.PositionBias.exponential(0.1, N)


METHODS = [
    pytest.param(pore.FastV(keep=5, layer=K), id="fastv"),
    pytest.param(pore.FastV(keep=5, layer=K, normalize="visual"), id="fastv-visual"),
    pytest.param(pore.FastV(keep=0.25, layer=K, reweight=P), id="pore"),
    pytest.param(pore.FastV(keep=3, layer=1), id="fastv-k1"),
    pytest.param(pore.Random(keep=5, layer=K, seed=3), id="random"),
]


# Methods whose decoder never sees what they drop, so that positions are numbered anew.
WITHOUT_DROPPED = [
    pore.Downsample(keep=4),
    pore.DivPrune(keep=5),
    pore.FasterVLM(keep=5),
    pore.VTCCLS(keep=5, start_layer=0),
]


@pytest.fixture(scope="module")
def eager() -> LlavaForConditionalGeneration:
    """Eager attention in float64, with masks that its softmax in float32 can take.

    transformers fills eager masks with the lowest number of the model's type. Its softmax casts to
    float32, where that of float64 is -inf: rows of left padding become NaN, and all else with them.
    """

    def finite(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].clamp(min=-1e9)}

    model = tiny_llava(attention="eager")
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(finite, with_kwargs=True)
    return model


@pytest.fixture(scope="module")
def models(eager: LlavaForConditionalGeneration) -> dict[str, LlavaForConditionalGeneration]:
    """The same weights under every attention implementation."""
    ALL_ATTENTION_FUNCTIONS.register("flash_test", _flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_test", flash_attention_mask)
    found = {"eager": eager}
    for name in ("sdpa", "flash_test"):
        found[name] = tiny_llava(attention="sdpa")
        found[name].model.language_model.config._attn_implementation_internal = name
    return found


def logits_at_end(logits: Tensor, mask: Tensor, tokens: list[int]) -> list[Tensor]:
    """Per sample, the logits of its last tokens, whatever the padding side."""
    right = not bool(mask[:, -1].all())
    return [
        row[:n] if right else row[len(row) - n :] for row, n in zip(logits, tokens, strict=True)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_test"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES.keys())
class TestPrefill:
    def test_keep_all_is_bit_equal(
        self, models: Any, prompts: Any, side: str, attention: str
    ) -> None:
        model, inputs = models[attention], batch(prompts, side)
        dense = model(**inputs).logits
        for pruner in (
            pore.FastV(keep=N),
            pore.FastV(keep=1.0, reweight=P),
            pore.Random(keep=1.0),
            pore.Downsample(keep=N),
            pore.DivPrune(keep=N),
            pore.FasterVLM(keep=1.0),
            pore.VTCCLS(keep=N, start_layer=0),
        ):
            with pruner(model):
                assert torch.equal(model(**inputs).logits, dense)

    @pytest.mark.parametrize("pruner", METHODS)
    def test_equals_masked_dense(
        self, models: Any, prompts: Any, side: str, attention: str, pruner: Any
    ) -> None:
        model, inputs = models[attention], batch(prompts, side)
        with pruner(model) as run:
            short = model(**inputs).logits
        dropped = dropped_columns(run, inputs["input_ids"], IMAGE)
        assert dropped.any()
        reference, tokens = models["sdpa"], inputs["attention_mask"]
        with masked_from(reference.model.language_model.layers, [(pruner.layer, dropped)], tokens):
            dense = reference(**inputs, use_cache=False).logits
        kept = inputs["attention_mask"].bool() & ~dropped
        ends = logits_at_end(short, inputs["attention_mask"], kept.sum(1).tolist())
        for row, (got, keep) in enumerate(zip(ends, kept, strict=True)):
            torch.testing.assert_close(got, dense[row, keep], **tolerance(attention))

    @pytest.mark.parametrize("pruner", [pore.FastV(keep=5), *WITHOUT_DROPPED], ids=repr)
    def test_batch_equals_singles(
        self, models: Any, prompts: Any, side: str, attention: str, pruner: Any
    ) -> None:
        model, inputs = models[attention], batch(prompts, side)
        with pruner(model) as run:
            together = model(**inputs).logits
        tokens = [sample.tokens[-1] for sample in run.report]
        ends = logits_at_end(together, inputs["attention_mask"], tokens)
        first = 0
        for row, ids in enumerate(prompts):
            images = ids.count(IMAGE) // N
            one: dict[str, Any] = {"input_ids": torch.tensor([ids])}
            if images:
                one["pixel_values"] = inputs["pixel_values"][first : first + images]
                first += images
            with pruner(model) as alone:
                single = model(**one).logits[0]
            assert alone.report.samples[0].images == run.report.samples[row].images
            torch.testing.assert_close(ends[row], single, **tolerance(attention))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("normalize", ["prompt", "visual"])
def test_scores_are_those_of_eager_attention(
    models: Any, attention: str, side: str, normalize: Any
) -> None:
    inputs = batch(BATCHES["several images"], side)
    truth = models["eager"](**inputs, output_attentions=True).attentions[K - 1]
    rows = last_rows(truth, inputs["input_ids"], inputs["attention_mask"], IMAGE)
    seen: list[Tensor] = []

    class Spy(pore.FastV):
        def _select(self, view: Any) -> Any:
            seen.append(view.attention)
            return super()._select(view)

    with Spy(keep=4, layer=K, normalize=normalize)(models[attention]):
        models[attention](**inputs)
    got = torch.cat(list(seen[0]))
    if normalize == "prompt":
        torch.testing.assert_close(got, torch.cat(rows), rtol=2e-5, atol=1e-9)
        return
    per_head = []
    for b in range(2):
        last = int(inputs["attention_mask"][b].nonzero().max())
        heads = truth[b, :, last][:, inputs["input_ids"][b] == IMAGE]
        for image in heads.split(N, dim=-1):  # Eq. 1: each image's tokens sum to one
            per_head.append((image / image.sum(-1, keepdim=True)).mean(0))
    torch.testing.assert_close(got, torch.cat(per_head), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_test"])
@pytest.mark.parametrize("pruner", METHODS)
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES.keys())
def test_cached_decode_equals_full_forward(
    models: Any, prompts: Any, pruner: Any, attention: str
) -> None:
    model, inputs = models[attention], batch(prompts)
    with pruner(model) as run:
        out = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        lengths = [layer.get_seq_length() for layer in out.past_key_values.layers]
    steps = torch.stack(out.logits, 1)
    # The cache is short above the pruned layer, and long below it.
    longest = max(sample.tokens[-1] for sample in run.report)
    width = inputs["input_ids"].shape[1]
    assert lengths == [width + 4] * pruner.layer + [longest + 4] * (5 - pruner.layer)

    full = dict(inputs, input_ids=out.sequences[:, :-1])
    full["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    full["position_ids"] = (full["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    dropped = dropped_columns(run, inputs["input_ids"], IMAGE)
    reference, tokens = models["sdpa"], inputs["attention_mask"]
    with masked_from(reference.model.language_model.layers, [(pruner.layer, dropped)], tokens):
        # A generated placeholder is no image: give the model the features by hand.
        dense = _forward_text(reference, full, width)
    # `generate` hands logits out in float32.
    expected = dense[:, width - 1 :].float()
    torch.testing.assert_close(steps, expected, **tolerance(attention, torch.float32))


@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES.keys())
def test_downsample_is_a_prompt_with_fewer_visual_tokens(models: Any, prompts: Any) -> None:
    """Pooled by hand into a shorter prompt, and decoded, the model answers the same."""
    model, inputs = models["sdpa"], batch(prompts)
    with pore.Downsample(keep=4)(model):
        got = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    features = iter(model.get_image_features(inputs["pixel_values"]).pooler_output)
    for row, ids in enumerate(prompts):
        short: list[Tensor] = []
        column = 0
        while column < len(ids):
            if ids[column] == IMAGE:
                cells = next(features).T.reshape(1, -1, 4, 4)
                pooled = torch.nn.functional.avg_pool2d(cells, 2)
                short.append(pooled[0].flatten(1).T)
                column += N
            else:
                short.append(model.get_input_embeddings()(torch.tensor([ids[column]])))
                column += 1
        out = model.generate(
            inputs_embeds=torch.cat(short)[None],
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        torch.testing.assert_close(
            torch.stack(got.logits, 1)[row],
            torch.stack(out.logits, 1)[0],
            **tolerance("sdpa", torch.float32),
        )


@pytest.mark.parametrize("pruner", WITHOUT_DROPPED[1:], ids=repr)
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES.keys())
def test_dropped_before_the_decoder_is_a_shorter_prompt(
    models: Any, prompts: Any, pruner: Any
) -> None:
    """The kept patches spliced into a shorter prompt by hand give the same answers."""
    model, inputs = models["sdpa"], batch(prompts)
    with pruner(model) as run:
        got = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    features = iter(model.get_image_features(inputs["pixel_values"]).pooler_output)
    for row, ids in enumerate(prompts):
        embeds = model.get_input_embeddings()(torch.tensor(ids))
        stay = torch.ones(len(ids), dtype=torch.bool)
        columns = [i for i, token in enumerate(ids) if token == IMAGE]
        for number, image in enumerate(run.report.samples[row].images):
            own = columns[number * N : (number + 1) * N]
            embeds[own] = next(features)
            stay[[column for i, column in enumerate(own) if i not in image.kept]] = False
        out = model.generate(
            inputs_embeds=embeds[stay][None],
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        torch.testing.assert_close(
            torch.stack(got.logits, 1)[row],
            torch.stack(out.logits, 1)[0],
            **tolerance("sdpa", torch.float32),
        )


class TestGenerate:
    """Every way of generating gives what the plain one gives."""

    inputs = batch(BATCHES["no image in one row"])

    def plain(self, model: Any, pruner: Any, **kwargs: Any) -> Tensor:
        with pruner(model):
            out: Tensor = model.generate(**self.inputs, max_new_tokens=6, do_sample=False, **kwargs)
        return out

    @pytest.mark.parametrize("pruner", [pore.FastV(keep=5), *WITHOUT_DROPPED], ids=repr)
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_static_cache(self, models: Any, attention: str, pruner: Any) -> None:
        model = models[attention]
        expected = self.plain(model, pruner)
        assert torch.equal(self.plain(model, pruner, cache_implementation="static"), expected)

    def test_static_cache_of_the_caller_is_used_again_after_reset(self, models: Any) -> None:
        model, pruner = models["sdpa"], pore.FastV(keep=5)
        cache = StaticCache(config=model.config.text_config, max_cache_len=96)
        expected = self.plain(model, pruner)
        with pruner(model):
            for _ in range(2):
                out = model.generate(
                    **self.inputs, max_new_tokens=6, do_sample=False, past_key_values=cache
                )
                assert torch.equal(out, expected)
                cache.reset()

    @pytest.mark.parametrize("pruner", [pore.FastV(keep=5), pore.Downsample(keep=4)], ids=repr)
    def test_beams_equal_beams_one_by_one(self, models: Any, pruner: Any) -> None:
        model = models["sdpa"]
        with pruner(model):
            together = model.generate(
                **self.inputs,
                max_new_tokens=6,
                do_sample=False,
                num_beams=3,
                output_scores=True,
                return_dict_in_generate=True,
            )
        first = 0
        for row, ids in enumerate(BATCHES["no image in one row"]):
            images = ids.count(IMAGE) // N
            one: dict[str, Any] = {"input_ids": torch.tensor([ids])}
            if images:
                one["pixel_values"] = self.inputs["pixel_values"][first : first + images]
                first += images
            with pruner(model):
                alone = model.generate(
                    **one,
                    max_new_tokens=6,
                    do_sample=False,
                    num_beams=3,
                    output_scores=True,
                    return_dict_in_generate=True,
                )
            assert torch.equal(together.sequences[row, -6:], alone.sequences[0, -6:])
            torch.testing.assert_close(
                together.sequences_scores[row],
                alone.sequences_scores[0],
                **tolerance("sdpa", torch.float32),
            )

    def test_sampling_draws_from_the_pruned_distribution(self, models: Any) -> None:
        model, inputs = models["sdpa"], batch(BATCHES["ragged text"])
        options = {"output_logits": True, "return_dict_in_generate": True}
        with pore.FastV(keep=5)(model):
            torch.manual_seed(7)
            drawn = model.generate(
                **inputs, max_new_tokens=6, do_sample=True, num_return_sequences=2, **options
            )
            greedy = model.generate(**inputs, max_new_tokens=1, do_sample=False, **options)
        close = tolerance("sdpa", torch.float32)
        torch.testing.assert_close(drawn.logits[0][::2], greedy.logits[0], **close)
        torch.testing.assert_close(drawn.logits[0][1::2], greedy.logits[0], **close)

    def test_assisted_decoding_takes_rejected_tokens_back(self, models: Any) -> None:
        model = models["sdpa"]
        one = batch([prompt(3, 1, 5)])
        with pore.FastV(keep=5)(model) as run:
            expected = model.generate(**one, max_new_tokens=12, do_sample=False)
            out = model.generate(
                **one, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
            )
        assert torch.equal(out, expected)
        assert run.report.samples[1].tokens == run.report.samples[0].tokens

    @pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_test"])
    @pytest.mark.parametrize("pruner", [pore.FastV(keep=5), *WITHOUT_DROPPED], ids=repr)
    def test_decoding_behind_right_padding(self, models: Any, attention: str, pruner: Any) -> None:
        model, prompts = models[attention], BATCHES["ragged text"]
        inputs, steps = batch(prompts, "right"), torch.tensor([[7, 8, 9], [4, 5, 6]])
        mask, lengths = inputs["attention_mask"], inputs["attention_mask"].sum(1, keepdim=True)
        with pruner(model):
            cache = model(**inputs).past_key_values
            together = []
            for step in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                out = model(
                    input_ids=steps[:, step : step + 1],
                    attention_mask=mask,
                    position_ids=lengths + step,
                    past_key_values=cache,
                )
                together.append(out.logits[:, 0])
        for row, ids in enumerate(prompts):
            pixels = inputs["pixel_values"][row : row + 1]
            with pruner(model):
                cache = model(input_ids=torch.tensor([ids]), pixel_values=pixels).past_key_values
                for step in range(3):
                    alone = model(
                        input_ids=steps[row : row + 1, step : step + 1], past_key_values=cache
                    )
                    torch.testing.assert_close(
                        together[step][row], alone.logits[0, 0], **tolerance(attention)
                    )

    def test_without_a_cache_the_newest_token_chooses_anew(self, models: Any) -> None:
        model, pruner = models["sdpa"], pore.FastV(keep=5)
        one = batch([prompt(3, 1, 5)])
        with pruner(model) as run:
            out = model.generate(**one, max_new_tokens=3, do_sample=False, use_cache=False)
        assert len(run.report) == 3
        ids = one["input_ids"]
        for _step in range(3):
            with pruner(model):
                logits = model(input_ids=ids, pixel_values=one["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(out, ids)

    def test_a_conversation_goes_on_over_the_pruned_cache(self, models: Any) -> None:
        """What was dropped stays dropped; a second image is pruned for itself."""
        model = models["sdpa"]
        first, second = prompt(3, 1, 5), prompt(2, 1, 4, 1)
        pixels = batch([first, second])["pixel_values"]
        with pore.FastV(keep=5, layer=K)(model) as run:
            cache = DynamicCache(config=model.config.text_config)
            model(input_ids=torch.tensor([first]), pixel_values=pixels[:1], past_key_values=cache)
            out = model(
                input_ids=torch.tensor([second]), pixel_values=pixels[1:], past_key_values=cache
            ).logits
            text = model(input_ids=torch.tensor([[9, 8, 7]]), past_key_values=cache).logits
        ids = torch.tensor([first + second + [9, 8, 7]])
        kept = [set(sample.images[0].kept) for sample in run.report.samples[:2]]
        dropped = torch.zeros_like(ids, dtype=torch.bool)
        for number, start in enumerate((3, len(first) + 2)):
            for i in range(N):
                dropped[0, start + i] = i not in kept[number]
        everything = torch.ones_like(ids)
        with masked_from(model.model.language_model.layers, [(K, dropped)], everything):
            dense = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0]
        stay = ~dropped[0, len(first) : len(first) + len(second)]
        middle = dense[len(first) : len(first) + len(second)]
        torch.testing.assert_close(out[0], middle[stay], **tolerance("sdpa"))
        torch.testing.assert_close(text[0], dense[-3:], **tolerance("sdpa"))


class TestLeavesTheModelAsItWas:
    inputs = batch([prompt(3, 1, 5)])

    @pytest.mark.parametrize("pruner", [*METHODS, *WITHOUT_DROPPED], ids=repr)
    def test_after_the_block(self, models: Any, pruner: Any) -> None:
        model = models["sdpa"]
        before = fingerprint(model)
        dense = model(**self.inputs).logits
        with pruner(model):
            model(**self.inputs)
            assert fingerprint(model) != before
        assert fingerprint(model) == before
        assert torch.equal(model(**self.inputs).logits, dense)

    def test_after_an_exception_inside_a_layer(self, models: Any) -> None:
        model = models["sdpa"]
        before = fingerprint(model)

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = model.model.language_model.layers[3].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"), pore.FastV(keep=4)(model):
            model(**self.inputs)
        hook.remove()
        assert fingerprint(model) == before

    def test_after_an_exception_that_is_caught_inside(self, models: Any) -> None:
        model = models["sdpa"]
        with pore.FastV(keep=4)(model) as run:
            with pytest.raises(ValueError, match="do not match"):
                model(
                    input_ids=self.inputs["input_ids"][:, :10],
                    pixel_values=torch.zeros(1, 3, 32, 32).double(),
                )
            out = model(**self.inputs).logits
        assert out.shape[1] == len(prompt(3, 1, 5)) - N + 4
        assert len(run.report) == 1

    def test_a_second_thread_is_refused(self, models: Any) -> None:
        """The first one, in the middle of a layer, goes on as if nothing had been."""
        model, found, inside, refused = models["sdpa"], [], Event(), Event()
        with pore.FastV(keep=4)(model):
            expected = model(**self.inputs).logits

        def wait(*_: Any) -> None:
            if not inside.is_set():
                inside.set()
                assert refused.wait(60)

        hook = model.model.language_model.layers[3].register_forward_hook(wait)
        with pore.FastV(keep=4)(model) as run:
            first = Thread(target=lambda: found.append(model(**self.inputs).logits))
            first.start()
            assert inside.wait(60)
            with pytest.raises(ModelStateError, match="another thread"):
                model(**self.inputs)
            refused.set()
            first.join()
            found.append(model(**self.inputs).logits)
        hook.remove()
        assert all(torch.equal(logits, expected) for logits in found)
        assert len(run.report) == len(found) == 2

    def test_entering_twice_is_refused(self, models: Any) -> None:
        model = models["sdpa"]
        before = fingerprint(model)
        with pore.FastV(keep=4)(model):
            with pytest.raises(ModelStateError, match="already pruned"), pore.Random(keep=4)(model):
                pass
            with pytest.raises(ModelStateError, match="with"):
                pore.remove(model)
        assert fingerprint(model) == before

    def test_apply_and_remove_are_idempotent(self, models: Any) -> None:
        model = models["sdpa"]
        before = fingerprint(model)
        pore.remove(model)
        pruner = pore.FastV(keep=4)
        pruner.apply(model)
        run = pruner.apply(model)
        for _ in range(3):
            model(**self.inputs)
        assert len(run.report) == 1  # the latest prefill only
        with pytest.raises(ModelStateError, match="already pruned"), pruner(model):
            pass
        pore.remove(model)
        pore.remove(model)
        assert fingerprint(model) == before

    def test_a_run_can_be_entered_again(self, models: Any) -> None:
        run = pore.FastV(keep=4)(models["sdpa"])
        for _ in range(2):
            with run:
                models["sdpa"](**self.inputs)
        assert len(run.report) == 2

    def test_nothing_keeps_a_model_alive(self) -> None:
        model = tiny_llava()
        with pore.FastV(keep=4)(model) as run:
            model(**self.inputs)
        import weakref

        gone = weakref.ref(model)
        del model, run
        gc.collect()
        assert gone() is None

    def test_a_copy_of_the_model_is_not_pruned(self, models: Any) -> None:
        before = models["sdpa"](**self.inputs).logits
        twin = copy.deepcopy(models["sdpa"])
        with pore.FastV(keep=4)(models["sdpa"]):
            assert torch.equal(twin(**self.inputs).logits, before)


class TestReport:
    def test_names_what_was_kept(self, models: Any) -> None:
        model, inputs = models["sdpa"], batch(BATCHES["no image in one row"])
        with pore.FastV(keep=5, layer=K)(model) as run:
            model(**inputs)
        two, none, one = run.report
        assert [image.seen for image in two.images] == [N, N]
        assert none.images == ()
        assert none.tokens == (13,) * 5
        assert one.tokens == (18, 18, 7, 7, 7)
        assert one.unpruned == (18,) * 5
        assert one.mean_visual_tokens == (2 * 16 + 3 * 5) / 5
        assert one.flops < one.unpruned_flops
        image = one.images[0]
        assert image.kept == tuple(sorted(image.kept))
        assert len(set(image.kept)) == 5
        assert image.coordinates == tuple((i // 4, i % 4) for i in image.kept)
        text = str(run.report)
        assert "16 -> 5" in text
        assert "18 (0-1), 7 (2-4)" in text
        assert "none" in text
        record = json.loads(run.report.to_json())
        assert record["samples"][2]["images"][0]["kept"] == list(image.kept)

    def test_prompts_without_image_say_so(self, models: Any) -> None:
        model, inputs = models["sdpa"], batch([prompt(9, 0, 4)])
        dense = model(**inputs).logits
        with pore.FastV(keep=5)(model) as run:
            assert str(run.report) == "FastV: no prefill yet"
            assert torch.equal(model(**inputs).logits, dense)
        assert "No prompt had visual tokens" in str(run.report)

    def test_random_does_not_depend_on_batches(self, models: Any) -> None:
        model, prompts = models["sdpa"], [prompt(3, 1, 5), prompt(3, 1, 5, 1)]
        inputs = batch(prompts)
        with pore.Random(keep=5)(model) as together:
            model(**inputs)
        with pore.Random(keep=5)(model) as singles:
            for row in range(2):
                model(
                    input_ids=inputs["input_ids"][row : row + 1],
                    pixel_values=inputs["pixel_values"][row : row + 1],
                )
        kept = [[sample.images for sample in run.report] for run in (together, singles)]
        assert kept[0] == kept[1]
        assert kept[0][0] != kept[0][1]


class TestPadding:
    """Letterbox bars are seen in the pixels, whoever runs the vision tower and when."""

    def inputs(self) -> dict[str, Tensor]:
        inputs = batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)])
        inputs["pixel_values"][0, :, :8] = 0.0  # bars over the first and last row of patches
        inputs["pixel_values"][0, :, -8:] = 0.0
        inputs["pixel_values"][2, :, :, :8] = 0.0  # and over columns
        inputs["pixel_values"][2, :, :, -8:] = 0.0
        return inputs

    def test_bars_are_dropped_first_and_cap_the_budget(self, models: Any) -> None:
        with pore.FastV(keep=10, suppress_padding=0.5)(models["sdpa"]) as run:
            models["sdpa"](**self.inputs())
        barred, plain, columns = (image for sample in run.report for image in sample.images)
        assert barred.kept == tuple(range(4, 12))
        assert len(plain.kept) == 10
        assert columns.kept == (1, 2, 5, 6, 9, 10, 13, 14)

    @pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
    def test_generate_sees_them_too(self, models: Any, how: Any) -> None:
        # One image a sample: transformers 5.16 mixes several up when it repeats samples for beams.
        model, inputs = models["sdpa"], batch(BATCHES["ragged text"])
        inputs["pixel_values"][0, :, :8] = inputs["pixel_values"][0, :, -8:] = 0.0
        with pore.FastV(keep=10, suppress_padding=0.5)(model) as run:
            model(**inputs)
            model.generate(**inputs, max_new_tokens=2, do_sample=False, **how)
        expected = [sample.images for sample in run.report.samples[:2]]
        assert [len(images[0].kept) for images in expected] == [8, 10]
        copies = how.get("num_beams", 1)
        first = [s.images for s in run.report.samples[2 : 2 + 2 * copies]]
        assert first == [images for images in expected for _ in range(copies)]

    def test_features_of_other_images_are_refused(self, models: Any) -> None:
        model, inputs = models["sdpa"], self.inputs()
        if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
            pytest.skip("this transformers takes no features made before")
        features = model.get_image_features(inputs.pop("pixel_values"))
        with pore.FastV(keep=6, suppress_padding=0.5)(model):
            with pytest.raises(InputError, match="inside the block"):
                model(**inputs, mm_encoder_outputs={"image": features})
            model(**self.inputs())
            inputs["mm_encoder_outputs"] = {"image": features}
            features.pooler_output = [f + 1 for f in features.pooler_output]
            with pytest.raises(InputError, match="inside the block"):
                model(**inputs)


class TestDtypesAndModes:
    inputs = batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_half_precision_scores_in_float32(self, dtype: torch.dtype, attention: str) -> None:
        model = tiny_llava(dtype=dtype, attention=attention)
        seen = []

        class Spy(pore.FastV):
            def _select(self, view: Any) -> Any:
                seen.append(view.attention.dtype)
                return super()._select(view)

        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        with torch.inference_mode(), Spy(keep=4, reweight=P)(model):
            out = model(**inputs).logits
        assert seen == [torch.float32]
        assert out.dtype == dtype
        assert out.isfinite().all()

    def test_inference_mode(self, models: Any) -> None:
        with pore.FastV(keep=4)(models["sdpa"]):
            expected = models["sdpa"].generate(**self.inputs, max_new_tokens=4, do_sample=False)
            with torch.inference_mode():
                out = models["sdpa"].generate(**self.inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, expected)

    def test_gradients_flow_to_what_was_kept(self, models: Any) -> None:
        model = models["sdpa"]
        with pore.FastV(keep=4)(model):
            model(**self.inputs).logits.sum().backward()
        assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
        model.zero_grad(set_to_none=True)

    def test_offloaded_by_accelerate(self, tmp_path: Any) -> None:
        accelerate = pytest.importorskip("accelerate")
        model = tiny_llava(dtype=torch.float32)
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in self.inputs.items()}
        with pore.FastV(keep=4)(model):
            expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        places = {
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": "cpu",
            "lm_head": "cpu",
            "model.language_model.embed_tokens": "cpu",
            "model.language_model.norm": "cpu",
            "model.language_model.rotary_emb": "cpu",
        }
        places |= {
            f"model.language_model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(5)
        }
        model = accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(tmp_path)
        )
        with pore.FastV(keep=4)(model):
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, expected)


class TestEmbeddings:
    """Prompts given as `inputs_embeds`."""

    def test_marked_positions_are_pruned(self, models: Any) -> None:
        model, inputs = models["sdpa"], batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)])
        with pore.FastV(keep=4)(model) as run:
            expected = model(**inputs).logits
            expected_ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        where = inputs["input_ids"] == IMAGE
        embeds[where] = torch.cat(
            list(model.get_image_features(inputs["pixel_values"]).pooler_output)
        )
        with pore.FastV(keep=4)(model) as marked:
            marked.mark_visual(where)
            out = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
            ids = model.generate(
                inputs_embeds=embeds,
                attention_mask=inputs["attention_mask"],
                max_new_tokens=4,
                do_sample=False,
            )
        assert torch.equal(out, expected)
        assert torch.equal(ids, expected_ids[:, -4:])
        assert [s.images for s in marked.report] == [s.images for s in run.report]

    def test_unmarked_is_refused(self, models: Any) -> None:
        model = models["sdpa"]
        embeds = torch.randn(1, 9, 32, dtype=torch.float64)
        with pore.FastV(keep=4)(model) as run:
            with pytest.raises(InputError, match="mark_visual"):
                model(inputs_embeds=embeds)
            run.mark_visual(torch.zeros(1, 12, dtype=torch.bool))
            with pytest.raises(InputError, match="shape"):
                model(inputs_embeds=embeds)


class TestBadInput:
    inputs = batch([prompt(3, 1, 5)])

    @pytest.mark.parametrize(
        "keep", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, "5", None]
    )
    @pytest.mark.parametrize("method", [pore.FastV, pore.Random, pore.Downsample])
    def test_keep_without_meaning(self, method: Any, keep: Any) -> None:
        with pytest.raises(PoreError, match="keep"):
            method(keep=keep)

    @pytest.mark.parametrize("method", [pore.FastV, pore.Random, pore.Downsample])
    @pytest.mark.parametrize(("keep", "message"), [(N + 1, "at most 16"), (0.01, "rounds to none")])
    def test_budget_that_cannot_be_met(
        self, models: Any, method: Any, keep: Any, message: str
    ) -> None:
        with method(keep=keep)(models["sdpa"]), pytest.raises(PoreError, match=message):
            models["sdpa"](**self.inputs)

    def test_grid_that_does_not_exist(self, models: Any) -> None:
        with pore.Downsample(keep=13)(models["sdpa"]), pytest.raises(PoreError, match="12 or 16"):
            models["sdpa"](**self.inputs)

    @pytest.mark.parametrize("layer", [0, -1, 5, 99, 1.5, True])
    @pytest.mark.parametrize("method", [pore.FastV, pore.Random])
    def test_layer_out_of_range(self, models: Any, method: Any, layer: Any) -> None:
        before = fingerprint(models["sdpa"])
        with (
            pytest.raises(PoreError, match="choose 1 to 4"),
            method(keep=4, layer=layer)(models["sdpa"]),
        ):
            pass
        assert fingerprint(models["sdpa"]) == before

    def test_unknown_normalisation(self) -> None:
        with pytest.raises(PoreError, match="prompt"):
            pore.FastV(keep=4, normalize="image")  # type: ignore[arg-type]

    def test_profile_of_another_length(self, models: Any) -> None:
        bias = pore.PositionBias.exponential(0.1, N + 1)
        with (
            pore.FastV(keep=4, reweight=bias)(models["sdpa"]),
            pytest.raises(PoreError, match="17"),
        ):
            models["sdpa"](**self.inputs)

    @pytest.mark.parametrize(
        ("field", "value"), [("layer", 3), ("normalize", "visual"), ("model", "other/model")]
    )
    def test_profile_of_other_conditions(self, models: Any, field: str, value: Any) -> None:
        import dataclasses

        model = models["sdpa"]
        model.config.name_or_path = "this/model"
        provenance = dataclasses.replace(P.provenance, **{field: value})
        bias = dataclasses.replace(P, provenance=provenance)
        with pytest.raises(PoreError, match=field), pore.FastV(keep=4, reweight=bias)(model):
            pass
        with pore.FastV(keep=4, reweight=bias.allowing(field))(model):
            model(**self.inputs)
        model.config.name_or_path = ""

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_attention_that_is_not_finite(self, bad: float) -> None:
        model = tiny_llava()
        model.model.language_model.layers[0].mlp.down_proj.weight.data[0, 0] = bad
        with pore.FastV(keep=4)(model), pytest.raises(PoreError, match="NaN or infinity"):
            model(**self.inputs)

    def test_text_model(self) -> None:
        text = tiny_llava().model.language_model
        with pytest.raises(UnsupportedModelError, match="no vision tower in its config"):
            pore.FastV(keep=4)(text)

    def test_unknown_model(self) -> None:
        with pytest.raises(UnsupportedModelError, match=r"LLaVA-1\.5"):
            pore.FastV(keep=4)(torch.nn.Linear(2, 2))

    def test_prompt_that_ends_with_the_image(self, models: Any) -> None:
        ids = torch.tensor([[5, 6, *[IMAGE] * N]])
        with (
            pore.FastV(keep=4)(models["sdpa"]),
            pytest.raises(InputError, match="ends with a visual token"),
        ):
            models["sdpa"](input_ids=ids, pixel_values=self.inputs["pixel_values"])

    def test_half_an_image(self, models: Any) -> None:
        ids = torch.tensor([[5, 6, *[IMAGE] * (N - 3), 7]])
        with (
            pore.FastV(keep=4)(models["sdpa"]),
            pytest.raises(ValueError, match=r"no whole number|do not match"),
        ):
            models["sdpa"](input_ids=ids, pixel_values=self.inputs["pixel_values"])

    def test_features_made_elsewhere(self, models: Any) -> None:
        """A method of the tower must see the tower run, and says so where it does not."""
        model = models["sdpa"]
        features = model.get_image_features(self.inputs["pixel_values"])
        ids = self.inputs["input_ids"]
        if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
            pytest.skip("this transformers takes no features made before")
        with pore.FasterVLM(keep=4)(model), pytest.raises(InputError, match="pixel_values"):
            model(input_ids=ids, mm_encoder_outputs={"image": features})

    def test_tower_layers_that_say_nothing(self, models: Any) -> None:
        pruner = pore.VTCCLS(keep=4, start_layer=7)
        with pytest.raises(PoreError, match="layer"), pruner(models["sdpa"]):
            pass

    def test_the_language_model_alone(self, models: Any) -> None:
        with pore.FastV(keep=4)(models["sdpa"]), pytest.raises(ModelStateError, match="by itself"):
            models["sdpa"].model.language_model(inputs_embeds=torch.randn(1, 4, 32).double())

    def test_padding_without_pixels(self, models: Any) -> None:
        model = models["sdpa"]
        with pore.FastV(keep=4, suppress_padding=0.5)(model) as run:
            run.mark_visual(torch.tensor([[False] * 3 + [True] * N + [False] * 2]))
            with pytest.raises(InputError, match="pixel_values"):
                model(inputs_embeds=torch.randn(1, N + 5, 32).double())
