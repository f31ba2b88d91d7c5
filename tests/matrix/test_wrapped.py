"""Models that others have wrapped: LoRA of peft, int8 of torchao, offloading of accelerate.

Also linear layers of packed weights, as bitsandbytes has them, and caches that quanto and hqq
quantise. peft, torchao, quanto and hqq are of the extra `interop`, which `.ci/wrapped` installs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import QuantizedCache

import pore
from helpers.caches import check_quantized
from helpers.engine import fingerprint
from helpers.models import IMAGE, N, batch, prompt, tiny_llava

PRUNERS = [
    pore.FastV(keep=5),
    pore.FasterVLM(keep=5),
    pore.DivPrune(keep=5),
    pore.PyramidDrop(keep=4, layers=(2, 3)),
    pore.VisionZip(keep=5),
    pore.ToMe(keep=5),
    pore.FEATHER(keep=5, layers=(2, 3)),  # runs projections once more
    pore.HAWK(keep=5, weights=None),  # runs the first layer before the decoder does
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


class Packed(nn.Linear):
    """What bitsandbytes puts in the place of a linear layer, as far as it shows from outside.

    Two weights in a byte, so that `weight` has neither the layer's shape nor its dtype.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 7)
        levels = (weight / self.scale).round().flatten() + 8
        packed = (levels[::2] * 16 + levels[1::2]).to(torch.uint8)[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        levels = torch.cat([self.weight // 16, self.weight % 16], 1).to(states.dtype) - 8
        weight = levels.view(self.out_features, self.in_features) * self.scale
        return nn.functional.linear(states, weight, self.bias)


def pack_linear(model: nn.Module) -> None:
    """In tower, projector and decoder; bitsandbytes leaves the head alone."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(parent, name, Packed(child))


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_linear_layers_of_packed_weights(pruner: Any) -> None:
    """As the same weights unpacked; all kept is unpruned, and the model is left as it was."""
    model, plain = model_of(), model_of()
    pack_linear(model)
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            # One output for every input of a single 1: the columns of the weight.
            ones = torch.eye(module.in_features)
            bias = 0 if module.bias is None else module.bias
            plain.get_submodule(name).weight.data = (module(ones) - bias).detach().T.contiguous()
    dense = model(**inputs_of()).logits
    before = fingerprint(model)  # transformers puts hooks of its own on at the first call
    got, expected = answers(model, pruner), answers(plain, pruner)
    assert got[2] == expected[2]
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[1], expected[1])
    with pore.FastV(keep=N)(model):
        assert torch.equal(model(**inputs_of()).logits, dense)
    assert fingerprint(model) == before


def split(model: nn.Module, folder: Path) -> None:
    """Every other layer of tower and decoder on disk, as `device_map` puts them on devices."""
    places = {}
    for name, _ in model.named_parameters():
        module, _, rest = name.partition(".layers.")
        if rest:
            number = rest.split(".")[0]
            places[f"{module}.layers.{number}"] = "disk" if int(number) % 2 else "cpu"
        else:
            places[name] = "cpu"
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
@pytest.mark.parametrize("to", ["cpu", "disk", "map"])
@pytest.mark.parametrize("first", ["accelerate", "pore"])
def test_offloading(pruner: Any, to: str, first: str, tmp_path: Path) -> None:
    """Hooks of accelerate move the weights in and out; ours go on before theirs or after."""
    expected = answers(model_of(), pruner)
    model, inputs = model_of(), inputs_of()

    def offload() -> None:
        if to == "cpu":
            accelerate.cpu_offload(model, torch.device("cpu"))
        elif to == "disk":
            accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
        else:
            split(model, tmp_path)

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
