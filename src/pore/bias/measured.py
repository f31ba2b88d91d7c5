"""Corrections that were measured in one model, and are checked against the one they are used in."""

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
    """Has a provenance, which is compared with the conditions where it is used.

    Attributes:
        provenance: Where it comes from.
        allowed: Fields of the provenance that `check` does not compare; see `allowing`.
    """

    provenance: Provenance
    allowed: frozenset[str]

    def other_length(self, n: int) -> str | None:
        """How a number of visual positions differs from the measured one, in words, or None."""
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

        What is unknown (None) on either side is not compared; of `processor` and `config` only the
        settings that both sides name are. If `model` is a local path, its last part is compared,
        and the authors' checkpoints and their conversions by llava-hf count as the same model.

        `weights` and `config` are compared only if model and revision are the same: if these
        differ, or differences were allowed, others are to be expected. Weights in another number
        format cannot be compared, and pass.

        Args:
            n: Number of visual positions.
            model: Name or path of the model.
            revision: Its revision.
            layer: The layer to be pruned.
            normalize: The word for what the host reads.
            processor: Settings of the image processor.
            template: The prompt template.
            weights: The fingerprint of the model's weights, or a function that returns it.
            config: The settings of the model's config, or a function that returns them.

        Raises:
            ProfileMismatchError: Something differs; the message names everything that does, and how
                to allow it.
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

    def weakened(self, strength: float) -> Provenance:
        """The provenance of what is made of this with a strength, or ProfileError.

        Args:
            strength: From 0 to 1.
        """
        if not 0 <= strength <= 1:
            raise ProfileError(f"The strength of a bias is from 0 to 1, not {strength!r}.")
        return self.provenance.then(f"strength {strength:g}")

    def allowing(self, *names: str) -> Self:
        """The same, for use where the named fields differ. The override is not saved.

        Args:
            names: One or more of "model", "revision", "weights", "config", "layer", "normalize",
                "processor", "template". If the model or revision may differ, weights and config are
                not compared either.

        Returns:
            A copy whose `check` does not compare these fields.

        Raises:
            ProfileError: There is no such field, or it must always be compared, as the number of
                positions.
        """
        for name in names:
            if name == "n":
                raise ProfileError(f"The number of positions cannot be allowed. {OTHER_LENGTH}")
            if name not in CHECKED:
                raise ProfileError(
                    f"{brief(name)} is not one of the fields that are checked; choose from "
                    f"{', '.join(CHECKED)}."
                )
        return replace(self, allowed=self.allowed | set(names))  # type: ignore[type-var] # a mixin
