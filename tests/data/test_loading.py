"""Loading a model by name: what is refused, device maps, and weights in few bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pore
from helpers.checkpoint import save_checkpoint
from helpers.models import batch, prompt
from pore.data.loading import DEVICE_MAPS, load_model
from pore.data.quantizing import QUANTIZED
from pore.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def test_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(folder)
    with pytest.raises(InputError, match=r"'everywhere' is not a device map.*balanced_low_0"):
        load_model(name, device_map="everywhere")
    with pytest.raises(InputError, match="'cpu' and the device map 'auto' both say"):
        load_model(name, device="cpu", device_map="auto")
    with pytest.raises(InputError, match=r"'int3' is no way to quantise weights.*bnb-4bit"):
        load_model(name, quantize="int3")
    monkeypatch.setattr("pore.data.quantizing.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"needs accelerate: pip install 'pore-vlm\[interop\]'"):
        load_model(name, device_map="auto")
    with pytest.raises(InputError, match=r"\(quanto-int8\) needs optimum.quanto: pip install"):
        load_model(name, quantize="quanto-int8")


def test_quantised_weights_are_not_quantised_again(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantised already"):
        load_model(str(tmp_path), quantize="bnb-8bit")


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_a_device_map_loads_the_same_model(folder: Path, device_map: str) -> None:
    pytest.importorskip("accelerate")
    inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
    with torch.no_grad():
        expected = load_model(str(folder), device="cpu")[0](**inputs).logits
        spread = load_model(str(folder), device_map=device_map)[0]
        moved: Any = {name: value.to(spread.device) for name, value in inputs.items()}
        with pore.FastV(keep=0.5, layer=2)(spread) as run:
            spread(**moved)
        assert [len(image.kept) for image in run.report.samples[0].images] == [8]
        torch.testing.assert_close(spread(**moved).logits.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_weights_are_pruned_as_others(folder: Path, name: str) -> None:
    """All kept is the unpruned model to the last bit, and the logits are near those of before."""
    package = {"bnb": "bitsandbytes", "quanto": "optimum.quanto", "torchao": "torchao"}
    pytest.importorskip(package[name.split("-")[0]])
    inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
    with torch.no_grad():
        whole = load_model(str(folder), device="cpu")[0](**inputs).logits
        model = load_model(str(folder), device="cpu", quantize=name)[0]
        assert model.dtype == torch.float32
        dense = model(**inputs).logits
        assert not torch.equal(dense, whole)
        near = torch.nn.functional.cosine_similarity(dense.flatten(), whole.flatten(), dim=0)
        assert near > (0.7 if "4" in name else 0.99)
        with pore.FastV(keep=1.0)(model):
            assert torch.equal(model(**inputs).logits, dense)
        with pore.FastV(keep=0.25, layer=2)(model) as run:
            tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + 2
        assert [len(image.kept) for image in run.report.samples[0].images] == [4]
