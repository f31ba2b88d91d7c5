"""FastV: one pruning point inside the decoder, by text-visual attention. The host of PoRe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pore.engine.limits import check_layer
from pore.engine.pruner import Pruner
from pore.engine.readers import LastToken, LayerAttention
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError, InputError
from pore.families.base import Family
from pore.identity import at_hand
from pore.tensors.attention import Normalize, check_normalize, text_visual_attention
from pore.tensors.padding import cap, visible_patches
from pore.tensors.selection import check_keep, top_k

if TYPE_CHECKING:
    from pore.bias.position_bias import PositionBias


@dataclass(frozen=True)
class FastV(Pruner):
    """Keep the visual tokens that the last text token attends to most (arXiv 2403.06764).

    A_i, the attention of the last text token to visual token i at layer - 1, averaged over heads,
    ranks the tokens; the top `keep` of every image stay, with their original positions. With
    `reweight=P` the ranking is by A_i / P_i, which is PoRe (arXiv 2508.17807, Eq. 2).

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        layer: K, the 0-based index of the first pruned layer; scores come from layer K - 1.
        reweight: The position bias P, or None for plain FastV.
        normalize: "prompt" as in the released code, "visual" as PoRe's Eq. 1 is printed.
        suppress_padding: Share of letterbox padding above which a patch scores 0, and the budget is
            capped at the number of other patches (version 2 of PoRe uses 0.5); None to leave it.
        faithful: Look one token too far, as the authors' scripts do (a `sys_length` of 36 where
            the image starts at 35): the first patch always stays, and the token behind the image
            competes with the patches and may be dropped. `keep` then counts that window.
    """

    keep: int | float
    layer: int = 2
    reweight: PositionBias | None = None
    normalize: Normalize = "prompt"
    suppress_padding: float | None = None
    faithful: bool = False

    name: ClassVar[str] = "FastV"
    paper: ClassVar[str] = "arXiv 2403.06764; reweighted: arXiv 2508.17807"
    reweightable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_normalize(self.normalize)
        if self.faithful and self.suppress_padding is not None:
            raise BudgetError("The authors' code suppresses no padding; set one of the two.")

    def stages(self) -> Sequence[Stage]:
        """One stage, before layer K."""
        if self.faithful:
            return [Stage(self.layer, self._select_one_late, OneLate(self.normalize))]
        padding = self.suppress_padding is not None
        return [Stage(self.layer, self._select, LastToken(self.normalize), padding=padding)]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder lacks, and a bias measured under other conditions."""
        check_layer(self.layer, family, model)
        if self.reweight is not None:
            self.reweight.check(layer=self.layer, normalize=self.normalize, **at_hand(model))

    def _select(self, view: View) -> Selection:
        scores, valid = view.attention, view.layout.valid
        counts = torch.tensor(view.budget(self.keep), device=valid.device)
        assert scores is not None
        if view.padding is not None:
            assert self.suppress_padding is not None
            counts = cap(counts, view.padding, self.suppress_padding)
            valid = valid & visible_patches(view.padding, self.suppress_padding)
        if self.reweight is not None:
            scores = view.reweighted(scores, self.reweight)
        return Selection(top_k(scores, counts, valid))

    def _select_one_late(self, view: View) -> Selection:
        layout, scores = view.layout, view.attention
        lengths = layout.valid.sum(-1)
        last = layout.columns.gather(1, lengths[:, None] - 1)[:, 0]
        if not torch.equal(last - layout.columns[:, 0] + 1, lengths):
            raise InputError(
                "The authors' window is of an image in one run of tokens, which this one is not; "
                "use faithful=False."
            )
        if self.reweight is not None:
            scores = view.reweighted(scores, self.reweight)
        chosen = top_k(scores, view.budget(self.keep), layout.valid)
        keep = torch.cat([torch.ones_like(chosen[:, :1]), chosen[:, :-1]], 1) & layout.valid
        behind = chosen.gather(1, lengths[:, None] - 1)[:, 0]
        others = torch.zeros_like(layout.tokens)
        others[layout.rows[~behind], last[~behind] + 1] = True
        return Selection(keep, others=others)


@dataclass(frozen=True)
class OneLate(LastToken):
    """Reads the attention of the last token to the tokens behind every visual token."""

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, t) attention to the second patch up to the token behind the image."""
        logits = attention.logits(attention.last)[:, :, 0]
        valid = attention.layout.valid
        return text_visual_attention(logits, attention.columns + 1, valid, self.normalize)
