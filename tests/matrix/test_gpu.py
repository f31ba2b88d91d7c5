"""On a GPU, with the kernels that a CPU has none of: `pytest -m gpu`, skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

import pore
from helpers.caches import as_argument
from helpers.models import N, batch, prompt, tiny_llava
from helpers.recording import Recording
from pore._compat.caches import cache_in

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PRUNERS = [
    pore.FastV(keep=5),
    pore.PyramidDrop(keep=5, layers=(2, 3)),
    pore.DivPrune(keep=5),
    pore.VisionZip(keep=5),
]
PROMPTS = [prompt(3, 1, 5), prompt(7, 1, 4, 1)]
KERNELS = [
    "sdpa",
    "flex_attention",
    pytest.param(
        "flash_attention_2",
        marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash_attn"),
    ),
]


def model_of(kernel: str) -> Any:
    """In bfloat16 on the GPU; the tower, whose heads are small, is left to SDPA."""
    model = tiny_llava(layers=6, tower_layers=4, dtype=torch.bfloat16, head_dim=16)
    model.set_attn_implementation({"text_config": kernel, "vision_config": "sdpa"})
    return model.to("cuda")


def inputs_of(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    inputs = batch(PROMPTS, dtype=dtype)
    return {name: value.to("cuda") for name, value in inputs.items()}


def answer(model: Any, pruner: Any) -> tuple[torch.Tensor, list[Any]]:
    """Logits of the last tokens of a prefill and of two decoded ones, and what was kept."""
    inputs = inputs_of(model.dtype)
    mask = inputs["attention_mask"]
    with torch.no_grad(), pruner(model) as run:
        out = model(**inputs)
        logits = [out.logits[:, -4:].float()]  # tokens of both prompts
        for token in (7, 8):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = model(
                input_ids=torch.full((2, 1), token, device="cuda"),
                attention_mask=mask,
                **as_argument(cache_in(out)),
            )
            logits.append(out.logits.float())
    return torch.cat(logits, 1), [sample.images for sample in run.report]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_kernels_agree(pruner: Any, kernel: str) -> None:
    """With the same selection, no kernel is much farther from float32 than eager attention is."""
    recording = Recording(pruner)
    eager, kept = answer(model_of("eager"), recording)
    recording.replays = True
    expected, _ = answer(model_of("eager").float(), recording)
    got, same = answer(model_of(kernel), recording)
    assert same == kept
    error = (eager - expected).abs().max()
    assert (got - expected).abs().max() <= 2 * error
    assert error < 0.1 * expected.abs().max()
    # A near tie may fall otherwise, once for each image.
    for sample in zip(kept, answer(model_of(kernel), pruner)[1], strict=True):
        for one, other in zip(*sample, strict=True):
            assert len(set(one.kept) & set(other.kept)) >= len(one.kept) - 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_keep_all_is_bit_equal(kernel: str) -> None:
    model, inputs = model_of(kernel), inputs_of()
    with torch.no_grad():
        dense = model(**inputs).logits
        with pore.FastV(keep=N)(model):
            assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static", "static"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_caches(pruner: Any, cache: str) -> None:
    """Where offloading really moves what is cached, the tokens are those of the plain cache."""
    model, inputs = model_of("sdpa"), inputs_of()
    settings = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), pruner(model) as run:
        plain = model.generate(**inputs, **settings)
        other = model.generate(
            **inputs, **settings, cache_implementation=cache, disable_compile=True
        )
    assert torch.equal(plain, other)
    images = [sample.images for sample in run.report]
    assert images[:2] == images[2:]
