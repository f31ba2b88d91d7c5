"""Batches of pictures with text: several independent turns behind one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from corpus import BOS, DESCRIBE, EOS, IMAGE, PAD, VISUAL_TOKENS, encode
from tokenizers import Tokenizer
from torch import Tensor

from pore.embedded import scenes


@dataclass
class VisualBatch:
    """One batch.

    Attributes:
        images: ``(B, 96, 96, 3)`` uint8.
        ids: ``(B, T)`` token ids.
        targets: ``(B, T)``: the next token where the next token is part of an answer, else -1.
        mask: ``(B, 1, T, T)`` bool: every turn sees the image, itself, and no other turn.
        positions: ``(B, T)``: every turn goes on from the image, as the only turn would.
    """

    images: np.ndarray
    ids: Tensor
    targets: Tensor
    mask: Tensor
    positions: Tensor


def question_batch(
    tokenizer: Tokenizer, split: scenes.Split, first: int, size: int, objects: tuple[int, int]
) -> VisualBatch:
    """All questions of ``size`` scenes, one turn each."""
    drawn = [scenes.scene(split, first + i, objects) for i in range(size)]
    turns = [[(q.question, q.answer) for q in s.questions] for s in drawn]
    return pack(tokenizer, np.stack([s.image for s in drawn]), turns)


def caption_batch(
    tokenizer: Tokenizer, split: scenes.Split, first: int, size: int, objects: tuple[int, int]
) -> VisualBatch:
    """Captions of ``size`` scenes."""
    drawn = [scenes.scene(split, first + i, objects) for i in range(size)]
    turns = [[(DESCRIBE, s.caption)] for s in drawn]
    return pack(tokenizer, np.stack([s.image for s in drawn]), turns)


def pack(
    tokenizer: Tokenizer, images: np.ndarray, turns: list[list[tuple[str, str]]]
) -> VisualBatch:
    """Lay turns behind their image so that each is what it would be alone."""
    bos, eos, image, pad = (tokenizer.token_to_id(t) for t in (BOS, EOS, IMAGE, PAD))
    prefix = [bos, *encode(tokenizer, ["USER: "])[0], *[image] * VISUAL_TOKENS]
    flat = [turn for row in turns for turn in row]
    prompts = iter(encode(tokenizer, [f"\n{q} ASSISTANT:" for q, _ in flat]))
    answers = iter(encode(tokenizer, [f" {a}" for _, a in flat]))
    rows = []
    for row in turns:
        ids, targets = list(prefix), [-1] * len(prefix)
        owner, positions = [0] * len(prefix), list(range(len(prefix)))
        for k in range(1, len(row) + 1):
            prompt, answer = next(prompts), next(answers)
            ids += [*prompt, *answer]
            targets += [-1] * (len(prompt) - 1) + [*answer, eos]
            n = len(prompt) + len(answer)
            owner += [k] * n
            positions += range(len(prefix), len(prefix) + n)
        rows.append((ids, targets, owner, positions))
    longest = max(len(ids) for ids, *_ in rows)
    fills = (pad, -1, -1, 0)
    ids, targets, owner, positions = (
        torch.tensor([r[i] + [fills[i]] * (longest - len(r[i])) for r in rows]) for i in range(4)
    )
    own = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = (own & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
    return VisualBatch(images, ids, targets, mask, positions)
