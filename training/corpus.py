"""What the decoder reads: running English, and scenes told in words with questions about them.

The English comes from Python's standard library: docstrings and the help topics of `pydoc`. Scenes
in words have the form of the later visual prompt, with sentences in place of the image, so that the
decoder can look something up before it sees a picture.
"""

from __future__ import annotations

import ast
import inspect
import pydoc_data.topics
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pore.embedded.asking import caption, choose, describe
from pore.embedded.things import COLORS, DIGITS, LETTERS, PLACES, SHAPES, things_of

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
SPECIAL = ("<unk>", BOS, EOS, PAD, IMAGE)
VOCABULARY = 2048
VISUAL_TOKENS = 144
DESCRIBE = "Describe the picture."

ENGLISH_WEIGHT, CONTEXT_WEIGHT, ANSWER_WEIGHT = 1.0, 0.3, 3.0


@cache
def english() -> tuple[str, ...]:
    """Docstrings and help topics of the standard library, each once, in a fixed order."""
    found: dict[str, None] = dict.fromkeys(pydoc_data.topics.topics.values())
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 60:
                    found[inspect.cleandoc(text)] = None
    texts = list(found)
    order = np.random.default_rng(0).permutation(len(texts))
    return tuple(texts[i] for i in order)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE in which every word of the questions and answers is one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    told = []
    for i in range(3000):
        things = things_of("train", i)
        asked = choose(things, np.random.default_rng(i), 2)
        turns = " ".join(f"USER: {q.question} ASSISTANT: {q.answer}" for q in asked)
        told.append(f"{caption(things)}\n{DESCRIBE}\n{turns}")
    tokenizer.train_from_iterator([*english(), *told], trainer)
    bos = special(tokenizer)[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
            ),
        ]
    )
    _check_single_tokens(tokenizer)
    return tokenizer


def _check_single_tokens(tokenizer: Tokenizer) -> None:
    answers = [word for row in PLACES for region in row for word in region.split()]
    answers += [*COLORS, *SHAPES, *LETTERS, *DIGITS, "yes", "no"]
    words = [*answers, "ASSISTANT", "color", "letter", "digit", "Which", "objects", "crosses"]
    split = [w for w in words if len(encode(tokenizer, [" " + w])[0]) != 1]
    if split:
        raise ValueError(f"not one token each: {split}")


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of several texts, without special tokens added."""
    return [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def special(tokenizer: Tokenizer) -> tuple[int, int, int, int]:
    """Ids of the start, end, image and padding tokens."""
    bos, eos, image, pad = (tokenizer.token_to_id(t) or 0 for t in (BOS, EOS, IMAGE, PAD))
    return bos, eos, image, pad


class TextStage:
    """Batches for the language-model stage: half running English, half scenes in words."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        """Tokenize the English once; a twentieth of it is held out.

        Args:
            tokenizer: The tokenizer of `train_tokenizer`.
            length: Tokens in a sequence.
        """
        self.tokenizer, self.length = tokenizer, length
        self.bos, self.eos, _, self.pad = special(tokenizer)
        ids: list[int] = []
        for part in encode(tokenizer, english()):
            ids += [*part, self.eos]
        stream = np.array(ids)
        cut = len(stream) * 19 // 20
        self.train, self.held_out = stream[:cut], stream[cut:]

    def english_rows(self, rng: np.random.Generator, n: int, held_out: bool = False) -> np.ndarray:
        """``(n, length)`` windows of English, each after the start token."""
        stream = self.held_out if held_out else self.train
        starts = rng.integers(len(stream) - self.length, size=n)
        rows = np.stack([stream[s : s + self.length] for s in starts])
        rows[:, 0] = self.bos
        return rows

    def scene_row(
        self, index: int, rng: np.random.Generator, objects: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A scene in words, in random order, then as many turns about it as fit.

        Returns:
            ``(length,)`` token ids and ``(length,)`` weights of these tokens in the loss.
        """
        things = things_of("train", index, objects)
        told = " ".join(describe(things[i]) for i in rng.permutation(len(things)))
        turns = [(q.question, q.answer) for q in choose(things, rng, 3)]
        if rng.random() < 0.25:
            turns.insert(0, (DESCRIBE, caption(things)))
        texts = [f"USER: {told}\n{turns[0][0]} ASSISTANT:"]
        texts += [f"USER: {question} ASSISTANT:" for question, _ in turns[1:]]
        parts = encode(self.tokenizer, [*texts, *(f" {answer}" for _, answer in turns)])
        ids, weights = [self.bos], [0.0]
        for prompt, answer in zip(parts[: len(turns)], parts[len(turns) :], strict=True):
            ids += [*prompt, *answer, self.eos]
            weights += [CONTEXT_WEIGHT] * len(prompt)
            weights += [ANSWER_WEIGHT] * (len(answer) + 1)
        missing = self.length - len(ids)
        ids, weights = ids + [self.pad] * missing, weights + [0.0] * missing
        return np.array(ids[: self.length]), np.array(weights[: self.length], np.float32)

    def batch(
        self, step: int, size: int, objects: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and loss weights of one step, ``(size, length)`` each."""
        rng = np.random.default_rng([11, step])
        rows = self.english_rows(rng, size // 2)
        weights = np.full(rows.shape, ENGLISH_WEIGHT, np.float32)
        told = [
            self.scene_row(2_000_000 + step * size + i, rng, objects)
            for i in range(size - size // 2)
        ]
        return (
            np.concatenate([rows, np.stack([ids for ids, _ in told])]),
            np.concatenate([weights, np.stack([w for _, w in told])]),
        )
