"""The position bias P of text-visual attention: fitted, divided out, compared, saved and loaded.

PoRe models the attention A_i that the last text token pays to visual token i as P_i · Â_i: a
bias that depends only on the position, times what the token is worth (arXiv 2508.17807, Eq. 2). P
is fitted to Ā, the mean of A over a data set (Eq. 3), and divided out before the host method ranks
the tokens (Eq. 4). Only the shape of P matters to a ranking, so it is kept at mean 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

import numpy.typing as npt
import torch
from torch import Tensor

from pore._saved.forms import Form, brief, floats, whole_numbers
from pore._saved.hub import OnHub
from pore.bias import fitting
from pore.bias.conditions import CONTENT
from pore.bias.curve import MAX_POSITIONS, Curve, Kind, need_count
from pore.bias.measured import Measured
from pore.bias.provenance import Provenance
from pore.bias.rope import floored_prior
from pore.errors import ProfileError

FILENAME = "position_bias.json"


SEVERAL = "pore.position_biases"
"""The schema for the biases of several stages; see `pore.bias.stages`."""

POSITIONS, ANY_SIZE, HEADS = "pore.position_bias", "pore.any_size_bias", "pore.head_biases"
"""The schemas of the forms: over positions, for images of any size, for every head."""

READ_ANY = "read it with pore.corrections.load_corrections, which takes every form."
"""What to do with a file of another form."""

_FORM = Form(
    schema=POSITIONS,
    what="position bias",
    error=ProfileError,
    entries={
        "kind": str,
        "n": int,
        "grid": (list, type(None)),
        "parameters": dict,
        "r2": (int, float, type(None)),
        "provenance": dict,
        "values": list,
        "residuals": (list, type(None)),
    },
    elsewhere={
        SEVERAL: "it holds several stages; read it with pore.bias.load_biases.",
        ANY_SIZE: f"it holds one for images of any size; {READ_ANY}",
        HEADS: f"it holds one for every head; {READ_ANY}",
    },
)


@dataclass(frozen=True, eq=False)
class PositionBias(Curve, Measured, OnHub):
    """How much attention a visual token gets for its position alone.

    Two biases are equal if everything they hold is equal.

    Attributes:
        values: P, of shape (N,), float64 on the CPU, positive, of mean 1; indexed by the raster
            position of a visual token in its image.
        kind: The form of the curve.
        grid: Rows and columns of the N positions, if known.
        parameters: The numbers that the curve was computed from. For the exponentials, `amplitude`
            and `offset` in units of the attention and `rate` per token: amplitude · exp(rate · i) +
            offset.
        r2: Share of the variance of the mean attention Ā that the fit explains; None if nothing was
            fitted.
        residuals: Ā minus the fitted curve, of shape (N,), float64, in units of the attention;
            None if nothing was fitted.
        provenance: Where it comes from.
        allowed: Fields of the provenance that `check` does not compare; see `allowing`. Not saved.

    Raises:
        ProfileError: `values` is not a finite, positive vector, or another field does not fit it.
    """

    provenance: Provenance = field(default_factory=Provenance)
    allowed: frozenset[str] = frozenset()

    _form: ClassVar[Form] = _FORM
    _filename: ClassVar[str] = FILENAME

    @classmethod
    def fit(
        cls,
        mean_attention: Tensor | npt.ArrayLike,
        kind: Kind = "exponential",
        *,
        grid: tuple[int, int] | None = None,
        provenance: Provenance | None = None,
        geometric: bool = False,
    ) -> PositionBias:
        """Fit a bias to the mean attention of a data set (arXiv 2508.17807, Eq. 3).

        Least squares on the attention itself, as in the paper, or (`geometric`) on its logarithm,
        all but the form with an offset. The kinds:

        - "exponential": a·exp(b·i), the paper's. b > 0 favours the last tokens; b < 0, a bias
          towards the first, is fitted and reported as well.
        - "exponential+offset": a·exp(b·i) + c, kept above half of the smallest attention measured,
          so that it cannot cross zero.
        - "spline": a cubic spline with 0, 1, 3 or 7 interior knots; the Bayesian information
          criterion chooses how many. With none it is one cubic, the form of the weights that were
          released for FastV with version 2 of the paper.
        - "empirical": the mean attention itself, noise and all.

        Args:
            mean_attention: Ā, of shape (N,): the mean over samples of the attention on each
                visual token. Its scale does not matter to the bias.
            kind: Form of the curve.
            grid: Rows and columns of the visual tokens.
            provenance: Where the attention comes from.
            geometric: Whether `mean_attention` is a geometric mean, and the curve is fitted to its
                logarithm; `parameters["geometric"]` then is 1.

        Returns:
            The bias, with its goodness of fit.

        Raises:
            ScoreError: The attention is not a vector of enough finite, non-negative numbers, not
                all of them zero.
            ProfileError: There is no such kind, the grid does not fit, or the best fit is not
                positive and finite.
        """
        points = None
        if geometric:
            points = fitting.Points.even(len(torch.as_tensor(mean_attention)), logs=True)
        found = fitting.fit(mean_attention, kind, points)
        parameters = {**found.parameters, "geometric": 1.0} if geometric else found.parameters
        return cls(
            torch.from_numpy(found.curve),
            kind,
            grid=grid,
            parameters=parameters,
            r2=found.r2,
            residuals=torch.from_numpy(found.residuals),
            provenance=provenance or Provenance(),
        )

    @classmethod
    def exponential(
        cls,
        rate: float,
        n: int,
        *,
        grid: tuple[int, int] | None = None,
        provenance: Provenance | None = None,
    ) -> PositionBias:
        """The bias exp(rate · i) over `n` positions.

        Args:
            rate: b, per token; positive where the last tokens are favoured. Rates published for
                LLaVA-1.5-7B run from 0.0011 to 0.0046 (`pore.profiles`).
            n: Number of positions.
            grid: Rows and columns of the positions.
            provenance: Where the rate comes from.

        Returns:
            The bias.

        Raises:
            ProfileError: `rate` is not finite, P would span more than float64 can hold, or `n` is
                out of range.
        """
        need_count(n)
        if not math.isfinite(rate):
            raise ProfileError(f"The rate of a position bias must be finite, not {rate}.")
        positions = torch.arange(n, dtype=torch.float64)
        # The largest value is 1, so that no rate overflows.
        values = torch.exp(rate * positions - max(rate * (n - 1), 0.0))
        return cls(
            values,
            "exponential",
            grid=grid,
            parameters={"rate": float(rate)},
            provenance=provenance or Provenance(),
        )

    @classmethod
    def rope(
        cls,
        n: int,
        *,
        head_dim: int,
        text_tokens: int,
        theta: float = 1e4,
        grid: tuple[int, int] | None = None,
    ) -> PositionBias:
        """The data-free prior of SparseVLM+: what RoPE alone does to equal queries and keys.

        Seen from the last text token, visual token i is n − 1 − i + `text_tokens` positions
        away. The prior oscillates and turns negative at long distances (for a head of 128 and
        theta 1e4, from 1707 on), where it would reverse the ranking. Values below `ROPE_FLOOR`
        times the value at distance 0 are therefore raised to it; `parameters["raised"]` counts
        them.

        Args:
            n: Number of visual tokens, one after another.
            head_dim: Size of a rotated attention head.
            text_tokens: Tokens after the last visual token, including the querying one.
            theta: Base of the rotary embedding, unscaled.
            grid: Rows and columns of the visual tokens.

        Returns:
            The bias.

        Raises:
            ProfileError: A number is out of range.
        """
        need_count(n)
        values, raised = floored_prior(n, head_dim=head_dim, theta=theta, text_tokens=text_tokens)
        settings = {"head_dim": head_dim, "theta": theta, "text_tokens": text_tokens}
        return cls(values, "rope", grid=grid, parameters={**settings, "raised": raised})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PositionBias):
            return NotImplemented
        return self.allowed == other.allowed and self.document() == other.document()

    def __hash__(self) -> int:
        return hash((self.kind, len(self), self.growth, self.grid, self.provenance, self.allowed))

    def __repr__(self) -> str:
        size = f"{len(self)} positions"
        if self.grid is not None:
            size += f" ({self.grid[0]}×{self.grid[1]})"
        kind = f"{self.kind} of the geometric mean" if "geometric" in self.parameters else self.kind
        parts = [kind, size, f"last/first = {self.growth:.3g}"]
        if self.r2 is not None and self.kind != "empirical":
            parts.append(f"R² = {self.r2:.3f}")
        if raised := self.parameters.get("raised"):
            parts.append(f"{raised:.0f} raised to the floor")
        for f in fields(Provenance):
            value = getattr(self.provenance, f.name)
            if value is not None and f.name not in ("processor", "template", "stability", *CONTENT):
                parts.append(f"{f.name} {value}")
        if self.allowed:
            parts.append(f"not checked: {', '.join(sorted(self.allowed))}")
        return f"PositionBias({', '.join(parts)})"

    def with_strength(self, strength: float) -> PositionBias:
        """The bias P^strength, which corrects in part: A / P^strength.

        Args:
            strength: λ from 0, which corrects nothing, to 1, the bias itself.

        Returns:
            The weaker bias; `provenance.source` names the strength. `r2` and `residuals` are not
            kept.

        Raises:
            ProfileError: `strength` is not from 0 to 1.
        """
        origin = self.weakened(strength)
        return PositionBias(self.values**strength, self.kind, grid=self.grid, provenance=origin)

    def resample(
        self, n: int | None = None, *, grid: tuple[int, int] | None = None
    ) -> PositionBias:
        """The bias stretched to another number of positions, by relative raster position.

        Position i of n lies at (i + ½) / n of the whole. Between positions log P is interpolated
        linearly, so an exponential stays exponential. It is an assumption that a bias measured on
        one grid holds on another; nothing in pore makes it unless asked, and `provenance.source` of
        the result names it. `r2` and `residuals` are not kept.

        Args:
            n: Number of positions wanted; if omitted, that of `grid`.
            grid: Rows and columns wanted.

        Returns:
            The resampled bias.

        Raises:
            ProfileError: Neither is given, or they contradict each other.
        """
        if n is None:
            if grid is None:
                raise ProfileError("Resampling needs the number of positions wanted, or the grid.")
            n = math.prod(grid)
        need_count(n)
        provenance = self.provenance.then(f"resampled from {len(self)} to {n} positions")
        if self.kind == "exponential":
            return PositionBias.exponential(
                self.rate * len(self) / n, n, grid=grid, provenance=provenance
            )
        return PositionBias(self._stretched(n), self.kind, grid=grid, provenance=provenance)

    def document(self) -> dict[str, Any]:
        """What a file holds, but for the checksum."""
        entries = {
            "kind": self.kind,
            "n": len(self),
            "grid": self.grid,
            "parameters": self.parameters,
            "r2": self.r2,
            "provenance": self.provenance.document(),
            "values": self.values.tolist(),
            "residuals": None if self.residuals is None else self.residuals.tolist(),
        }
        return self._form.document(entries)

    @classmethod
    def of_document(cls, document: Any) -> PositionBias:
        """The bias that a JSON document of any origin holds, or ValueError."""
        return cls._form.read(document, cls._made_of)

    @classmethod
    def _made_of(cls, entries: dict[str, Any]) -> PositionBias:
        n, r2, residuals = entries["n"], entries["r2"], entries["residuals"]
        if not 1 <= n <= MAX_POSITIONS:
            raise ProfileError(f"n must be from 1 to {MAX_POSITIONS}, not {brief(n)}.")
        parameters = entries["parameters"]
        numbers = floats([*parameters.values()], len(parameters), "parameters")
        return cls(
            _vector(entries["values"], n, "values"),
            cast(Kind, entries["kind"]),
            grid=whole_numbers(entries["grid"], "grid"),
            parameters=dict(zip(parameters, numbers, strict=True)),
            r2=None if r2 is None else floats([r2], 1, "r2")[0],
            residuals=None if residuals is None else _vector(residuals, n, "residuals"),
            provenance=Provenance.of(entries["provenance"]),
        )


def _vector(numbers: list[Any], n: int, name: str) -> Tensor:
    return torch.tensor(floats(numbers, n, name), dtype=torch.float64)
