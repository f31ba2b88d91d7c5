"""Golden files of VisionTrim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import pore
from helpers.golden_models import Worst, llava_of, visual_embeddings
from helpers.recording import Recording
from pore.methods.visiontrim import importance

_END_TO_END = {
    "cls_attention", "complement_indices", "dominant_indices", "hidden_states", "input_ids",
    "metric", "pixel_values", "text_attention_mask", "text_hidden", "tokens",
}  # fmt: skip


class _Given:
    """A tokenizer that gives what the file's gave: question "0" is the first."""

    def __init__(self, tensors: dict[str, Tensor], pad: int) -> None:
        self.pad_token_id = pad
        pairs = zip(tensors["input_ids"], tensors["text_attention_mask"].bool(), strict=True)
        self.rows = [ids[mask].tolist() for ids, mask in pairs]

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.rows[int(text)]}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    tensors, params, worst = file.tensors, file.params, Worst()
    if "local_importance" in tensors:
        pytest.skip("the authors' code computes this affinity and then does not use it")
    weights = {k.removeprefix("clip."): v for k, v in tensors.items() if k.startswith("clip.")}
    keys = {key for key in tensors if not key.startswith("clip.")}
    assert keys == _END_TO_END, keys ^ _END_TO_END
    clip = _clip(params, weights)
    width = params["vision_config"]["hidden_size"]
    vision = {k: v for k, v in weights.items() if k.startswith("vision_model.")}
    model = llava_of(params["vision_config"], vision, nn.Identity(), width)
    tokenizer = _Given(tensors, params["text_config"]["pad_token_id"])
    questions = pore.ClipQuestions(clip, tokenizer, [str(i) for i in range(params["B"])])
    ids, mask = tensors["input_ids"], tensors["text_attention_mask"]
    with torch.no_grad():
        worst.compare(clip.text_model(ids, mask).last_hidden_state, tensors["text_hidden"])
    total = params["dominant"] + params["complement"]
    alike = len(set(params["text_lengths"])) == 1
    for faithful in (True, False):
        method = pore.VisionTrim(total, questions, params["complement"], faithful=faithful)
        recording = Recording(method)
        got, run = visual_embeddings(model, recording, tensors["pixel_values"])
        kept = torch.tensor([image.kept for sample in run.report for image in sample.images])
        if not faithful and total == tensors["metric"].shape[1]:  # all stay, as they are
            assert kept.tolist() == [list(range(total))] * len(kept)
            worst.compare(got, tensors["hidden_states"][:, 1:])
            continue
        dominant, complement = kept.split([params["dominant"], params["complement"]], 1)
        assert torch.equal(dominant, tensors["dominant_indices"])
        if faithful or alike:  # questions of one length are not filled up
            assert torch.equal(complement, tensors["complement_indices"])
            worst.compare(got, tensors["tokens"])
    ((_, view, _),) = recording.seen
    worst.compare(view.cls_attention[0].mean(1), tensors["cls_attention"])
    worst.compare(importance(view, view.shown), tensors["metric"])
    worst.compare(view.features, tensors["hidden_states"][:, 1:])
    return worst.value


def _clip(params: dict[str, Any], weights: dict[str, Tensor]) -> CLIPModel:
    config = CLIPConfig(
        text_config=params["text_config"],
        vision_config=params["vision_config"],
        projection_dim=params["projection_dim"],
    )
    model = CLIPModel._from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("position_ids") for name in missing), missing
    return model
