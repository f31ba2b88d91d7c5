"""The embedded checkpoint: it loads with stock transformers, and it answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pore.embedded import embedded_model, scenes


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(embedded_model()).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(embedded_model())


def prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def test_its_path_is_known_without_importing_torch() -> None:
    code = (
        "import importlib.util, sys; "
        "spec = importlib.util.spec_from_file_location('embedded', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "module.embedded_model(); assert 'torch' not in sys.modules"
    )
    path = Path(embedded_model()).with_name("__init__.py")
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_it_loads_in_float32(model: LlavaForConditionalGeneration) -> None:
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.image_seq_length == 144


def test_it_is_small() -> None:
    size = sum(p.stat().st_size for p in Path(embedded_model()).iterdir())
    assert size < 20e6


def test_the_prompt_is_that_of_llava(processor: Any) -> None:
    written = prompt(processor, "What color is the circle?")
    assert written == "USER: <image>\nWhat color is the circle? ASSISTANT:"


@pytest.mark.parametrize("size", [(96, 96), (31, 200), (640, 480)])
def test_any_image_becomes_144_visual_tokens(processor: Any, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    inputs = processor(images=image, text=prompt(processor, "Hello?"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 144


def test_it_answers(model: LlavaForConditionalGeneration, processor: Any) -> None:
    pairs = list(scenes.questions("test", 42))
    inputs = processor(
        images=[Image.fromarray(s.image) for s, _ in pairs],
        text=[prompt(processor, q.question) for _, q in pairs],
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=6)
    written = processor.batch_decode(
        out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = sum(w.strip() == q.answer for w, (_, q) in zip(written, pairs, strict=True))
    assert right >= 34
