"""Batches of videos with questions, and what the model answers about them."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from model import hidden, visual_features
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration
from visual import Turn, VisualBatch, pack

from pore.embedded import videos
from pore.embedded.asking import Question
from pore.embedded.drawing import opacity
from pore.embedded.splits import Split
from pore.embedded.things import BOX, SIDE, Thing

POOLED = 6
"""Rows and columns of visual tokens of a frame: 12 x 12, averaged two by two."""

VISUAL = videos.FRAMES * POOLED**2

_SHOWN = 16 * 255
"""How much of a token's square an object must cover to be shown by it, in units of 1/255 pixel."""


def video_features(model: LlavaForConditionalGeneration, films: np.ndarray) -> Tensor:
    """Features of the frozen tower, averaged two by two: ``(B, 288, 128)``.

    Args:
        model: The model.
        films: ``(B, 8, 96, 96, 3)`` uint8.
    """
    features = visual_features(model, films.reshape(-1, SIDE, SIDE, 3))
    grid = features.transpose(1, 2).reshape(len(features), -1, 2 * POOLED, 2 * POOLED)
    pooled = functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    return pooled.reshape(len(films), VISUAL, -1)


def shown(thing: Thing | None, frame: int) -> np.ndarray:
    """``(288,)`` bool: the visual tokens that show an object in a frame, counted from 1."""
    found = np.zeros((videos.FRAMES, POOLED**2), bool)
    if thing is not None:
        half, width = BOX // 2, SIDE // POOLED
        cover = np.zeros((SIDE, SIDE), np.int32)
        cover[thing.y - half : thing.y + half, thing.x - half : thing.x + half] = opacity(thing)
        total = cover.reshape(POOLED, width, POOLED, width).sum((1, 3)).reshape(-1)
        found[frame - 1] = total >= min(_SHOWN, total.max())
    return found.reshape(-1)


def turn_of(tracks: tuple[videos.Track, ...], question: Question) -> Turn:
    """A question about a video as a turn, with the visual tokens that it is about.

    They are those of the object in its first frame and in the last, or in the one that is asked
    about. For the frame in which an object appears they are those of every frame that shows it,
    to be counted.
    """
    track = next(t for t in tracks if f" {t.thing.phrase} " in question.question)
    first = shown(track.at(track.first), track.first)
    last = shown(track.last, videos.FRAMES)
    counted = None
    if question.kind == "moment" or question.question.endswith("start?"):
        last = first
    elif question.question.endswith("end?"):
        first = last
    if question.kind == "moment":
        frames = range(2, videos.FRAMES + 1)
        counted = np.stack([shown(track.at(frame), frame) for frame in frames])
    return Turn(question.question, question.answer, np.stack([first, last]), counted)


def video_batch(tokenizer: Tokenizer, split: Split, first: int, size: int) -> VisualBatch:
    """Questions about ``size`` videos: all, but as many of what does not move as of what does."""
    films, turns = [], []
    for index in range(first, first + size):
        tracks = videos.tracks_of(split, index)
        films.append(videos.frames(split, index, tracks))
        found = videos.candidates(tracks)
        moving = len(found["direction"])
        still = [q for q in found["motion"] if q.answer == "no"]
        chosen = np.random.default_rng([index, 3]).permutation(len(still))[:moving]
        found["motion"] = [q for q in found["motion"] if q.answer == "yes"]
        found["motion"] += [still[i] for i in chosen]
        asked = [q for questions in found.values() for q in questions]
        turns.append([turn_of(tracks, q) for q in asked])
    return pack(tokenizer, np.stack(films), turns, VISUAL)


def report(model: LlavaForConditionalGeneration, tokenizer: Tokenizer, n: int) -> dict[str, object]:
    """Exact answers per kind on ``n`` questions about calibration videos.

    An answer is exact when every one of its tokens and the end token have the highest logit,
    which is what greedy decoding then writes.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    asked = list(videos.questions("calibration", n))
    for start in range(0, n, 40):
        part = asked[start : start + 40]
        turns = [[turn_of(v.tracks, v.question)] for v in part]
        batch = pack(tokenizer, np.stack([v.frames for v in part]), turns, VISUAL)
        with torch.autocast("cpu", torch.bfloat16):
            features = video_features(model, batch.images)
            states = hidden(model, batch.ids, features, batch.mask, batch.positions)
            best = model.lm_head(states).argmax(-1)
        same = (best == batch.targets) | (batch.targets < 0)
        for video, exact in zip(part, same.all(1).tolist(), strict=True):
            right[video.question.kind].append(exact)
    every = [r for kind in right.values() for r in kind]
    return {
        "accuracy": round(float(np.mean(every)), 4),
        "by_kind": {kind: round(float(np.mean(r)), 3) for kind, r in right.items()},
    }
