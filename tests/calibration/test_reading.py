"""What calibration reads is the attention computed in full, and the model is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llama import modeling_llama

from helpers.calibrations import (
    LAYERS,
    K,
    broken_after,
    eager_in_float64,
    run,
    same,
    snapshot,
    tiny_eager,
)
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from pore.calibration.reading import attention_rows, layer_stage
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.errors import InputError


@pytest.fixture(scope="module")
def truth(processor: LlavaProcessor, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """A of every sample, one at a time, from the whole attention matrix of eager attention."""
    eager = tiny_eager()
    rows: dict[str, list[torch.Tensor]] = {"prompt": [], "visual": []}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_llama, "eager_attention_forward", eager_in_float64)
        for sample in samples:
            inputs = build_inputs(processor, [sample], dtype=torch.float64)
            weights = eager(**inputs, output_attentions=True).attentions[K - 1]
            visual = weights[0, :, -1, inputs["input_ids"][0] == IMAGE]
            rows["prompt"].append(visual.mean(0))
            rows["visual"].append((visual / visual.sum(-1, keepdim=True)).mean(0))
    return {name: torch.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize("normalize", ["prompt", "visual"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_full_attention(
    truth: dict[str, torch.Tensor],
    processor: LlavaProcessor,
    samples: list[Sample],
    normalize: Any,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if attention == "eager":
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_in_float64)
    model = tiny_eager() if attention == "eager" else tiny_llava(layers=LAYERS)
    # The eager stand-in knows no padding, so it gets one sample at a time.
    found = run(
        model, processor, samples, normalize=normalize, batch_size=1 if attention == "eager" else 4
    )
    rows = truth[normalize]
    assert found.count == found.seen == len(samples)
    assert found.mean.dtype == torch.float64
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.std, rows.std(0), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(found.sem, rows.std(0) / len(rows) ** 0.5, rtol=1e-8, atol=1e-14)


def test_several_images_in_a_prompt_are_several_rows(model: LlavaForConditionalGeneration) -> None:
    inputs = batch([prompt(3, 2, 4, seed=1), prompt(5, 1, 2, seed=2)])
    layout, (rows,) = attention_rows(model, inputs, [layer_stage(K)])
    assert rows.shape == (3, N)
    assert [(i.row, i.index) for i in layout.images] == [(0, 0), (0, 1), (1, 0)]
    alone = {"input_ids": inputs["input_ids"][:1], "pixel_values": inputs["pixel_values"][:2]}
    torch.testing.assert_close(rows[:2], attention_rows(model, alone, [layer_stage(K)])[1][0])


@pytest.mark.parametrize("size", [1, 5, 100])
def test_batch_size_does_not_matter(
    model: Any, processor: Any, samples: list[Sample], size: int
) -> None:
    assert same(
        run(model, processor, samples, batch_size=size),
        run(model, processor, samples, batch_size=3),
    )


def test_order_does_not_matter(model: Any, processor: Any, samples: list[Sample]) -> None:
    one = run(model, processor, samples)
    other = run(model, processor, samples[::-1])
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=0)


def test_bfloat16_is_summed_beyond_its_precision(processor: Any, samples: list[Sample]) -> None:
    model = tiny_llava(layers=LAYERS, dtype=torch.bfloat16)
    found = run(model, processor, samples)
    assert found.dtype == "bfloat16"
    total = found.mean.sum().item()
    assert 0 < total < 1


def test_what_runs_and_what_does_not(model: Any, processor: Any, samples: list[Sample]) -> None:
    ran: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: ran.append(m)) for m in model.modules()]
    try:
        run(model, processor, samples[:2], batch_size=2)
    finally:
        for hook in hooks:
            hook.remove()
    decoder = model.model.language_model
    last = decoder.layers[K - 1]
    for whole in (model.model.vision_tower.encoder.layers[-1], model.model.multi_modal_projector):
        assert ran.count(whole) == 1
    for layer in decoder.layers[: K - 1]:
        assert ran.count(layer) == ran.count(layer.mlp) == ran.count(layer.self_attn.o_proj) == 1
    assert ran.count(last.self_attn.k_proj) == 1
    for idle in (last.self_attn.o_proj, last.mlp, *decoder.layers[K:], decoder.norm, model.lm_head):
        assert idle not in ran
    assert model not in ran


def test_prompts_that_give_nothing_to_measure_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="sample 1 has no image"):
        attention_rows(model, batch([prompt(3, 1, 4), prompt(3, 0, 20)]), [layer_stage(K)])
    with pytest.raises(InputError, match="ends with a visual token"):
        attention_rows(model, batch([prompt(3, 1, 0)]), [layer_stage(K)])


def test_leaves_the_model_alone(processor: Any, samples: list[Sample]) -> None:
    model = tiny_llava(layers=LAYERS).train()
    model.model.vision_tower.eval()
    # The first forward of any model leaves transformers' own hooks in the tower.
    model(**build_inputs(processor, samples[:1], dtype=torch.float64))
    before = snapshot(model)
    run(model, processor, samples)
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="disk"):
        run(model, processor, broken_after(samples, 6, RuntimeError("disk on fire")))
    assert snapshot(model) == before
    calls = iter(range(100))

    def fail(*_: object) -> None:
        if next(calls) == 1:
            raise RuntimeError("out of memory")

    hook = model.model.language_model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, processor, samples)
    hook.remove()
    assert snapshot(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_offloaded_weights_stay_offloaded(processor: Any, samples: list[Sample]) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = run(tiny_llava(layers=LAYERS), processor, samples)
    model = tiny_llava(layers=LAYERS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert same(run(model, processor, samples), plain)
    assert all(p.device.type == "meta" for p in model.parameters())
