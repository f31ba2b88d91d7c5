"""Letterbox padding, number formats, gradients, offloaded weights, prompts given as embeddings."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from helpers.engine import BATCHES, P
from helpers.models import IMAGE, batch, prompt, tiny_llava
from helpers.recording import Recording
from pore.errors import InputError


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
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        recording = Recording(pore.FastV(keep=4, reweight=P))
        with torch.inference_mode(), recording(model):
            out = model(**inputs).logits
        assert [seen.view.attention.dtype for seen in recording.seen] == [torch.float32]
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
