"""What cannot be is refused, and the message says what to do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import pore
from helpers.engine import P, fingerprint
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from pore.errors import InputError, ModelStateError, PoreError, UnsupportedModelError


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
            pytest.raises(ValueError, match=r"not a whole number|do not match"),
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
