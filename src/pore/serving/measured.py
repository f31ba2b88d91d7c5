"""P for whatever method and layer a visitor chooses, measured when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pore.calibration.calibrating import calibrate
from pore.calibration.reading import attention_stages, measured_by
from pore.data.samples import Sample
from pore.engine.corrections import Correction
from pore.engine.pruner import Pruner


class Measured:
    """Position biases of one model, whose images have one size. One thread at a time uses them.

    Args:
        model: The model, not pruned.
        processor: Its processor.
        samples: What they are measured on.
    """

    def __init__(self, model: Any, processor: Any, samples: Sequence[Sample]) -> None:
        self._model = model
        self._processor = processor
        self._samples = samples
        # By what they are measured of, so that there are no more than methods and layers.
        self._found: dict[object, Sequence[Correction]] = {}

    def of(self, host: Pruner) -> Sequence[Correction]:
        """The biases of a method's stages.

        Args:
            host: The method.

        Returns:
            One for every stage that ranks by attention.

        Raises:
            PoreError: It does not rank by attention that can be measured beforehand.
        """
        how: dict[str, Any] = {"host": host}
        if host.always_reweighted:  # so that it has no stages without one
            how = {"layer": getattr(host, "layer", None)}
            key: object = (host.name, how["layer"])
        else:
            stages = attention_stages(host)
            key = (host.name, *((one.reads_layer, measured_by(one)) for one in stages))
        if key not in self._found:
            made = calibrate(self._model, self._processor, self._samples, **how)
            found = made.fit("auto", mean="geometric")
            self._found[key] = found if isinstance(found, Sequence) else [found]
        return self._found[key]
