"""What was measured in a model, and is checked against the model where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from typing_extensions import Self

from pore._saved.forms import brief
from pore.bias.conditions import CHECKED, OTHER_LENGTH, differences, refuse
from pore.bias.provenance import Provenance, plain
from pore.errors import ProfileError


class Measured:
    """What has a provenance, which is compared with the conditions at hand.

    Attributes:
        provenance: Where it comes from.
        allowed: Fields of the provenance that `check` passes over; see `allowing`.
    """

    provenance: Provenance
    allowed: frozenset[str]

    def other_length(self, n: int) -> str | None:
        """How a number of visual positions differs from those measured, in words, or None."""
        return None

    def check(
        self,
        *,
        n: int | None = None,
        model: str | None = None,
        revision: str | None = None,
        layer: int | None = None,
        normalize: str | None = None,
        processor: Mapping[str, Any] | None = None,
        template: str | None = None,
        weights: str | Callable[[], str | None] | None = None,
        config: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Refuse to be used under other conditions than those it was measured under.

        What is unknown (None) on either side is not compared; of `processor` and `config`, the
        settings that both sides name are. Of `model`, a local path is compared by its last part,
        and the authors' checkpoints and their conversions by llava-hf count as the same model.

        `weights` and `config` are of a model by its name, so they are compared where that is the
        same: a model or a revision that is another, or was allowed, has others. Weights in another
        number format cannot be compared, and pass.

        Args:
            n: Number of visual positions at hand.
            model: Name or path of the model at hand.
            revision: Its revision.
            layer: The layer to be pruned.
            normalize: The word for what the host reads.
            processor: Settings of the image processor.
            template: The prompt template.
            weights: The fingerprint of the model's weights, or what gives it where it is needed.
            config: The settings of the model's config, or what gives them.

        Raises:
            ProfileMismatchError: Something differs; the message names all of it, and the way
                round it.
        """
        here = {
            "model": model,
            "revision": revision,
            "weights": weights,
            "config": config,
            "layer": layer,
            "normalize": normalize,
            "processor": None if processor is None else plain(processor),
            "template": template,
        }
        positions = None if n is None else self.other_length(n)
        refuse(positions, differences(self.provenance, here, self.allowed))

    def allowing(self, *names: str) -> Self:
        """The same, for use where the named fields differ. The override is not saved.

        Args:
            names: Of "model", "revision", "weights", "config", "layer", "normalize", "processor",
                "template". Another model or revision has other weights and another config, which
                are then not compared either.

        Returns:
            A copy whose `check` passes over these fields.

        Raises:
            ProfileError: There is no such field, or it cannot be passed over, as the number of
                positions.
        """
        for name in names:
            if name == "n":
                raise ProfileError(f"The number of positions cannot be allowed. {OTHER_LENGTH}")
            if name not in CHECKED:
                raise ProfileError(
                    f"{brief(name)} is nothing that is checked; choose from {', '.join(CHECKED)}."
                )
        return replace(self, allowed=self.allowed | set(names))  # type: ignore[type-var] # a mixin
