"""A position bias for every head of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pore._saved.forms import Form
from pore._saved.saved import Saved
from pore._saved.seals import seal
from pore.bias.position_bias import HEADS, POSITIONS, READ_ANY, PositionBias
from pore.bias.where import Where
from pore.engine.corrections import AttentionCorrection
from pore.errors import ProfileError, ProfileMismatchError

_MOST = 1 << 10


@dataclass(frozen=True)
class HeadBiases(AttentionCorrection, Saved):
    """Divides every head by its own position bias, before heads are averaged.

    Some heads look at a place, whatever is there; others look for what the text is about. One P for
    their mean divides both alike. Here heads of the first sort are flattened, and heads of the
    second sort are left as they are.

        measured = pore.calibrate(model, processor, samples, host=pore.FastV(keep=128), heads=True)
        pruner = pore.FastV(keep=128, reweight=measured.fit_heads("spline")[0])

    Attributes:
        biases: One for every query head, all over the same positions.

    Raises:
        ProfileError: There is none, or their positions differ.
    """

    biases: tuple[PositionBias, ...]

    _form: ClassVar[Form] = Form(
        schema=HEADS,
        what="position bias of heads",
        error=ProfileError,
        entries={"heads": list},
        elsewhere={POSITIONS: f"it holds one for all heads; {READ_ANY}"},
    )

    def __post_init__(self) -> None:
        if not 1 <= len(self.biases) <= _MOST or len({len(bias) for bias in self.biases}) != 1:
            raise ProfileError(
                f"The biases of heads are 1 to {_MOST}, all over the same positions; here are "
                f"{len(self.biases)} over {sorted({len(bias) for bias in self.biases})} positions."
            )

    def __repr__(self) -> str:
        first = self.biases[0]
        size = f"{len(first)} positions"
        if first.grid is not None:
            size += f" ({first.grid[0]}×{first.grid[1]})"
        spans = [(b.values.max() / b.values.min()).item() for b in self.biases]
        parts = [f"{len(self.biases)} heads", first.kind, size]
        parts.append(f"P of a head spans {min(spans):.3g} to {max(spans):.3g}")
        origin = first.provenance
        parts += [f"model {origin.model}"] if origin.model is not None else []
        parts += [f"layer {origin.layer}"] if origin.layer is not None else []
        return f"HeadBiases({', '.join(parts)})"

    @property
    def kind(self) -> str:  # type: ignore[override] # of every instance
        """Its name in tables."""
        return f"{self.biases[0].kind}, per head"

    def heads(self, weights: Tensor, where: Where) -> Tensor:
        """(I, H, R, t) weights, every head divided by its P.

        Raises:
            ProfileMismatchError: The layer has another number of heads, or an image has another
                number of tokens.
        """
        if weights.shape[1] != len(self.biases):
            raise ProfileMismatchError(
                f"There are position biases for {len(self.biases)} heads, and this layer has "
                f"{weights.shape[1]}; calibrate for it."
            )
        for image in where.layout.images:
            self.biases[0].check_length(image.count)
        each = torch.stack([bias.values for bias in self.biases]).to(weights)
        raster = where.raster.to(weights.device)
        return weights / each[:, raster].transpose(0, 1)[:, :, None]

    def check(self, **conditions: Any) -> None:
        """Refuse other conditions than those of the measurement; see `PositionBias.check`."""
        self.biases[0].check(**conditions)

    def allowing(self, *names: str) -> HeadBiases:
        """The same, for use where the named fields differ; see `PositionBias.allowing`."""
        return HeadBiases(tuple(bias.allowing(*names) for bias in self.biases))

    def document(self) -> dict[str, Any]:
        """What a file holds, but for the checksum."""
        return self._form.document({"heads": [seal(bias.document()) for bias in self.biases]})

    @classmethod
    def of_document(cls, document: Any) -> HeadBiases:
        """The biases that a JSON document of any origin holds, or ValueError."""

        def made_of(entries: dict[str, Any]) -> HeadBiases:
            return cls(tuple(map(PositionBias.of_document, entries["heads"])))

        return cls._form.read(document, made_of)
