"""Positions on three axes: what two looks at a prompt make is what transformers makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES
from pore.serving.vllm.positions import (
    COLUMNS,
    place_columns,
    places_of,
    prompt_positions,
    with_places,
)

QWEN = next(case for case in CASES if case.name == "Qwen2.5-VL")
PROMPTS = [
    [5, 6, -1, 7, 8, 9],
    [-1, 7],
    [5, -1, 6, -2, 7, 8],
    [5, 6, 7, -2, -1, 8],
    [5, 6, 7],
]
KEPT = [[0, 3, 4, 11, 23], [1, 2, 8]]
"""Of images of 4 x 6 and 3 x 3 tokens."""


def original(prompt: list[int]) -> tuple[Tensor, Tensor, int]:
    """Positions of the tokens that are left, which of them are visual, and the next one."""
    inputs: dict[str, Any] = QWEN.inputs([prompt])
    model = QWEN.model().model
    ids = inputs["input_ids"][0]
    visual = ids == QWEN.placeholder
    places = {"input_ids": inputs["input_ids"], "mm_token_type_ids": inputs["mm_token_type_ids"]}
    if "image_grid_thw" in inputs:
        places["image_grid_thw"] = inputs["image_grid_thw"]
    positions, _ = model.get_rope_index(**places, attention_mask=inputs["attention_mask"])
    positions = positions[-3:, 0]
    stays = ~visual
    first = visual.nonzero()[:, 0]
    for image in [-1 - token for token in prompt if token < 0]:
        stays[first[KEPT[image]]] = True
        first = first[(24, 9)[image] :]
    return positions[:, stays], visual[stays], int(positions.max()) + 1


def pieces(images: list[int]) -> list[Tensor]:
    """(3, n) places in each image of what is left of it."""
    found = []
    for image in images:
        kept, width = torch.tensor(KEPT[image]), (6, 3)[image]
        found.append(torch.stack([torch.zeros_like(kept), kept // width, kept % width]))
    return found


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("cut", [0, 1, 3, 5, 7, 100])
def test_they_are_the_original_ones(prompt: list[int], cut: int) -> None:
    """In one step, or in two of which the first ends anywhere."""
    expected, visual, following = original(prompt)
    length = expected.shape[1]
    images = [-1 - token for token in prompt if token < 0]
    starts = (visual & ~torch.nn.functional.pad(visual, (1, 0))[:-1]).nonzero()[:, 0].tolist()
    sizes = [
        (start, len(KEPT[i]), max(((4, 6), (3, 3))[i]))
        for start, i in zip(starts, images, strict=True)
    ]
    positions, delta = prompt_positions(length, sizes)
    assert delta == following - length
    places = torch.cat(pieces(images), 1) if images else torch.empty(3, 0, dtype=torch.long)
    early = int(visual[:cut].sum())
    for part, computed in ((places[:, :early], 0), (places[:, early:], min(cut, length))):
        for _ in range(2):  # a request that was preempted does it again
            given = [part[:, :2], part[:, 2:]] if part.shape[1] else []
            positions = with_places(positions, visual, given, computed)
    assert torch.equal(positions, expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_places_survive_the_precision_of_a_row(kind: torch.dtype) -> None:
    """Of an image so wide that bfloat16 cannot count its columns."""
    width = 2000
    kept = torch.tensor([0, 255, 256, 257, 1999, 2000, 3 * width + 1023, 700 * width + 513])
    columns = place_columns(kept, width).to(kind)
    assert columns.shape == (len(kept), COLUMNS)
    expected = torch.stack([torch.zeros_like(kept), kept // width, kept % width])
    assert torch.equal(places_of(columns), expected)
