"""Towers that do not look at padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from cases.base import noise
from helpers.towers import MERGED, attentions, seen, squares
from pore.methods.prumerge import attention_and_keys
from pore.tensors.attention import cls_attention, received_attention, visible

KEEP = 6


class TestPadding:
    """Idefics3 pads images that it does not cut: its tower does not look at what is not there."""

    case = next(case for case in MERGED if case.name == "SmolVLM")

    def inputs(self) -> dict[str, Tensor]:
        inputs = self.case.inputs([[5, -2, 6, -4, 7, 8]])
        mask = torch.ones(1, 2, 32, 32, dtype=torch.bool)
        mask[:, 0, :, 20:] = False  # three columns of eight, so that some tokens are half padding
        return {**inputs, "pixel_attention_mask": mask}

    def test_attention_is_that_of_what_is_there(self) -> None:
        inputs = self.inputs()
        view, found = seen(self.case, inputs), attentions(self.case, inputs)
        assert view.real is not None
        assert view.real.sum(1).tolist() == [40, 64]
        assert bool((view.cls_attention[:, 0].unflatten(-1, (4, 4))[..., 3:] == 0).all())
        expected = squares(found[..., None], 2)[..., 0]
        torch.testing.assert_close(view.cls_attention, expected, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("pruner", [pore.FasterVLM, pore.HiPrune, pore.PruMerge])
    def test_an_image_is_pruned_as_by_itself(self, pruner: Any) -> None:
        model, inputs = self.case.model(), self.inputs()
        settings = {"object_layer": 0} if pruner is pore.HiPrune else {}
        reports = []
        with torch.no_grad(), pruner(KEEP, **settings)(model) as run:
            model(**inputs)
            reports += run.report.samples[-1].images
            for i in range(2):
                pixels = {name: inputs[name][:, i : i + 1] for name in inputs if "pixel" in name}
                model(**{**self.case.inputs([[5, -2, 6]]), **pixels})
                reports += run.report.samples[-1].images
        assert [image.kept for image in reports[:2]] == [image.kept for image in reports[2:]]

    def test_heads_taken_as_one(self) -> None:
        """PruMerge's own attention, by hand on what is there."""
        view = seen(self.case, self.inputs())
        scores, keys = attention_and_keys(view)
        query, key = (x[0][0].transpose(0, 1).flatten(1) for x in (view.queries, view.keys))
        there = view.real[0]  # type: ignore[index]
        weights = torch.zeros(64, dtype=torch.float64)
        logits = query[there] @ key[there].mT * query.shape[1] ** -0.5
        weights[there] = logits.softmax(-1).mean(0)
        torch.testing.assert_close(scores[0], squares(weights[:, None], 2)[:, 0])
        torch.testing.assert_close(keys[0], squares(key, 2))

    def test_keeping_all_is_bit_equal(self) -> None:
        model, inputs = self.case.model(), self.inputs()
        with torch.no_grad():
            dense = model(**inputs).logits
            with pore.VisionZip(1.0)(model):
                assert torch.equal(model(**inputs).logits, dense)


class TestMasks:
    """What a tower's kernel is given to leave padding out, in the forms that kernels take."""

    there = torch.tensor([[True, True, False, True], [True] * 4])

    @pytest.mark.parametrize("form", ["bool", "additive", "padding"])
    def test_what_is_seen(self, form: str) -> None:
        mask = self.there[:, None, None].expand(-1, 1, 4, -1)
        if form == "additive":
            mask = torch.zeros(2, 1, 4, 4).masked_fill(~mask, torch.finfo(torch.float32).min)
        elif form == "padding":
            mask = self.there.long()
        seen = visible(mask, 2)
        assert seen is not None
        assert torch.equal(seen, self.there)
        assert visible(mask[1:], 2) is None

    def test_one_mask_for_all(self) -> None:
        seen = visible(self.there[:1, None, None].expand(-1, 1, 4, -1), 3)
        assert seen is not None
        assert seen.tolist() == [self.there[0].tolist()] * 3
        assert visible(None, 3) is None

    @pytest.mark.parametrize("read", [cls_attention, received_attention])
    def test_attention_is_that_without_padding(self, read: Any) -> None:
        query, key = noise(1, 2, 3, 4, 5), noise(2, 2, 3, 4, 5)
        alone = [0, 1, 3]
        expected = torch.zeros(3, 4, dtype=torch.float64)
        expected[:, alone] = read(query[:1, :, alone], key[:1, :, alone], 0.5)[0]
        got = read(query, key, 0.5, self.there)
        torch.testing.assert_close(got[0], expected)
        torch.testing.assert_close(got[1:], read(query[1:], key[1:], 0.5))
