"""What pruning must equal: a dense forward in which the dropped tokens are masked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pore import Run


def dropped_columns(run: Run, input_ids: Tensor, image_token: int) -> Tensor:
    """(B, L) bool, True at the visual tokens that a run's report says were dropped."""
    dropped = torch.zeros_like(input_ids, dtype=torch.bool)
    for sample in run.report:
        columns = (input_ids[sample.sample] == image_token).nonzero().flatten().tolist()
        start = 0
        for image in sample.images:
            own = columns[start : start + image.seen]
            kept = set(image.kept)
            for raster, column in enumerate(own):
                dropped[sample.sample, column] = raster not in kept
            start += image.seen
    return dropped


def dropped_by_stage(run: Run, visual: Tensor) -> list[tuple[int, Tensor]]:
    """For every stage in the decoder, its layer and (B, L) bool, True at tokens dropped by then.

    Args:
        run: The run.
        visual: (B, L) bool, True at visual content.
    """
    stages: dict[int, Tensor] = {}
    for sample in run.report:
        columns = visual[sample.sample].nonzero().flatten().tolist()
        start = 0
        for image in sample.images:
            own = columns[start : start + image.seen]
            for layer, kept in image.stages:
                dropped = stages.setdefault(layer, torch.zeros_like(visual))
                gone = [column for raster, column in enumerate(own) if raster not in set(kept)]
                dropped[sample.sample, gone] = True
            start += image.seen
    return sorted(stages.items())


@contextmanager
def masked_from(
    layers: Sequence[nn.Module], stages: Sequence[tuple[int, Tensor]], tokens: Tensor
) -> Iterator[None]:
    """Let no token look at dropped ones from some layer on, in a forward without cache.

    The masks are made here from scratch, for SDPA, so nothing of the engine or of transformers'
    masking is taken on trust.

    Args:
        layers: The decoder layers of a model with SDPA attention.
        stages: The first layer that does not see some tokens, and those tokens, (B, L) bool; in a
            longer sequence, further tokens are seen.
        tokens: (B, L) bool, False at padding; likewise.
    """

    def hook(i: int) -> Any:
        def hide(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            length = (args[0] if args else kwargs["hidden_states"]).shape[1]
            more = length - tokens.shape[1]
            seen = nn.functional.pad(tokens.bool(), (0, more), value=True)
            for first, dropped in stages:
                if i >= first:
                    seen = seen & ~nn.functional.pad(dropped, (0, more))
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            # Padding sees itself, so that no softmax is empty.
            mask = (causal & seen[:, None, :]) | torch.eye(length, dtype=torch.bool)
            return args, {**kwargs, "attention_mask": mask[:, None]}

        return hide

    hooks = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_rows(
    attentions: Tensor, input_ids: Tensor, mask: Tensor, image_token: int
) -> list[Tensor]:
    """Eq. 1 by hand: per sample, the head mean of the last token's row at the visual columns.

    Args:
        attentions: (B, H, L, L) softmax weights of one layer.
        input_ids: (B, L) token ids.
        mask: (B, L) padding mask.
        image_token: The placeholder.
    """
    rows = []
    for b in range(len(input_ids)):
        last = int(mask[b].nonzero().max())
        rows.append(attentions[b, :, last].mean(0)[input_ids[b] == image_token])
    return rows
