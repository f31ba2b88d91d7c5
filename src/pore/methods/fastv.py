"""FastV: one pruning point inside the decoder, by text-visual attention. The host of PoRe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pore.engine.corrections import AttentionCorrection, Reweight
from pore.engine.readers import LastToken, LayerAttention
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError, InputError
from pore.methods.scorer import ScoredPruner
from pore.tensors.attention import Normalize, check_normalize, visual_weights
from pore.tensors.padding import cap, visible_patches
from pore.tensors.selection import top_k


@dataclass(frozen=True)
class FastV(ScoredPruner):
    """Keep the visual tokens that the last text token attends to most (arXiv 2403.06764).

    A_i, the attention of the last text token to visual token i at layer - 1, averaged over heads,
    ranks the tokens; the top `keep` of every image stay, with their original positions. With
    `reweight=P` the ranking is by A_i / P_i, which is PoRe (arXiv 2508.17807, Eq. 2).

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        layer: K, the 0-based index of the first pruned layer; scores come from layer K - 1.
        reweight: The position bias P or another correction, or None for plain FastV.
        normalize: "prompt" as in the released code, "visual" as PoRe's Eq. 1 is printed.
        suppress_padding: Share of letterbox padding above which a patch scores 0; the budget is
            then capped at the number of other patches (version 2 of PoRe uses 0.5). None switches
            it off.
        faithful: Read one token too far, as the authors' scripts do (a `sys_length` of 36 although
            the image starts at 35): the first patch always stays, and the token after the image
            competes with the patches and may be dropped. `keep` then counts tokens of that window.
    """

    reweight: Reweight | None = None
    normalize: Normalize = "prompt"
    suppress_padding: float | None = None
    faithful: bool = False

    name: ClassVar[str] = "FastV"
    paper: ClassVar[str] = "arXiv 2403.06764; reweighted: arXiv 2508.17807"
    reweightable: ClassVar[bool] = True
    earliest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_normalize(self.normalize)
        if self.faithful and self.suppress_padding is not None:
            raise BudgetError("The authors' code does not suppress padding; set one of the two.")
        if self.faithful and isinstance(self.reweight, AttentionCorrection):
            raise BudgetError(
                f"The authors' window does not work with a correction that looks at the layer, "
                f"such as {self.reweight.kind}; use faithful=False."
            )

    def reader(self) -> LastToken:
        """The last text token's attention."""
        return (OneLate if self.faithful else LastToken)(self.normalize)

    def stages(self) -> Sequence[Stage]:
        """One stage, before layer K."""
        padding = self.suppress_padding is not None
        return [replace(stage, padding=padding) for stage in super().stages()]

    def score(self, view: View) -> Tensor:
        """A, the attention of the last text token."""
        attention: Tensor = view.attention
        return attention

    def choose(self, view: View, scores: Tensor) -> Selection:
        """The highest scores, without padding if asked for; or those of the authors' window."""
        if self.faithful:
            return self._choose_one_late(view, scores)
        if self.suppress_padding is None:
            return super().choose(view, scores)
        assert view.padding is not None
        counts = torch.tensor(view.budget(self.keep), device=scores.device)
        counts = cap(counts, view.padding, self.suppress_padding)
        shown = visible_patches(view.padding, self.suppress_padding)
        return Selection(top_k(scores, counts, view.layout.valid & shown))

    def _choose_one_late(self, view: View, scores: Tensor) -> Selection:
        layout = view.layout
        lengths = layout.valid.sum(-1)
        last = layout.columns.gather(1, lengths[:, None] - 1)[:, 0]
        if not torch.equal(last - layout.columns[:, 0] + 1, lengths):
            raise InputError(
                "The authors' window needs an image in one run of tokens, which this one is not; "
                "use faithful=False."
            )
        chosen = top_k(scores, view.budget(self.keep), layout.valid)
        keep = torch.cat([torch.ones_like(chosen[:, :1]), chosen[:, :-1]], 1) & layout.valid
        after = chosen.gather(1, lengths[:, None] - 1)[:, 0]
        others = torch.zeros_like(layout.tokens)
        others[layout.rows[~after], last[~after] + 1] = True
        return Selection(keep, others=others)


@dataclass(frozen=True)
class OneLate(LastToken):
    """Reads the attention of the last token to the token after every visual token."""

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, t) attention to the second patch and so on, up to the token after the image."""
        logits, valid = attention.logits(attention.last), attention.layout.valid
        weights = visual_weights(logits, attention.columns + 1, valid, self.normalize)
        return weights[:, :, 0].mean(1)
