"""What a prefill should cost, in floating-point operations (FLOPs), by two counts.

*The paper's count* is that of Table 1 of PoRe (arXiv 2508.17807), which comes from FastV (arXiv
2403.06764): per layer 4nd² + 2n²d + 2ndm for n tokens, width d and MLP width m, reported as the
mean over the layers. It counts a multiply-add as one, the MLP as two matrices although LLaMA's has
three, and only the decoder. It is there to compare with published tables.

*The true count* covers every matrix product and convolution that stock transformers runs, with a
multiply-add as two: all MLP matrices, grouped queries, vision tower, projector, output head.
Attention is counted over the full n × n square, without halving for the causal mask, as
`torch.utils.flop_counter` counts it. Neither count includes element-wise work (norms, softmax,
activations, rotary angles). A token counts the experts that it goes through: those that are chosen,
or all if transformers runs all (Llama 4). Sliding windows and chunks of decoder layers count as
full attention, which is what kernels without block masks compute; recurrent layers are counted by
their definition, see `pore.cost.decoders`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, NamedTuple

from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.cost.towers import TowerShape
from pore.errors import BudgetError, InputError, UnsupportedModelError

_LABELS = {
    "paper": "FLOPs, the paper's count (decoder only, multiply-add = 1, MLP of two matrices)",
    "true": "FLOPs, true count (multiply-add = 2, all matrices, attention without causal halving)",
}


class ExtraRows(NamedTuple):
    """Attention rows that pruning computes beside the model's own, to score tokens.

    Attributes:
        layer: The decoder layer, from 0, whose queries and keys are used.
        rows: How many query rows are multiplied with all keys.
        projected: Tokens whose queries, keys and values were computed only for this.
    """

    layer: int
    rows: int = 1
    projected: int = 0


PatchGrid = tuple[int, int, int]
"""(frames, rows, columns) of the patches of an image; 1 frame unless it is a video."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of the prefill of one sample, by part.

    Attributes:
        count: Which count it is: `"paper"` or `"true"`. Never compare one with the other.
        per_layer: FLOPs of every decoder layer, in order.
        head: FLOPs of the output head, at the positions where logits are computed.
        projector: FLOPs of the projector, over all images; None if they are not known.
        tower: FLOPs of the vision tower, over all images; None if they are not known.
        probe: FLOPs that pruning adds, from its `ExtraRows`.
    """

    count: Literal["paper", "true"]
    per_layer: tuple[int, ...]
    head: int = 0
    projector: int | None = 0
    tower: int | None = 0
    probe: int = 0

    @property
    def decoder(self) -> int:
        """FLOPs of all decoder layers together."""
        return sum(self.per_layer)

    @property
    def layer_mean(self) -> float:
        """Mean FLOPs of a decoder layer: with the paper's count, the column of its Table 1."""
        return self.decoder / len(self.per_layer)

    @property
    def total(self) -> int:
        """FLOPs of everything counted: only of the decoder if the tower's are not known."""
        return self.decoder + self.head + (self.projector or 0) + (self.tower or 0) + self.probe

    @property
    def label(self) -> str:
        """The unit, and which count this is, in words for a table or an axis."""
        return _LABELS[self.count]

    def to_dict(self) -> dict[str, Any]:
        """All parts and sums as JSON-ready values."""
        return {
            "count": self.count,
            "unit": "FLOPs",
            "label": self.label,
            "per_layer": list(self.per_layer),
            "layer_mean": self.layer_mean,
            "decoder": self.decoder,
            "head": self.head,
            "projector": self.projector,
            "tower": self.tower,
            "probe": self.probe,
            "total": self.total,
        }


def _whole(value: object, name: str, least: int, most: int | None = None) -> int:
    """`value` as an int within bounds (numpy integers too), or an InputError that names it."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number {bounds}, is {value!r}")
    return number


def _check_layers(shape: DecoderShape, tokens: Sequence[float]) -> None:
    if not shape.known:
        raise UnsupportedModelError("Of this decoder only the number of layers is known.")
    if len(tokens) != shape.layers:
        raise InputError(
            f"tokens must hold one number for each of the {shape.layers} decoder layers, "
            f"holds {len(tokens)}"
        )


def tokens_per_layer(
    layers: int, prompt: int, visual: int, keep: int, layer: int
) -> tuple[int, ...]:
    """Tokens that enter every decoder layer when visual tokens are pruned once.

    Args:
        layers: Number of decoder layers.
        prompt: Tokens of the prompt, including visual tokens.
        visual: Visual tokens among them.
        keep: Visual tokens kept.
        layer: Index from 0 of the first layer that sees only the tokens kept.

    Raises:
        BudgetError: `keep` is not a whole number from 0 to `visual`.
        InputError: Another number is out of range.
    """
    layers = _whole(layers, "layers", least=1)
    prompt = _whole(prompt, "prompt", least=1)
    visual = _whole(visual, "visual", least=0, most=prompt)
    layer = _whole(layer, "layer", least=0, most=layers - 1)
    try:
        keep = _whole(keep, "keep", least=0, most=visual)
        after = _whole(prompt - visual + keep, "tokens after pruning", least=1)
    except InputError as error:
        raise BudgetError(str(error)) from None
    return (prompt,) * layer + (after,) * (layers - layer)


def paper_flops(shape: DecoderShape, tokens: Sequence[float]) -> Flops:
    """The count of the paper's Table 1: 4nd² + 2n²d + 2ndm per layer.

    Its FLOPs column, in billions, is `layer_mean / 1e9`. With d = 4096, m = 11008, 32 layers and
    35 + 576 tokens in the first two, it gives the printed 54.6, 32.8 and 30.4 for 288, 144 and
    128 visual tokens in the others. The printed 19.9 is for 10 % of 576 tokens without rounding,
    57.6 tokens (19.92); the 58 tokens that FastV really keeps give 19.98. Unpruned it gives 99.16;
    the printed 99.3 belongs to 612 tokens.

    Args:
        shape: The decoder's sizes; only the widths are used.
        tokens: Tokens that enter every decoder layer; fractions are taken, as in the paper.

    Returns:
        A `Flops` with `count="paper"`, each layer rounded to a whole number; parts other than the
        decoder are 0.

    Raises:
        InputError: `tokens` is not one finite number of at least 1 per layer.
        UnsupportedModelError: Only the number of layers is known.
    """
    _check_layers(shape, tokens)
    for layer, n in enumerate(tokens):
        # numpy's numbers are Real too, and a string may come from a caller without types.
        number: object = n
        if not isinstance(number, Real) or not 1 <= n < math.inf:
            raise InputError(f"tokens[{layer}] must be a number of at least 1, is {n!r}")
    d, m = shape.hidden, shape.intermediate
    return Flops(
        "paper", tuple(round(4 * n * d * d + 2 * n * n * d + 2 * n * d * m) for n in tokens)
    )


def _layer_flops(shape: DecoderShape, layer: int, n: int) -> int:
    one = shape.layer(layer)
    return 2 * n * one.token + 2 * n * n * one.pair


def _extra_flops(shape: DecoderShape, n: int, extra: ExtraRows) -> int:
    n = extra.projected or n
    row = shape.heads * shape.head_dim
    return 2 * n * row * extra.rows + 2 * extra.projected * shape.layer(extra.layer).qkv


def decoder_flops(
    shape: DecoderShape,
    tokens: Sequence[int],
    *,
    logits: int = 1,
    extra_rows: Sequence[ExtraRows] = (),
) -> Flops:
    """The true count of a decoder's prefill of one sample, without padding.

    Args:
        shape: The decoder's sizes.
        tokens: Tokens that enter every decoder layer, one number for each layer.
        logits: Positions at which the output head computes logits: 1 in `generate`, all that
            leave the last layer in a plain forward.
        extra_rows: What is computed in addition, to score tokens; pairwise distances, sorting and
            the like are not included.

    Returns:
        A `Flops` with `count="true"`; tower and projector are 0.

    Raises:
        InputError: `tokens` is not one number of at least 1 per layer, `logits` is more than the
            tokens of the last layer, or extra rows are at no layer of the decoder.
        UnsupportedModelError: Only the number of layers is known.
    """
    _check_layers(shape, tokens)
    counts = [_whole(n, f"tokens[{layer}]", least=1) for layer, n in enumerate(tokens)]
    logits = _whole(logits, "logits", least=0, most=counts[-1])
    for rows in extra_rows:
        _whole(rows.layer, "extra_rows", least=0, most=shape.layers - 1)
    return Flops(
        "true",
        per_layer=tuple(_layer_flops(shape, i, n) for i, n in enumerate(counts)),
        head=2 * logits * shape.hidden * shape.vocab,
        probe=sum(_extra_flops(shape, counts[rows.layer], rows) for rows in extra_rows),
    )


def model_flops(
    shape: ModelShape,
    tokens: Sequence[int],
    *,
    images: int | Sequence[PatchGrid] | None = 1,
    projected: int | None = None,
    tower_tokens: Sequence[int] = (),
    logits: int = 1,
    extra_rows: Sequence[ExtraRows] = (),
) -> Flops:
    """The true count of a whole model's prefill of one sample, without padding.

    Args:
        shape: The model's sizes: `shape_of(model.config)`.
        tokens: Tokens that enter every decoder layer.
        images: Images or tiles that pass through the tower: their number; or, if images come in any
            size, the (frames, rows, columns) of the patches of each. With None, or if the tower is
            not known, only the decoder is counted.
        projected: Number of visual tokens that the projector makes for all images; None means all.
        tower_tokens: For a method that merges tokens inside the tower: how many of one image are
            left after the attention of the first tower layers, one number for each layer. Later
            layers see as many as the last of these left; if empty, all layers see all.
        logits: As in `decoder_flops`.
        extra_rows: As in `decoder_flops`.

    Returns:
        A `Flops` with `count="true"`.

    Raises:
        InputError: `images` or `projected` is negative, images of any size are given by their
            number, or `decoder_flops` refuses another number.
        UnsupportedModelError: Of the decoder only the number of layers is known.
    """
    decoder = decoder_flops(shape.decoder, tokens, logits=logits, extra_rows=extra_rows)
    if images is None or shape.tower is None or shape.projector is None:
        return replace(decoder, projector=None, tower=None)
    tower = shape.tower
    if isinstance(images, Sequence):
        grids = list(images)
    else:
        images = _whole(images, "images", least=0)
        if images and tower.image_size is None:
            raise InputError("Images of this model come in any size; give the patches of each.")
        grids = [(1, tower.side, tower.side)] * images if images else []
    if len(tower_tokens) > tower.layers:
        raise InputError(f"tower_tokens has {len(tower_tokens)} layers, the tower {tower.layers}.")
    if projected is None and shape.visual_tokens is not None:
        projected = len(grids) * shape.visual_tokens
    elif projected is None:
        projected = sum(t * h * w for t, h, w in grids) // shape.merge**2
    projected = _whole(projected, "projected", least=0)
    stacked = sum(t * h * w for t, h, w in grids) // shape.merge**2 * shape.stacked
    return replace(
        decoder,
        projector=2 * projected * shape.projector,
        tower=_tower_flops(tower, grids, tower_tokens) + 2 * stacked,
    )


def _tower_flops(tower: TowerShape, grids: Sequence[PatchGrid], merged: Sequence[int]) -> int:
    """FLOPs of a vision tower for all images of a sample.

    Args:
        tower: Its sizes.
        grids: The (frames, rows, columns) of the patches of every image.
        merged: As `tower_tokens` in `model_flops`.
    """
    d, matrices = tower.hidden, 3 if tower.gated else 2
    patches = sum(t * h * w for t, h, w in grids)
    if tower.together:  # images are padded to the largest of them until they are patches
        patches = len(grids) * max((h for _, h, _ in grids), default=0)
        patches *= max((w for *_, w in grids), default=0)
    total = 2 * patches * d * tower.channels * tower.frames * tower.patch_size**2
    extra = tower.prefix_tokens
    # Lengths of the sequences within which patches attend to one another, for layers that see whole
    # images (every frame by itself) and for layers with windows.
    whole = [h * w + extra for t, h, w in grids for _ in range(t)]
    if tower.together:
        whole = [sum(whole)]
    windows = [n for t, h, w in grids for n in t * _windows(h, w, tower.window)]
    left: list[int] | None = None
    for i in range(tower.layers):
        attends = whole if tower.window is None or i in tower.full else windows
        inside = attends if left is None else left
        # Attention on what comes in, the MLP on what is left.
        total += sum(2 * n * 4 * d * d + 4 * n * n * d for n in inside)
        if i < len(merged):
            inside = left = [merged[i]] * len(inside)
        total += 2 * sum(inside) * d * tower.intermediate * matrices
    if tower.pooling:
        once = 4 * d * d + 4 * d * tower.intermediate
        total += sum(once + 4 * n * d * d + 4 * n * d for n in left or whole)
    return total


def _windows(height: int, width: int, side: int | None) -> list[int]:
    """Number of patches of every window of a frame, including windows cut off by its edge."""
    if side is None:
        return []

    def cut(length: int) -> list[int]:
        return [min(side, length - start) for start in range(0, length, side)]

    return [a * b for a in cut(height) for b in cut(width)]
