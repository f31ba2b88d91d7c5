"""P for images of any size: a function of where a token is, not a list of numbers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from pore._saved.forms import Form, brief, floats, whole_numbers
from pore._saved.hub import OnHub
from pore.bias.coordinates import OVER, Over
from pore.bias.curve import MAX_POSITIONS, Kind
from pore.bias.measured import Measured
from pore.bias.position_bias import ANY_SIZE, POSITIONS, READ_ANY
from pore.bias.provenance import Provenance
from pore.bias.rope import floored_prior
from pore.bias.where import Where
from pore.errors import ProfileError, ScoreError

_AXES: dict[Over, tuple[str, ...]] = {
    "distance": ("distance",),
    "raster": ("raster",),
    "place": ("row", "column"),
}


REACH = 1 << 15
"""The largest distance for which a formula of the distance is computed."""

_FORM = Form(
    schema=ANY_SIZE,
    what="position bias for images of any size",
    error=ProfileError,
    entries={
        "over": str,
        "kind": str,
        "axes": list,
        "sizes": list,
        "parameters": dict,
        "provenance": dict,
    },
    elsewhere={POSITIONS: f"it holds one over the positions of one size; {READ_ANY}"},
)


@dataclass(frozen=True, eq=False)
class Axis:
    """A positive curve of one coordinate.

    Attributes:
        at: (K,) coordinates of its points, ascending, float64.
        values: (K,) its values there, positive, float64.
    """

    at: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        for name in ("at", "values"):
            numbers = torch.as_tensor(getattr(self, name), dtype=torch.float64, device="cpu")
            object.__setattr__(self, name, numbers)
        if self.at.ndim != 1 or not 1 <= len(self.at) <= MAX_POSITIONS:
            raise ProfileError("A curve needs a list of points, and here is none.")
        if self.at.shape != self.values.shape or not bool((self.at.diff() > 0).all()):
            raise ProfileError("A curve needs one value for each of its points, which must ascend.")
        fine = torch.isfinite(self.values) & (self.values > 0) & torch.isfinite(self.at)
        if not bool(fine.all()):
            raise ProfileError(
                "A position bias must be finite and positive everywhere, as attention is divided "
                f"by it; the least value here is {self.values.min().item():g}."
            )

    def __call__(self, where: Tensor) -> Tensor:
        """The curve at some coordinates, float64; beyond its ends, the value at the nearest end.

        Between the points log P is interpolated linearly.
        """
        at, logs = self.at.to(where.device), self.values.log().to(where.device)
        if len(at) == 1:
            return self.values.to(where.device).expand(where.shape)
        where = where.to(torch.float64).clamp(at[0], at[-1])
        right = torch.searchsorted(at, where.contiguous()).clamp(1, len(at) - 1)
        share = (where - at[right - 1]) / (at[right] - at[right - 1])
        return (logs[right - 1] + share * (logs[right] - logs[right - 1])).exp()


@dataclass(frozen=True, eq=False)
class AnySizeBias(Measured, OnHub):
    """How much attention a visual token gets for its place alone, for images of any size.

        measured = pore.calibrate(model, processor, photographs, layer=2)
        pruner = pore.FastV(keep=0.25, layer=2, reweight=measured.fit_any_size())

    Only ratios within an image matter to a ranking, so P has no unit here.

    Attributes:
        over: What P is a function of. "distance": tokens between the visual token and the last
            token of its prompt, so that text, tiles and further images between them count.
            "raster": the token's relative place in reading order, from 0 to 1. "place": a function
            of the relative row times one of the relative column.
        kind: The form of the curve.
        axes: The curve; for "place", the curve over rows and the curve over columns.
        sizes: The smallest and largest number of visual tokens of the images measured.
        parameters: The numbers that the curve was computed from.
        provenance: Where it comes from.
        allowed: Fields of the provenance that `check` does not compare; see `allowing`. Not saved.

    Raises:
        ProfileError: A field does not fit the others.
    """

    over: Over
    kind: Kind
    axes: tuple[Axis, ...]
    sizes: tuple[int, int]
    parameters: Mapping[str, float] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    allowed: frozenset[str] = frozenset()

    _form: ClassVar[Form] = _FORM
    _filename: ClassVar[str] = "any_size_bias.json"

    def __post_init__(self) -> None:
        if self.over not in OVER or self.kind not in get_args(Kind):
            raise ProfileError(
                f"A position bias is over one of {', '.join(OVER)}, and its kind is one of "
                f"{', '.join(get_args(Kind))}, not {brief(self.over)} and {brief(self.kind)}."
            )
        if len(self.axes) != len(_AXES[self.over]):
            raise ProfileError(f"A bias over {self.over} has {len(_AXES[self.over])} curves.")
        if not 1 <= self.sizes[0] <= self.sizes[1] <= MAX_POSITIONS:
            raise ProfileError(f"sizes={brief(self.sizes)} are not numbers of visual tokens.")

    @classmethod
    def rope(cls, *, head_dim: int, theta: float = 1e4) -> AnySizeBias:
        """The data-free prior of SparseVLM+, over the distance: see `PositionBias.rope`.

        Distances are counted in tokens, also in models whose positions have several axes.

        Args:
            head_dim: Size of a rotated attention head.
            theta: Base of the rotary embedding, unscaled.

        Returns:
            The bias, for distances up to 32,768 tokens and images of any size.

        Raises:
            ProfileError: A number is out of range.
        """
        prior, raised = floored_prior(REACH, head_dim=head_dim, theta=theta, text_tokens=1)
        # There the nearest token comes last; here distances ascend.
        axis = Axis(torch.arange(1, REACH + 1, dtype=torch.float64), prior.flip(0))
        parameters = {"head_dim": head_dim, "theta": theta, "raised": raised}
        return cls("distance", "rope", (axis,), (1, MAX_POSITIONS), parameters)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AnySizeBias):
            return NotImplemented
        return self.allowed == other.allowed and self.document() == other.document()

    def __hash__(self) -> int:
        return hash((self.over, self.kind, self.sizes, self.provenance, self.allowed))

    def __repr__(self) -> str:
        parts = [f"{self.kind} over the {self.over}"]
        for name, axis in zip(_AXES[self.over], self.axes, strict=True):
            span = (axis.values.max() / axis.values.min()).item()
            parts.append(f"{name} {axis.at[0]:g} to {axis.at[-1]:g} spans {span:.3g}")
        parts.append(f"images of {self.sizes[0]} to {self.sizes[1]} tokens")
        if self.provenance.model is not None:
            parts.append(f"model {self.provenance.model}")
        if self.provenance.layer is not None:
            parts.append(f"layer {self.provenance.layer}")
        return f"AnySizeBias({', '.join(parts)})"

    def at(self, where: Where) -> Tensor:
        """P at every visual token.

        Args:
            where: Where the tokens of I images lie.

        Returns:
            (I, t) P, float64.

        Raises:
            InputError: P is a function of the place, and the tokens of an image lie on no grid.
        """
        if self.over == "distance":
            return self.axes[0](where.distance)
        if self.over == "raster":
            return self.axes[0]((where.raster + 0.5) / where.counts)
        place = where.place
        return self.axes[0](place[..., 0]) * self.axes[1](place[..., 1])

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """Scores divided by P: PoRe Eq. 2. Warns of images of sizes that were not measured.

        Args:
            scores: (I, t) scores of the visual tokens of I images, which contain the bias.
            where: Where the tokens lie.

        Returns:
            (I, t) scores without the bias, at least float32.

        Raises:
            ScoreError: `scores` are not floating.
            InputError: As in `at`.
        """
        if not scores.is_floating_point():
            raise ScoreError(f"Attention must be floating point, not {scores.dtype}.")
        counts = [image.count for image in where.layout.images]
        if outside := [n for n in counts if not self.sizes[0] <= n <= self.sizes[1]]:
            warnings.warn(
                f"The position bias was measured on images of {self.sizes[0]} to {self.sizes[1]} "
                f"visual tokens, and here is one of {outside[0]}; whether it holds there was not "
                "measured. Calibrate with such images too (pore calibrate).",
                stacklevel=2,
            )
        dtype = torch.promote_types(scores.dtype, torch.float32)
        # Converted on the CPU: not every device has float64.
        return scores.to(dtype) / self.at(where.on_cpu).to(dtype).to(scores.device)

    def with_strength(self, strength: float) -> AnySizeBias:
        """The bias P^strength; see `PositionBias.with_strength`.

        Args:
            strength: λ from 0, which corrects nothing, to 1, the bias itself.

        Raises:
            ProfileError: `strength` is not from 0 to 1.
        """
        origin = self.weakened(strength)
        axes = tuple(Axis(axis.at, axis.values**strength) for axis in self.axes)
        return replace(self, axes=axes, parameters={}, provenance=origin)

    def document(self) -> dict[str, Any]:
        """What a file holds, but for the checksum."""
        return self._form.document(
            {
                "over": self.over,
                "kind": self.kind,
                "axes": [[axis.at.tolist(), axis.values.tolist()] for axis in self.axes],
                "sizes": list(self.sizes),
                "parameters": dict(self.parameters),
                "provenance": self.provenance.document(),
            }
        )

    @classmethod
    def of_document(cls, document: Any) -> AnySizeBias:
        """The bias that a JSON document of any origin holds, or ValueError."""
        return cls._form.read(document, cls._made_of)

    @classmethod
    def _made_of(cls, entries: dict[str, Any]) -> AnySizeBias:
        axes = []
        for one in entries["axes"]:
            lists = isinstance(one, list) and all(isinstance(each, list) for each in one)
            if not lists or len(one) != 2:
                raise ValueError("an axis must be a list of points and one of values.")
            numbers = (floats(each, len(one[0]), "an axis") for each in one)
            axes.append(Axis(*(torch.tensor(each, dtype=torch.float64) for each in numbers)))
        names, parameters = list(entries["parameters"]), entries["parameters"]
        values = floats(list(parameters.values()), len(names), "parameters")
        sizes = whole_numbers(entries["sizes"], "sizes")
        assert sizes is not None
        return cls(
            entries["over"],
            entries["kind"],
            tuple(axes),
            sizes,
            parameters=dict(zip(names, values, strict=True)),
            provenance=Provenance.of(entries["provenance"]),
        )
