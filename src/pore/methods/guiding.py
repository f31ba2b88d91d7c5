"""Makes a guide: a small model answers, and its attention is summed (SGL)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import EMBEDS, MASK, POSITIONS
from pore._compat.caches import cache_argument, cache_in
from pore._compat.models import SPARED_ROWS
from pore._compat.modules import unwrapped
from pore.bias.provenance import Provenance
from pore.changes import Changes
from pore.engine.images import marked_images
from pore.engine.masks import window_of
from pore.engine.run import unpruned
from pore.errors import InputError, ScoreError
from pore.families.registry import family_of, images_of
from pore.hooks import tap_attention
from pore.identity import identity
from pore.layout import Layout
from pore.methods.guides import GUIDE, GUIDED, Guide
from pore.tensors.attention import row_logits
from pore.tensors.gathering import widened

# How many query rows' attention, over all heads, is held in memory at a time.
_ROWS = 128


@torch.no_grad()
def guide(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    visual: Tensor | None = None,
) -> Guide:
    """Let a small model answer, and sum up the attention on its visual tokens (arXiv 2412.03324).

    Runs one greedy `generate`. Beside every layer's kernel, whichever it is, the softmax weights of
    some query rows are computed and summed over layers and heads. In the prompt these are the rows
    from the last visual token of each sample on (that token's own row included, as in the authors'
    code); in the answer, the row of every token that is fed back, which are all but the last.

    Args:
        model: The small vision-language model, not pruned; it is left as it was.
        inputs: Its processor's output for the prompts, padded on the left.
        max_new_tokens: Longest answer.
        visual: (B, L) bool, True at the visual tokens of prompts given as `inputs_embeds`; each
            unbroken run is one image.

    Returns:
        The guide.

    Raises:
        UnsupportedModelError: pore does not know the model's family.
        ModelStateError: The model is pruned.
        InputError: The prompts are padded on the right, or given as embeddings without `visual`.
        ScoreError: Attention holds NaN or infinity.
    """
    from transformers import LogitsProcessorList

    model = unpruned(model)
    family = family_of(model)
    layout = _layout(model, inputs, visual)
    rows, probabilities = _Rows(layout), _Probabilities()
    generate: Any = model.generate
    with Changes() as changes:
        if layout.images:
            decoder = family.decoder(model)
            config = decoder.config
            if hasattr(decoder, SPARED_ROWS):
                rows_of_all = partial(_all_rows, getattr(decoder, SPARED_ROWS))
                changes.put(decoder, SPARED_ROWS, rows_of_all)
            for i, layer in enumerate(family.layers(model)):
                if not family.recurrent(layer):
                    observer = rows.observer(window_of(config, i))
                    tap_attention(changes, family.attention(layer), observer)
        sequences: Tensor = generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            return_dict_in_generate=False,
            logits_processor=LogitsProcessorList([probabilities]),
        )
    if inputs.get(EMBEDS) is None:
        sequences = sequences[:, layout.tokens.shape[1] :]
    answered = _answered(sequences, model)
    chosen = torch.stack(probabilities.seen, 1)
    lengths = answered.sum(1)
    return Guide(
        images=layout.images,
        importance=rows.importance(answered),
        valid=layout.valid,
        sequences=sequences,
        answered=answered,
        confidence=chosen.log().masked_fill(~answered, 0.0).sum(1).div(lengths).exp(),
        provenance=Provenance(**identity(model), normalize=GUIDE, host=GUIDED),
    )


@torch.no_grad()
def answer_probabilities(model: nn.Module, inputs: Mapping[str, Any], sequences: Tensor) -> Tensor:
    """The probability of every token of given answers: one pass over the prompts, one over answers.

    Args:
        model: A vision-language model, pruned or not.
        inputs: Its processor's output for the prompts, padded on the left.
        sequences: (B, n) the answers' token ids.

    Returns:
        (B, n) probabilities, at least float32.
    """
    positions: list[Tensor | None] = []

    def note(_: nn.Module, __: object, kwargs: dict[str, Any]) -> None:
        positions.append(kwargs.get(POSITIONS))

    with Changes() as changes:
        changes.before(family_of(model).decoder(model), note, with_kwargs=True)
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    logits: Tensor = out.logits
    if more := sequences.shape[1] - 1:
        embeds = inputs.get(EMBEDS)
        prompt = inputs["input_ids"] if embeds is None else embeds[..., 0]
        mask = inputs.get(MASK)
        mask = torch.ones_like(prompt, dtype=torch.long) if mask is None else mask
        out = model(
            input_ids=sequences[:, :-1],
            attention_mask=nn.functional.pad(mask, (0, more), value=1),
            position_ids=_following(positions[0], more),
            **cache_argument(unwrapped(model).forward, cache_in(out)),
        )
        logits = torch.cat([logits, out.logits], 1)
    return widened(logits).softmax(-1).gather(-1, sequences[..., None])[..., 0]


def _following(positions: Tensor | None, count: int) -> Tensor | None:
    """The positions, on every axis, of text after a prompt; None if the model counts itself."""
    if positions is None:
        return None
    last = positions.amax(-1) if positions.dim() == 2 else positions.amax((0, -1))
    found = last[:, None] + torch.arange(1, count + 1, device=last.device)
    return found if positions.dim() == 2 else found.expand(len(positions), -1, -1)


def _layout(model: nn.Module, inputs: Mapping[str, Any], visual: Tensor | None) -> Layout:
    family = family_of(model)
    prompt = inputs.get("input_ids")
    if prompt is None:
        prompt = inputs[EMBEDS][..., 0]
        if visual is None:
            raise InputError(
                "The prompt is given as inputs_embeds, which do not tell visual tokens from text; "
                "mark them with visual=mask, or pass input_ids and pixels."
            )
        images = marked_images(visual.bool().cpu(), family.grid(model))
    else:
        images = images_of(model, inputs)
    mask = inputs.get(MASK)
    tokens = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask.bool()
    if not bool(tokens[:, -1].all()):
        raise InputError(
            "Prompts padded on the right cannot be answered; pad on the left "
            "(processor.tokenizer.padding_side = 'left')."
        )
    return Layout.of(images, tokens)


def _all_rows(
    process: Callable[..., Any],
    hidden: Tensor,
    inputs: Any,
    tables: Any,
    masks: Any,
    *_: Any,
    **kw: Any,
) -> Any:
    """Pass all tokens of a prompt through layers for which the last one would be enough."""
    return process(hidden, inputs, tables, masks, 0, **kw)


def _answered(sequences: Tensor, model: nn.Module) -> Tensor:
    """(B, n) bool, True up to the end token, which is part of the answer."""
    config: Any = model.generation_config
    end = config.eos_token_id
    ends = torch.zeros_like(sequences, dtype=torch.bool)
    for token in end if isinstance(end, list) else [] if end is None else [end]:
        ends |= sequences == token
    return (ends.cumsum(1) - ends.long()) == 0


class _Probabilities:
    """A logits processor that notes the probability of every token that is decoded greedily."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores.float().softmax(-1).amax(-1))
        return scores


class _Rows:
    """Sums attention to the visual tokens over layers, for every forward of one generation."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sums: list[Tensor] = []
        last: dict[int, int] = {}
        for image in layout.images:
            last[image.row] = max([*image.columns, *image.structure, last.get(image.row, 0)])
        self._last = torch.tensor([last[image.row] for image in layout.images])

    def observer(self, window: int | None) -> Callable[..., None]:
        """The function that a tap on a layer calls; every layer needs its own, for its window."""
        forwards = itertools.count()

        def observe(
            query: Tensor,
            key: Tensor,
            mask: Tensor | None,
            scaling: float,
            softcap: float | None,
            causal: bool,
            _: Tensor,
        ) -> None:
            step = next(forwards)
            layout, length = self._layout.to(query.device), query.shape[2]
            tokens = nn.functional.pad(layout.tokens, (0, step), value=True)
            # A cache drops what lies outside a sliding window.
            gone = max(tokens.shape[1] - key.shape[2], 0)
            # The prompt's rows from the last visual token on; later, of the newest token.
            first = self._last if step == 0 else torch.full_like(self._last, length - 1)
            index = torch.arange(int(first.min()), length).expand(len(first), -1)
            total = query.new_zeros(())
            for start in range(0, index.shape[1], _ROWS):
                part = index[:, start : start + _ROWS]
                logits = row_logits(
                    query,
                    key,
                    rows=layout.rows,
                    index=part,
                    valid=tokens[:, gone:],
                    mask=mask,
                    scaling=scaling,
                    softcap=softcap,
                    causal=causal,
                    window=window,
                )
                counts = (part >= first[:, None]).to(logits.device)[:, None, :, None]
                total = total + torch.where(counts, logits.softmax(-1), 0.0).sum((1, 2))
            got = nn.functional.pad(total, (gone, 0)).gather(1, layout.columns)
            if step == len(self._sums):
                self._sums.append(got)
            else:
                self._sums[step] += got.to(self._sums[step].device)

        return observe

    def importance(self, answered: Tensor) -> Tensor:
        """(I, t) the sums over the forwards of tokens that belong to the answer."""
        layout = self._layout
        if not layout.images:
            return torch.zeros(layout.valid.shape, device=layout.valid.device)
        total = torch.zeros_like(self._sums[0])
        for step in range(answered.shape[1]):  # forward i makes token i
            counts = answered[layout.rows, step, None]
            total += torch.where(counts, self._sums[step].to(total.device), 0.0)
        total = total.to(layout.valid.device).masked_fill(~layout.valid, 0.0)
        if not bool(torch.isfinite(total).all()):
            raise ScoreError(
                "Attention of the guiding model holds NaN or infinity; look for overflow "
                "(float16 although the model needs bfloat16?), damaged weights or bad inputs."
            )
        return total
