"""How the patches of a picture become visual tokens, where each is made of several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pooling:
    """Which patches every visual token of a picture is made of, and to which shares.

    Attributes:
        groups: (N, g) the patches of each of the N tokens.
        patches: How many patches the picture has. Some may belong to no token, or to several.
        shares: (N, g) what each adds to the token; the shares of a token sum to 1. None: all add
            the same.
    """

    groups: Tensor
    patches: int
    shares: Tensor | None = None

    @classmethod
    def of_weights(cls, weights: Tensor) -> Pooling:
        """The pooling in which token i is the sum of `weights[i, j]` times patch j.

        Args:
            weights: (N, n) weights, 0 where a patch is no part of a token.
        """
        most = int((weights != 0).sum(1).max())
        shares, groups = weights.topk(most, 1)
        return cls(groups, weights.shape[1], shares)

    def to(self, device: torch.device) -> Pooling:
        """The same, with its tensors on a device."""
        shares = None if self.shares is None else self.shares.to(device)
        return Pooling(self.groups.to(device), self.patches, shares)

    def means(self, values: Tensor, dim: int) -> Tensor:
        """The mean of what is given for the patches of every token.

        Args:
            values: n entries along a dimension, one for each patch.
            dim: That dimension.

        Returns:
            The same with N entries along it, one for each token.
        """
        dim %= values.dim()
        shape = values.shape
        found = values.index_select(dim, self.groups.flatten())
        found = found.view(*shape[:dim], *self.groups.shape, *shape[dim + 1 :])
        if self.shares is None:
            return found.mean(dim + 1)
        shares = self.shares.to(found.dtype)
        shares = shares.view(*shares.shape, *[1] * (values.dim() - dim - 1))
        return (found * shares).sum(dim + 1)
