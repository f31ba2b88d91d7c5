"""Models that others have wrapped: LoRA of peft, int8 of torchao, offloading of accelerate.

Also caches that quanto and hqq quantise. All but accelerate are of the extra `interop`, which CI
installs for this file alone.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import QuantizedCache

import pore
from models import IMAGE, N, batch, prompt, tiny_llava
from test_caches import check_quantized
from test_engine import fingerprint

PRUNERS = [
    pore.FastV(keep=5),
    pore.FasterVLM(keep=5),
    pore.DivPrune(keep=5),
    pore.PyramidDrop(keep=4, layers=(2, 3)),
    pore.VisionZip(keep=5),
]
PROMPTS = [prompt(3, 1, 5), prompt(7, 1, 2, 1)]


def model_of(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_llava(dtype=dtype, tower_layers=4)


def inputs_of() -> dict[str, torch.Tensor]:
    return batch(PROMPTS, dtype=torch.float32)


def answers(model: Any, pruner: Any) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Prefill logits, generated tokens, and what was kept."""
    inputs = inputs_of()
    with torch.no_grad(), pruner(model) as run:
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return logits, tokens, [sample.images for sample in run.report]


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_lora(pruner: Any) -> None:
    """Adapters that change nothing yet: a wrapped model answers as the bare one, and so pruned."""
    peft = pytest.importorskip("peft")
    expected = answers(model_of(), pruner)
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=2)
    wrapped = peft.get_peft_model(model_of(), config)
    wrapped.generate(**inputs_of(), max_new_tokens=1)  # peft notes things of its own
    before = fingerprint(wrapped)
    got = answers(wrapped, pruner)
    assert fingerprint(wrapped) == before
    assert got[2] == expected[2]
    torch.testing.assert_close(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_lora_that_was_trained_changes_the_scores() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model_of(), config)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    got, expected = answers(wrapped, PRUNERS[0]), answers(merged, PRUNERS[0])
    assert got[2] == expected[2]
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    assert got[2] != answers(model_of(), PRUNERS[0])[2]


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_int8_weights(pruner: Any) -> None:
    """A batch equals its samples, and all kept is unpruned to the last bit."""
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of()
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model.model.language_model, config)
    logits, _, images = answers(model, pruner)
    assert all(len(image.kept) < N for sample in images for image in sample)
    alone = inputs_of()
    one = {
        "input_ids": torch.tensor([PROMPTS[0]]),
        "pixel_values": alone["pixel_values"][:1],
    }
    with torch.no_grad(), pruner(model) as run:
        single = model(**one).logits
    assert run.report.samples[0].images == images[0]
    torch.testing.assert_close(logits[0, -single.shape[1] :], single[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        dense = model(**alone).logits
        with pore.FastV(keep=N)(model):
            assert torch.equal(model(**alone).logits, dense)


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["accelerate", "pore"])
def test_offloading(pruner: Any, to: str, first: str, tmp_path: Path) -> None:
    """Hooks of accelerate move the weights in and out; ours go on before theirs or after."""
    expected = answers(model_of(), pruner)
    model, inputs = model_of(), inputs_of()

    def offload() -> None:
        if to == "cpu":
            accelerate.cpu_offload(model, torch.device("cpu"))
        else:
            accelerate.disk_offload(model, tmp_path, torch.device("cpu"))

    if first == "accelerate":
        offload()
        got = answers(model, pruner)
    else:
        with torch.no_grad(), pruner(model) as run:
            offload()
            logits = model(**inputs).logits
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        got = logits, tokens, [sample.images for sample in run.report]
    assert got[2] == expected[2]
    torch.testing.assert_close(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    # And unpruned again, the weights where they were put.
    with torch.no_grad():
        dense = model_of()(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, dense)
    assert (inputs["input_ids"] == IMAGE).any()


@pytest.mark.parametrize(
    ("backend", "package", "settings"),
    [
        ("quanto", "optimum.quanto", {"nbits": 4, "q_group_size": 8}),
        ("quanto", "optimum.quanto", {"nbits": 2, "q_group_size": 16}),
        ("hqq", "hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_quantized_caches(backend: str, package: str, settings: dict[str, int]) -> None:
    pytest.importorskip(package)
    check_quantized(lambda config: QuantizedCache(backend, config, **settings), torch.float32)
