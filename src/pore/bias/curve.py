"""P as numbers: a positive curve of mean 1 over the positions of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pore._saved.forms import brief
from pore.bias.conditions import OTHER_LENGTH, refuse
from pore.bias.where import Where
from pore.errors import ProfileError, ScoreError

Kind = Literal["exponential", "exponential+offset", "spline", "empirical", "rope", "power"]


MAX_POSITIONS = 1 << 20


@dataclass(frozen=True, eq=False)
class Curve:
    """The numbers of a position bias, without where they come from; see `PositionBias`."""

    values: Tensor
    kind: Kind
    grid: tuple[int, int] | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    r2: float | None = None
    residuals: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ProfileError(
                f"{brief(self.kind)} is not a kind of position bias; "
                f"there are {', '.join(get_args(Kind))}."
            )
        values = _own(self.values)
        if values.ndim != 1 or not 1 <= len(values) <= MAX_POSITIONS:
            raise ProfileError(
                f"A position bias is a vector of 1 to {MAX_POSITIONS} values, "
                f"not of shape {tuple(values.shape)}."
            )
        if not (torch.isfinite(values) & (values > 0)).all():
            raise ProfileError(
                "A position bias must be finite and positive everywhere, as attention is "
                f"divided by it; the least value here is {values.min().item():g}."
            )
        # Saved values have mean 1 up to rounding; left as they are, they are equal to the last bit.
        mean = values.mean()
        if abs(mean.item() - 1) > 1e-9:
            values = (values / values.max()) / (values / values.max()).mean()
            if not (torch.isfinite(values) & (values > 0)).all():
                raise ProfileError(
                    "The position bias spans more than a float64 holds; its smallest values "
                    "vanish beside the largest. Calibrate again."
                )
        object.__setattr__(self, "values", values)
        if self.grid is not None:
            object.__setattr__(self, "grid", _grid(self.grid, len(values)))
        object.__setattr__(self, "parameters", dict(self.parameters))
        for name, number in {**self.parameters, "r2": self.r2 or 0.0}.items():
            if not math.isfinite(number):
                raise ProfileError(f"{name} of a position bias must be finite, not {number}.")
        if self.r2 is not None and not -1 <= self.r2 <= 1:
            raise ProfileError(
                "r2 is the share of the variance that the fit explains, at most 1 and not far "
                f"below 0, but here it is {self.r2}."
            )
        if self.residuals is not None:
            residuals = _own(self.residuals)
            if residuals.shape != values.shape or not torch.isfinite(residuals).all():
                raise ProfileError(
                    f"The residuals of a position bias must be {len(values)} finite numbers."
                )
            object.__setattr__(self, "residuals", residuals)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def growth(self) -> float:
        """P at the last position divided by P at the first: how much the end is favoured."""
        return float(self.values[-1] / self.values[0])

    @property
    def rate(self) -> float:
        """Mean growth of log P per token (b of an exponential); 0 for a single position."""
        return math.log(self.growth) / max(len(self) - 1, 1)

    def check_length(self, n: int) -> None:
        """Raise ProfileMismatchError for another number of positions."""
        refuse(self.other_length(n), {})

    def other_length(self, n: int) -> str | None:
        """How a number of positions differs from those of the curve, in words; None: not at all."""
        return None if n == len(self) else f"positions: the profile has {len(self)}, here are {n}"

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """Scores divided by P: PoRe Eq. 2.

        Args:
            scores: (I, t) scores of the visual tokens of I images, which contain the bias.
            where: Where the tokens lie.

        Returns:
            (I, t) scores without the bias.

        Raises:
            ProfileMismatchError: An image has another number of tokens than P has positions.
        """
        for image in where.layout.images:
            self.check_length(image.count)
        return self.divide(scores, where.raster)

    def divide(self, attention: Tensor, index: Tensor | None = None) -> Tensor:
        """Divide attention by the bias: Â = A / P (arXiv 2508.17807, Eq. 4).

        Args:
            attention: A, of shape (..., n), floating, on any device.
            index: Raster position of every column, integer, broadcastable to (..., n), each from 0
                to N − 1; columns that are padding may have any of them. None if the columns are the
                N positions in order.

        Returns:
            Â, of shape (..., n), on the device of `attention`, in its precision but at least
            float32. It has the unit of `attention`, because P has mean 1.

        Raises:
            ScoreError: `attention` is not floating point, `index` holds no integers or has the
                wrong shape, or (checked on the CPU only, as elsewhere it costs a synchronisation)
                it holds positions that this bias does not have.
            ProfileMismatchError: `index` is None and there are not N columns.
        """
        if not attention.is_floating_point():
            raise ScoreError(f"Attention must be floating point, not {attention.dtype}.")
        if index is None:
            self.check_length(attention.shape[-1])
        dtype = torch.promote_types(attention.dtype, torch.float32)
        # Converted on the CPU: not every device has float64.
        bias = self.values.to(dtype).to(attention.device)
        if index is not None:
            if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
                raise ScoreError(f"Positions must be integers, not {index.dtype}.")
            if index.device.type == "cpu" and index.numel():
                low, high = index.aminmax()
                if low < 0 or high >= len(self):
                    raise ScoreError(
                        f"Positions run from {int(low)} to {int(high)}, but this bias has "
                        f"positions 0 to {len(self) - 1}. {OTHER_LENGTH}"
                    )
            try:
                index = index.to(attention.device).expand(attention.shape)
            except RuntimeError as error:
                raise ScoreError(
                    f"Positions of shape {tuple(index.shape)} do not fit attention of shape "
                    f"{tuple(attention.shape)}."
                ) from error
            bias = bias[index]
        return attention.to(dtype) / bias

    def _stretched(self, n: int) -> Tensor:
        """The values at `n` positions; between the known ones log P is interpolated linearly."""
        old = len(self)
        places = (np.arange(n) + 0.5) * old / n - 0.5
        logs = self.values.log().numpy()
        if old == 1:
            return torch.ones(n, dtype=torch.float64)
        left = np.clip(np.floor(places).astype(int), 0, old - 2)
        logs = logs[left] + (places - left) * (logs[left + 1] - logs[left])
        return torch.from_numpy(np.exp(logs - logs.max()))


def need_count(n: int) -> None:
    if not 1 <= n <= MAX_POSITIONS:
        raise ProfileError(f"A position bias has 1 to {MAX_POSITIONS} positions, not {n}.")


def _own(values: Tensor) -> Tensor:
    """A private copy: float64, on the CPU, outside autograd and inference mode."""
    with torch.inference_mode(False):
        return values.detach().to("cpu", torch.float64).clone()


def _grid(grid: Sequence[int], n: int) -> tuple[int, int]:
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != n:
        raise ProfileError(
            f"A grid of {rows} rows and {columns} columns does not have {n} positions."
        )
    return int(rows), int(columns)
