"""Vision towers without a CLS token (SigLIP): what takes its place, and that the report says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pore
from helpers.flops import sdpa_on_cpu
from helpers.models import N, batch, prompt, tiny_llava, tiny_siglip_llava
from pore.errors import InputError

KEEP = 6
RANKING = [
    pore.FasterVLM(keep=KEEP),
    pore.VTCCLS(keep=KEEP, start_layer=1),
    pore.VisPruner(keep=KEEP),
    pore.VisionZip(keep=KEEP),
    pore.PruMerge(keep=KEEP),
    pore.PruMergePlus(keep=KEEP),
]
INPUTS = batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)])


def received(model: Any) -> Tensor:
    """(S, I, N) attention that patches receive in every layer, by transformers' own eager code."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        found = tower(INPUTS["pixel_values"], output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    return torch.stack(found).mean((2, 3))


def kept(run: pore.Run) -> list[list[int]]:
    return [list(image.kept) for sample in run.report for image in sample.images]


@pytest.mark.parametrize("read", [-2, -1])
class TestScores:
    def run(self, pruner: Any, read: int) -> tuple[Any, pore.Run]:
        model = tiny_siglip_llava(read=read)
        with torch.no_grad(), pruner(model) as run:
            model(**INPUTS)
        return model, run

    def test_fastervlm_takes_the_mean_attention_received(self, read: int) -> None:
        model, run = self.run(pore.FasterVLM(keep=KEEP), read)
        best = received(model)[read].topk(KEEP).indices.sort(-1).values  # layers as hidden states
        assert kept(run) == best.tolist()

    def test_vtc_cls_sums_it_over_layers(self, read: int) -> None:
        model, run = self.run(pore.VTCCLS(keep=KEEP, start_layer=1), read)
        total = received(model)[1 : 5 + read].sum(0)
        assert kept(run) == total.topk(KEEP).indices.sort(-1).values.tolist()

    def test_visionzip_keeps_patches_only(self, read: int) -> None:
        model, run = self.run(pore.VisionZip(keep=KEEP, contextual=2), read)
        best = received(model)[read].topk(KEEP - 2).indices.sort(-1).values
        assert [row[: KEEP - 2] for row in kept(run)] == best.tolist()
        assert all(image.extra == 0 for sample in run.report for image in sample.images)

    def test_prumerge_takes_the_last_layer_as_one_head(self, read: int) -> None:
        model, run = self.run(pore.PruMerge(keep=KEEP), read)
        layer = model.model.vision_tower.encoder.layers[-1]
        seen: list[Tensor] = []
        hook = layer.layer_norm1.register_forward_hook(lambda _, __, output: seen.append(output))
        with torch.no_grad():
            model.model.vision_tower(INPUTS["pixel_values"])
            hook.remove()
            q, k = layer.self_attn.q_proj(seen[0]), layer.self_attn.k_proj(seen[0])
        scores = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)
        assert kept(run) == scores.topk(KEEP - 1).indices.tolist()
        assert all(image.extra == 1 for sample in run.report for image in sample.images)

    def test_tome_merges_any_patch(self, read: int) -> None:
        """Of an even number the first half are sources: patch 0 is protected by nothing."""
        _, run = self.run(pore.ToMe(r=[N // 2]), read)
        assert [sorted(row) for row in kept(run)] == [list(range(1, N, 2))] * 3


@pytest.mark.parametrize("pruner", RANKING, ids=repr)
def test_the_report_says_what_was_used(pruner: pore.Pruner) -> None:
    for model, notes in ((tiny_siglip_llava(), 1), (tiny_llava(tower_layers=4), 0)):
        with torch.no_grad(), pruner(model) as run:
            model(**INPUTS)
        assert len(run.report.notes) == notes
        assert run.report.to_dict()["notes"] == list(run.report.notes)
        assert ("no CLS token" in str(run.report)) == bool(notes)


@pytest.mark.parametrize("pruner", [pore.ToMe(keep=KEEP), pore.FastV(keep=KEEP)], ids=repr)
def test_nothing_is_said_where_no_attention_of_the_tower_is_read(pruner: pore.Pruner) -> None:
    model = tiny_siglip_llava()
    with torch.no_grad(), pruner(model) as run:
        model(**INPUTS)
    assert run.report.notes == ()


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("pruner", [pore.FastV(keep=KEEP), pore.ToMe(keep=KEEP)], ids=repr)
def test_flops_of_the_tower(pruner: pore.Pruner, head: bool) -> None:
    """PyTorch's own count of the tower's modules, pooling head included."""
    model = tiny_siglip_llava(head=head, dtype=torch.float32)
    inputs = dict(INPUTS, pixel_values=INPUTS["pixel_values"].float())
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: sdpa_on_cpu})
    ends = (".self_attn", ".mlp", ".patch_embedding", ".head.attention")
    with torch.no_grad(), pruner(model) as run, counter:
        model(**inputs)
    counted = sum(
        sum(operations.values())
        for name, operations in counter.flop_counts.items()
        if "vision_tower" in name and name.endswith(ends)
    )
    assert counted == sum(sample.cost.tower for sample in run.report)


def test_a_cls_token_among_the_patches_is_refused() -> None:
    """CLIP with the "full" strategy hands its CLS token on, which is no patch to choose."""
    model = tiny_llava()
    model.config.vision_feature_select_strategy = "full"
    ids = torch.nn.functional.pad(
        INPUTS["input_ids"][:1], (1, 0), value=model.config.image_token_id
    )
    with (
        torch.no_grad(),
        pytest.raises(InputError, match="vision_feature_select_strategy='default'"),
        pore.VisionZip(keep=KEEP)(model),
    ):
        model(input_ids=ids, pixel_values=INPUTS["pixel_values"][:1])
