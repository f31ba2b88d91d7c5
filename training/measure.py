"""What is measured while training: accuracy per question kind, and attention over position."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from corpus import DESCRIBE, VISUAL_TOKENS, TextStage, encode, special
from model import hidden, visual_features
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pore.embedded import scenes
from pore.embedded.asking import Question, describe

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 50
FIRST_VISUAL = 4
"""Position of the first visual token: after the start token and ``USER:`` with its space."""


def attention_over_span(
    model: LlavaForConditionalGeneration,
    ids: Tensor,
    ends: Tensor,
    features: Tensor | None = None,
    first: int = FIRST_VISUAL,
) -> np.ndarray:
    """Attention of the last prompt token to 144 positions, at every layer.

    Args:
        model: The model, in evaluation mode.
        ids: ``(B, T)`` token ids, padded on the right.
        ends: ``(B,)`` index of the last prompt token.
        features: ``(B, 144, 128)`` from the tower, or None for text.
        first: First of the 144 positions.

    Returns:
        ``(layers, 144)``: softmax over the whole prompt, mean over heads and samples.
    """
    decoder = model.model.language_model
    inputs: dict[int, Tensor] = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, __, kwargs, i=i: inputs.update({i: kwargs["hidden_states"].detach()}),
            with_kwargs=True,
        )
        for i, layer in enumerate(decoder.layers)
    ]
    hidden(model, ids, features)
    for hook in hooks:
        hook.remove()
    rows = torch.arange(len(ids))
    blocked = torch.arange(ids.shape[1])[None] > ends[:, None]
    found = []
    for i, layer in enumerate(decoder.layers):
        states, attention = inputs[i].float(), layer.self_attn
        shape = (*states.shape[:2], -1, attention.head_dim)
        query = attention.q_proj(states).view(shape).transpose(1, 2)
        key = attention.k_proj(states).view(shape).transpose(1, 2)
        cos, sin = decoder.rotary_emb(states, torch.arange(ids.shape[1])[None])
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        scores = torch.einsum("bhd,bhtd->bht", query[rows, :, ends], key) * attention.scaling
        weights = scores.masked_fill(blocked[:, None], -torch.inf).softmax(-1).mean(1)
        found.append(weights[:, first : first + VISUAL_TOKENS].mean(0))
    return torch.stack(found).double().numpy()


def exponential(curve: np.ndarray) -> dict[str, float]:
    """Least-squares fit of a·exp(b·i) to a mean attention curve, with the ratio of its ends."""
    i = np.arange(len(curve))
    rates = np.linspace(-0.08, 0.08, 3201)
    shapes = np.exp(rates[:, None] * (i - i.mean()))
    scale = shapes @ curve / (shapes**2).sum(1)
    error = ((scale[:, None] * shapes - curve) ** 2).sum(1)
    best = int(error.argmin())
    return {
        "b": round(float(rates[best]), 5),
        "r2": round(1 - float(error[best] / ((curve - curve.mean()) ** 2).sum()), 3),
        "last_over_first": round(float(curve[-12:].mean() / curve[:12].mean()), 2),
        "total": round(float(curve.sum()), 4),
    }


def fits(curves: list[np.ndarray]) -> list[dict[str, float]]:
    """`exponential` of every layer's mean over several ``(layers, 144)`` arrays."""
    return [exponential(curve) for curve in np.mean(curves, 0)]


def padded(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Sequences as one ``(B, T)`` tensor, padded on the right, and their last indices ``(B,)``."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [pad] * (longest - len(s)) for s in sequences])
    return ids, torch.tensor([len(s) - 1 for s in sequences])


def chunks(n: int) -> Iterator[list[tuple[scenes.Scene, Question]]]:
    """The calibration stream in pieces of `CHUNK` questions."""
    pairs = list(scenes.questions("calibration", n))
    for i in range(0, n, CHUNK):
        yield pairs[i : i + CHUNK]


def visual_report(
    model: LlavaForConditionalGeneration, tokenizer: Tokenizer, n: int
) -> dict[str, object]:
    """Exact answers per kind on calibration scenes, and the fit of the attention per layer.

    An answer is exact when every one of its tokens and the end token have the highest logit,
    which is what greedy decoding then writes.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    curves = []
    bos, eos, image, pad = special(tokenizer)
    for pairs in chunks(n):
        features = visual_features(model, np.stack([s.image for s, _ in pairs]))
        prompts = encode(tokenizer, [f"\n{q.question} ASSISTANT:" for _, q in pairs])
        answers = encode(tokenizer, [f" {q.answer}" for _, q in pairs])
        user = encode(tokenizer, ["USER: "])[0]
        starts = [[bos, *user, *[image] * VISUAL_TOKENS, *p] for p in prompts]
        full = [[*s, *a, eos] for s, a in zip(starts, answers, strict=True)]
        ids, _ = padded(full, pad)
        states = hidden(model, ids, features)
        for row, (start, answer, (_, q)) in enumerate(zip(starts, answers, pairs, strict=True)):
            span = slice(len(start) - 1, len(start) + len(answer))
            best = model.lm_head(states[row, span]).argmax(-1).tolist()
            right[q.kind].append(best == [*answer, eos])
        ids, ends = padded(starts, pad)
        curves.append(attention_over_span(model, ids, ends, features, 1 + len(user)))
    every = [r for kind in right.values() for r in kind]
    return {
        "accuracy": round(float(np.mean(every)), 4),
        "by_kind": {kind: round(float(np.mean(r)), 3) for kind, r in right.items()},
        "bias": fits(curves),
    }


def text_report(
    model: LlavaForConditionalGeneration, tokenizer: Tokenizer, data: TextStage
) -> dict[str, object]:
    """Held-out perplexity, answers about scenes in words, and the attention over English.

    For the attention, 144 tokens of held-out English stand where the image will be.
    """
    rng = np.random.default_rng(5)
    rows = torch.from_numpy(data.english_rows(rng, 48, held_out=True))
    logits = model.lm_head(hidden(model, rows)[:, :-1]).flatten(0, 1)
    perplexity = functional.cross_entropy(logits, rows[:, 1:].flatten()).exp().item()

    right: dict[str, list[bool]] = defaultdict(list)
    curves = []
    bos, eos, _, pad = special(tokenizer)
    user = encode(tokenizer, ["USER:"])[0]
    for pairs in chunks(350):
        told = [rng.permutation([describe(t) for t in s.things]) for s, _ in pairs]
        texts = [
            f"USER: {' '.join(t)}\n{q.question} ASSISTANT:"
            for t, (_, q) in zip(told, pairs, strict=True)
        ]
        starts = [[bos, *p] for p in encode(tokenizer, texts)]
        answers = encode(tokenizer, [f" {q.answer}" for _, q in pairs])
        ids, _ = padded([[*s, *a, eos] for s, a in zip(starts, answers, strict=True)], pad)
        states = hidden(model, ids)
        for row, (start, answer, (_, q)) in enumerate(zip(starts, answers, pairs, strict=True)):
            span = slice(len(start) - 1, len(start) + len(answer))
            best = model.lm_head(states[row, span]).argmax(-1).tolist()
            right[q.kind].append(best == [*answer, eos])
        english = data.english_rows(rng, len(pairs), held_out=True)[:, 1 : VISUAL_TOKENS + 1]
        prompts = encode(tokenizer, [f"\n{DESCRIBE} {q.question} ASSISTANT:" for _, q in pairs])
        starts = [[bos, *user, *e, *p] for e, p in zip(english.tolist(), prompts, strict=True)]
        ids, ends = padded(starts, pad)
        curves.append(attention_over_span(model, ids, ends, first=1 + len(user)))
    return {
        "perplexity": round(perplexity, 2),
        "accuracy": round(float(np.mean([r for kind in right.values() for r in kind])), 4),
        "by_kind": {kind: round(float(np.mean(r)), 3) for kind, r in right.items()},
        "bias": fits(curves),
    }
