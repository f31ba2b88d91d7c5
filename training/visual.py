"""Batches of pictures with text: several independent turns after one image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from corpus import DESCRIBE, VISUAL_TOKENS, encode, special
from tokenizers import Tokenizer
from torch import Tensor

from pore.embedded import scenes
from pore.embedded.asking import MAX_COUNT, Question, candidates, describe
from pore.embedded.splits import Split
from pore.embedded.things import Thing
from tower import patch_labels

MORE = {"relation": 8, "count": 3}
"""How many extra questions of the two hardest kinds follow an image."""


@dataclass
class VisualBatch:
    """One batch.

    Attributes:
        images: ``(B, 96, 96, 3)`` uint8; of videos ``(B, 8, 96, 96, 3)``.
        ids: ``(B, T)`` token ids.
        targets: ``(B, T)``: the next token where the next token is part of an answer, else -1.
        mask: ``(B, 1, T, T)`` bool: every turn sees the image, itself, and no other turn.
        positions: ``(B, T)``: every turn continues after the image, as if it were the only turn.
        asked: ``(Q, 2)``: row and index of the last prompt token of every turn with a referent.
        referents: ``(Q, 2, V)`` bool, V visual tokens: the patches that show the first and the
            second thing that the turn asks about; twice the same if there is only one.
        counting: ``(C, 2)``: row and index of the last prompt token of every question about a
            count.
        counted: ``(C, most, V)`` bool: the patches that show each of the things to be counted;
            rows without a patch if there are fewer.
    """

    images: np.ndarray
    ids: Tensor
    targets: Tensor
    mask: Tensor
    positions: Tensor
    asked: Tensor
    referents: Tensor
    counting: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Turn:
    """A question and its answer, with the patches it is about.

    Attributes:
        question: The text.
        answer: The answer.
        referents: ``(2, V)`` bool, or None if nothing in the image is asked about.
        counted: ``(most, V)`` bool for a question about a count, otherwise None.
    """

    question: str
    answer: str
    referents: np.ndarray | None = None
    counted: np.ndarray | None = None


def things_asked(question: str, things: tuple[Thing, ...]) -> list[Thing]:
    """The objects that a question is about, in the order in which it names them."""
    words = question.rstrip("?").split()
    if words[0] == "Which":
        return [t for t in things if (t.category, t.color) == (words[1], words[3])]
    if words[:3] == ["How", "many", "objects"]:
        return [t for t in things if t.color == words[4]]
    if words[0] == "How":
        noun = "cross" if words[2] == "crosses" else words[2].removesuffix("s")
        return [t for t in things if noun in (t.category, t.name)]
    if words[0] == "What":
        return [t for t in things if t.noun in question]
    return sorted(
        (t for t in things if t.phrase in question), key=lambda t: question.index(t.phrase)
    )


def turns_of(things: tuple[Thing, ...], questions: Iterable[Question]) -> list[Turn]:
    """Questions about a scene as turns, with the patches that they are about."""
    labels = patch_labels(things)
    turns = []
    for q in questions:
        asked = things_asked(q.question, things)
        covers = [np.logical_and(labels[:, 2] == t.y // 8, labels[:, 3] == t.x // 8) for t in asked]
        if not asked:
            referents = None
        elif q.kind == "relation":
            referents = np.stack(covers)
        else:
            referents = np.stack([np.any(covers, 0)] * 2)
        counted = None
        if q.kind == "count":
            counted = np.zeros((MAX_COUNT, VISUAL_TOKENS), bool)
            for one, cover in zip(counted, covers, strict=False):
                one |= cover
        turns.append(Turn(q.question, q.answer, referents, counted))
    return turns


def question_batch(
    tokenizer: Tokenizer,
    split: Split,
    first: int,
    size: int,
    objects: tuple[int, int],
    extra: dict[str, int] = MORE,
) -> VisualBatch:
    """A question of each kind about ``size`` scenes, and ``extra`` more of some kinds."""
    drawn = [scenes.scene(split, first + i, objects, each=1) for i in range(size)]
    turns = []
    for i, s in enumerate(drawn):
        rng = np.random.default_rng([first + i, 4])
        options = candidates(s.things, rng)
        more = [q for kind, n in extra.items() for q in spread(options[kind], n, rng)]
        turns.append(turns_of(s.things, dict.fromkeys([*s.questions, *more])))
    return pack(tokenizer, np.stack([s.image for s in drawn]), turns)


def spread(options: list[Question], n: int, rng: np.random.Generator) -> list[Question]:
    """Up to ``n`` of ``options``; rare answers are as likely as frequent ones."""
    if not options:
        return []
    frequency = Counter(q.answer for q in options)
    weights = np.array([1 / frequency[q.answer] for q in options])
    n = min(n, len(options))
    chosen = rng.choice(len(options), n, replace=False, p=weights / weights.sum())
    return [options[i] for i in chosen]


def instruction_batch(
    tokenizer: Tokenizer, split: Split, first: int, size: int, objects: tuple[int, int]
) -> VisualBatch:
    """A question of each kind about ``size`` scenes, and a description of all that they show.

    A description names the objects in random order: every word of it must be found in the image,
    which teaches what belongs together far more densely than questions do.
    """
    drawn = [scenes.scene(split, first + i, objects, each=1) for i in range(size)]
    turns = []
    for i, s in enumerate(drawn):
        order = np.random.default_rng([first + i, 3]).permutation(len(s.things))
        told = " ".join(describe(s.things[k]) for k in order)
        turns.append([Turn(DESCRIBE, told), *turns_of(s.things, s.questions)])
    return pack(tokenizer, np.stack([s.image for s in drawn]), turns)


def pack(
    tokenizer: Tokenizer, images: np.ndarray, turns: list[list[Turn]], visual: int = VISUAL_TOKENS
) -> VisualBatch:
    """Put turns after their image so that each is computed as if it were alone.

    Args:
        tokenizer: The tokenizer.
        images: An image, or a video, for every row.
        turns: The turns about each.
        visual: How many visual tokens each becomes.
    """
    bos, eos, image, pad = special(tokenizer)
    prefix = [bos, *encode(tokenizer, ["USER: "])[0], *[image] * visual]
    flat = [turn for row in turns for turn in row]
    prompts = iter(encode(tokenizer, [f"\n{turn.question} ASSISTANT:" for turn in flat]))
    answers = iter(encode(tokenizer, [f" {turn.answer}" for turn in flat]))
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    asked, referents, counting, counted = [], [], [], []
    for row in turns:
        ids, targets = list(prefix), [-1] * len(prefix)
        owner, positions = [0] * len(prefix), list(range(len(prefix)))
        for k, turn in enumerate(row, 1):
            prompt, answer = next(prompts), next(answers)
            if turn.referents is not None:
                asked.append((len(rows), len(ids) + len(prompt) - 1))
                referents.append(turn.referents)
            if turn.counted is not None:
                counting.append((len(rows), len(ids) + len(prompt) - 1))
                counted.append(turn.counted)
            ids += [*prompt, *answer]
            targets += [-1] * (len(prompt) - 1) + [*answer, eos]
            n = len(prompt) + len(answer)
            owner += [k] * n
            positions += range(len(prefix), len(prefix) + n)
        rows.append((ids, targets, owner, positions))
    longest = max(len(ids) for ids, *_ in rows)

    def rectangle(which: int, fill: int) -> Tensor:
        return torch.tensor([r[which] + [fill] * (longest - len(r[which])) for r in rows])

    owner_of = rectangle(2, -1)
    own = (owner_of[:, :, None] == owner_of[:, None, :]) | (owner_of[:, None, :] == 0)
    mask = own & torch.ones(longest, longest, dtype=torch.bool).tril()
    return VisualBatch(
        images=images,
        ids=rectangle(0, pad),
        targets=rectangle(1, -1),
        mask=mask[:, None],
        positions=rectangle(3, 0),
        asked=torch.tensor(asked),
        referents=torch.from_numpy(np.stack(referents)),
        counting=torch.tensor(counting),
        counted=torch.from_numpy(np.stack(counted)),
    )
