"""The engine against the house's invariants, on tiny random LLaVAs in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from helpers.engine import (
    BATCHES,
    METHODS,
    WITHOUT_DROPPED,
    K,
    P,
    logits_at_end,
    tolerance,
)
from helpers.models import IMAGE, N, batch
from helpers.recording import Recording
from helpers.reference import dropped_columns, last_rows, masked_from


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
    recording = Recording(pore.FastV(keep=4, layer=K, normalize=normalize))
    with recording(models[attention]):
        models[attention](**inputs)
    got = torch.cat(list(recording.seen[0].view.attention))
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
