"""Prompts built of samples: the same for one and for many."""

from __future__ import annotations

from dataclasses import replace

import torch

from helpers.calibrations import TEMPLATE, make_processor, make_samples
from helpers.models import IMAGE
from pore.data.prompts import build_inputs, prompt_template


def test_same_prompts_for_one_and_many() -> None:
    processor, samples = make_processor(), make_samples(4)
    many = build_inputs(processor, samples[:4])
    assert (many["attention_mask"][:, -1] == 1).all()
    for i, sample in enumerate(samples[:4]):
        one = build_inputs(processor, [sample])
        length = one["input_ids"].shape[1]
        assert torch.equal(many["input_ids"][i, -length:], one["input_ids"][0])
        assert (one["input_ids"] == 1).sum() == 1
        assert torch.equal(many["pixel_values"][i], one["pixel_values"][0])
    without = build_inputs(processor, [replace(samples[0], image=None), samples[1]])
    assert len(without["pixel_values"]) == 1
    assert (without["input_ids"][0] != IMAGE).all()


def test_template_with_its_own_start_token() -> None:
    processor, samples = make_processor(), make_samples(1)
    processor.chat_template = "<s> " + TEMPLATE
    assert (build_inputs(processor, samples[:1])["input_ids"] == 1).sum() == 1
    assert prompt_template(processor).startswith("<s> USER:")
