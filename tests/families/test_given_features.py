"""Features of images that the caller made and gives in place of pixels."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import pore
from cases import CASES
from cases.base import Case
from helpers.families import PROMPTS
from pore.errors import InputError
from pore.families.registry import family_of


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_features_without_sizes_are_refused_in_words(case: Case, kind: str) -> None:
    """`generate` leaves out the sizes that came with them; a call of the model itself need not."""
    model: Any = case.model()
    encode = getattr(model.base_model, f"get_{kind}_features", None)
    taken = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if (
        encode is None
        or not taken
        or case.name == "Llama 4"
        or not (kind == "image" or case.videos)
    ):
        pytest.skip("this model takes no such features")
    inputs = case.inputs(PROMPTS["several" if kind == "image" else "videos"])
    names = inspect.signature(encode).parameters
    sizes = family_of(model).encodes if kind == "image" else True
    pruner = pore.FastV(keep=4, layer=2)
    given: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    with torch.inference_mode():
        features = encode(**{n: v for n, v in inputs.items() if n in names}, return_dict=True)
        rest = {n: v for n, v in inputs.items() if not n.startswith("pixel_values")}
        with pruner(model) as run:
            expected = model.generate(**inputs, **given)
        refused = pytest.raises(InputError, match=f"Features of {kind}s were given")
        with pruner(model) as again, refused if sizes else nullcontext():
            found = model.generate(**rest, mm_encoder_outputs={kind: features}, **given)
    if not sizes:
        assert torch.equal(found, expected)
        assert str(again.report) == str(run.report)
