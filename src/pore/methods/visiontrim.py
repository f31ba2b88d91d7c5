"""VisionTrim: patches that get attention in the tower, and a few into which the rest is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pore.cost.shapes import ModelShape
from pore.engine.pruner import Pruner
from pore.engine.stages import Limit, Merges
from pore.errors import BudgetError, UnsupportedModelError
from pore.families.base import Family
from pore.methods._clip import ClipQuestions
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import pack, take, widened
from pore.tensors.merging import group_means
from pore.tensors.selection import check_finite, top_k
from pore.tower.stages import TowerSelection, TowerStage, TowerView

_ROUNDS = 3
"""How often the rest is added to the tokens into which it is merged."""


@dataclass(frozen=True)
class VisionTrim(BudgetPruner):
    """Dominant patches stay, the rest goes into those most like the question (arXiv 2601.22674).

    In the tower layer that the projector reads. The dominant patches have the highest mean of two
    attentions, each scaled to length 1 over the patches: that of the CLS token, and that which a
    patch receives from all other patches. Of the others, those whose projections into CLIP's space
    are most like the tokens of the question, on average, become complements; each patch that is
    left is added to one of them, by the sum over the question's tokens of the products of both
    similarities. That is done three times over, with the complements as they have grown, and always
    the mean of all patches that go to a complement is added. The decoder gets the dominant patches
    in raster order, then the complements.

    The paper weighs CLS attention against a local affinity. Its code computes that and does not use
    it; nor is it computed here.

    Attributes:
        keep: Tokens left per image (int), or the fraction of its patches (float): dominant patches
            and complements together. If the model cuts images into tiles, they share it.
        clip: The CLIP model that the vision tower was taken from, and the questions.
        complement: How many of them are complements; in every tile, if there are tiles. None takes
            the authors' 16 in 64, rounded down.
        faithful: As in the authors' code, questions of one batch are filled up to the longest, and
            what fills them counts as part of the question; long ones are cut off. Images whose
            budget is all their patches are merged too. By default what is filled up is left out,
            long questions are taken in pieces, and keeping all leaves an image as it is.
    """

    clip: ClipQuestions
    complement: int | None = None
    faithful: bool = False

    name: ClassVar[str] = "VisionTrim"
    paper: ClassVar[str] = "arXiv 2601.22674"
    merges: ClassVar[Merges] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.complement is not None and self.complement < 0:
            raise BudgetError(
                f"complement={self.complement} is not a number of tokens; choose 0 or more."
            )
        if isinstance(self.keep, int):
            self._complements([self.keep])

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> Pruner | None:
        """None: it needs a CLIP model and questions."""
        return None

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower, which knows the prompt."""
        return [TowerStage(self._select, merges=True, prompts=True)]

    def limits(self, family: Family) -> list[Limit]:
        """CLIP knows the patches of its tower, not what a model makes of several."""
        found = super().limits(family)
        if family.merged or family.packed:
            found.append(
                Limit(
                    "CLIP's projection is for single patches of its own tower, but visual tokens "
                    "are made of several, or images come in any size."
                )
            )
        return found

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a CLIP model to which the vision tower does not belong."""
        self.clip.check(model, family)
        if not family.tower_has_cls(model):
            raise UnsupportedModelError(
                "VisionTrim ranks patches by the attention of the CLS token, and projects them as "
                "CLIP does; the vision tower here is not CLIP's and has no CLS token."
            )

    def _complements(self, counts: Sequence[int]) -> list[int]:
        """How many of `counts` tokens are complements."""
        if self.complement is None:
            return [count // 4 for count in counts]
        if self.complement >= max(counts):
            raise BudgetError(
                f"complement={self.complement} leaves no dominant patch of {max(counts)}; ask for "
                f"at most {max(counts) - 1}."
            )
        return [min(self.complement, max(count - 1, 0)) for count in counts]

    def _select(self, view: TowerView) -> TowerSelection:
        assert view.prompts is not None
        counts, shown = view.budgets(self.keep), view.shown
        if not self.faithful and counts == shown.sum(1).tolist():
            return view.select(shown, counts)
        asked = self._question(view)
        extra = self._complements(counts)
        kept = [count - more for count, more in zip(counts, extra, strict=True)]
        dominant = top_k(importance(view, shown), kept, shown)
        others = shown & ~dominant
        index, valid = pack(dominant, width=max(kept))
        tokens = take(view.features, index)
        if max(extra) > 0:
            with torch.no_grad():
                alike = self.clip.patches(view.features).to(asked) @ asked.mT  # (I, N, L)
                score = alike.sum(-1)
                check_finite(score)
            targets = top_k(score, extra, others)
            places, real = pack(targets, width=max(extra))
            merged = self._merged(view.features, alike, asked, (places, real), others & ~targets)
            tokens = torch.cat([tokens, merged], 1)
            index, valid = torch.cat([index, places], 1), torch.cat([valid, real], 1)
        raster = view.raster.gather(1, index)
        return TowerSelection(tokens, raster, valid if not bool(valid.all()) else None)

    def _question(self, view: TowerView) -> Tensor:
        """(I, L, E) unit embeddings of the tokens of every image's question, 0 at filling."""
        assert view.prompts is not None
        rows, texts = view.prompts.rows, view.prompts.texts
        every = self.clip.of_rows(rows, len(texts), lambda row: texts[row])
        different = list(dict.fromkeys(every))
        asked = self.clip.tokens(different, cut_off=self.faithful, fill=self.faithful)
        places = [different.index(question) for question in every]
        return asked[places].to(view.features.device)

    def _merged(
        self,
        features: Tensor,
        alike: Tensor,
        asked: Tensor,
        targets: tuple[Tensor, Tensor],
        members: Tensor,
    ) -> Tensor:
        """(I, c, C) the complements, with the rest added.

        Args:
            features: (I, N, C) all patches.
            alike: (I, N, L) their similarity to the question's tokens.
            asked: (I, L, E) these tokens.
            targets: (I, c) positions of the complements; and bool, False at filling.
            members: (I, N) bool, the patches that are added to one.
        """
        places, real = targets
        grown = take(widened(features), places)
        for _ in range(_ROUNDS):
            with torch.no_grad():
                own = self.clip.patches(grown.to(features.dtype)).to(asked) @ asked.mT
                both = alike @ own.mT  # (I, N, c)
                group = both.masked_fill(~real[:, None], -torch.inf).argmax(-1)
            means, _ = group_means(features, group, members, places.shape[1])
            grown = grown + means
        return grown.to(features.dtype)


def importance(view: TowerView, shown: Tensor) -> Tensor:
    """(I, N) the mean of two attentions, each scaled to length 1 over the patches `shown`."""
    with torch.no_grad():
        cls = view.cls_attention[0].mean(1)
        received = from_other_patches(view.queries[0], view.keys[0])
        check_finite(cls, received)
        parts = [normalize(part.masked_fill(~shown, 0.0), dim=-1) for part in (cls, received)]
        return (parts[0] + parts[1]) / 2


def from_other_patches(query: Tensor, key: Tensor) -> Tensor:
    """Attention that every patch receives from all other patches, averaged over heads.

    Args:
        query: (I, H, N + 1, d) queries, CLS first.
        key: (I, H, N + 1, d) keys.

    Returns:
        (I, N) sums over the other patches, at least float32.
    """
    heads = []
    for q, k in zip(query.unbind(1), key.unbind(1), strict=True):
        logits = torch.matmul(widened(q), widened(k).mT) * q.shape[-1] ** -0.5
        weights = logits.softmax(-1)[:, 1:, 1:]
        heads.append(weights.sum(1) - weights.diagonal(dim1=1, dim2=2))
    return torch.stack(heads).mean(0)
