"""The methods of a sweep, as they are named on the command line, made for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pore._processes import Processes
from pore.corrections.files import save_corrections
from pore.data.samples import Sample
from pore.engine.corrections import Correction
from pore.engine.limits import check_limits
from pore.engine.pruner import Pruner
from pore.errors import InputError, PoreError
from pore.evaluation.guided import Guiding
from pore.evaluation.hosts import host_measure
from pore.evaluation.results import LeftOut, SurveySettings
from pore.evaluation.reweighting import ROPE, UNCALIBRATED, reweighted, rope_bias
from pore.evaluation.survey import set_up
from pore.evaluation.sweep_rows import words
from pore.families.registry import family_of, sizes_of
from pore.methods.registry import method_named, methods
from pore.plotting.labels import UNPRUNED
from pore.tensors.selection import budget

PORE = "pore"
"""The name of P, after a host: "sparsevlm+pore". Alone it means P on FastV."""


class Wanted(NamedTuple):
    """A method that was asked for.

    Attributes:
        method: Its name.
        correction: The correction of position bias: `PORE`, or one that takes no calibration.
    """

    method: str
    correction: str | None = None


class Setting(NamedTuple):
    """A method at a budget.

    Attributes:
        keep: The budget, as it is shown.
        correction: As in `Wanted`.
        pruner: The method; None for the unpruned model.
    """

    keep: int | float | str | None
    correction: str | None
    pruner: Pruner | None

    @property
    def named(self) -> tuple[str, str | None, int | float | str | None]:
        """Method, correction and budget."""
        method = UNPRUNED if self.pruner is None else self.pruner.name
        return method, self.correction, self.keep


def read_wanted(names: Iterable[str]) -> tuple[Wanted, ...]:
    """Read the names of methods.

    Args:
        names: Such as "fastv", "sparsevlm+pore", "fastv+rope"; "pore" is "fastv+pore".

    Returns:
        The methods, none of them twice.

    Raises:
        InputError: There is no such method or correction, or the method takes none.
    """
    found = []
    for name in names:
        text = "fastv+pore" if name.lower() == PORE else name
        host, plus, correction = text.rpartition("+")
        # SparseVLM+ and PruMerge+ have a plus in their own names.
        if not plus or text.lower() in map(str.lower, methods()):
            host, correction = text, ""
        kind = method_named(host)
        corrections = (PORE, ROPE, *UNCALIBRATED)
        if correction and correction.lower() not in corrections:
            raise InputError(
                f"There is no correction {correction!r}; after + comes one of "
                f"{', '.join(corrections)}."
            )
        if correction and not kind.reweightable:
            raise InputError(
                f"{kind.name} does not rank by text-visual attention, so {name!r} means nothing."
            )
        found.append(Wanted(kind.name, correction.lower() or None))
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Corrections:
    """Makes the corrections of hosts; P is measured once for each, or given.

    Attributes:
        model: The model.
        processor: Its processor.
        calibration: Gives the samples that P is measured on.
        source: Where they come from, for the provenance.
        out: Folder for the sums and the profiles.
        settings: Form of P and size of a batch.
        given: P from a file; None measures it.
        processes: Those that ask for the same; the first of them measures.
    """

    model: Any
    processor: Any
    calibration: Callable[[], Sequence[Sample]]
    source: str
    out: Path
    settings: SurveySettings
    given: Sequence[Correction] | None = None
    processes: Processes = field(default_factory=Processes)

    def on(self, host: Pruner, name: str | None) -> Pruner:
        """A host with a correction.

        Args:
            host: The method.
            name: As in `Wanted`.

        Raises:
            PoreError: The correction does not fit, or P cannot be measured.
        """
        if name is None:
            return host
        if name in UNCALIBRATED:
            return reweighted(host, [UNCALIBRATED[name]])
        if name == ROPE:
            return reweighted(
                host, [rope_bias(self.model, self.processor, self.calibration()[:64])]
            )
        if self.given is not None:
            return reweighted(host, self.given)
        return reweighted(host, self.processes.alone(lambda: self._measured(host)))

    def _measured(self, host: Pruner) -> Sequence[Correction]:
        layers = sizes_of(self.model).decoder.layers
        measure = host_measure(host, self.model, self.processor, layers)
        sums = self.out / "calibrations" / f"{measure.name}.json"
        any_size = family_of(self.model).common_grid(self.model) is None
        fitted = measure.fit(
            self.calibration, sums, self.settings, source=self.source, any_size=any_size
        )
        save_corrections(self.out / "profiles" / f"{measure.name}.json", fitted)
        return fitted


def planned(
    model: Any,
    wanted: Sequence[Wanted],
    settings: SurveySettings,
    corrections: Corrections,
    guiding: Guiding,
    *,
    told: Callable[[str], None] = lambda _: None,
    visual: int | None = None,
) -> tuple[list[Setting], list[LeftOut]]:
    """Every method at every budget, the unpruned model first.

    Args:
        model: The model.
        wanted: The methods.
        settings: The budgets and the seed.
        corrections: Makes corrections.
        guiding: The model that guides SGL.
        told: Called with what is being done.
        visual: Visual tokens that images usually have, where the model takes any size.

    Returns:
        The settings, budget by budget; and those that cannot be made.
    """
    shape, family = sizes_of(model), family_of(model)
    found, left_out = [Setting(None, None, None)], []
    made: dict[Wanted, Callable[[Pruner], Pruner]] = {}
    # Where images may differ in size, a share stays a share of each.
    one_size = family.common_grid(model) is not None
    for keep in (budget(keep, shape.image_tokens) if one_size else keep for keep in settings.keeps):
        for one in wanted:
            told(f"setting up {one.method}")
            try:
                kind = methods()[one.method]
                pruner = set_up(kind, keep, model, settings, guiding, videos=True, visual=visual)
                if one not in made:
                    made[one] = partial(_like, corrections.on(pruner, one.correction))
                pruner = made[one](pruner)
                check_limits(pruner, family)
                pruner.check(model, family)
                if one_size:
                    pruner.counts(shape.image_tokens, shape.decoder.layers)
            except PoreError as error:
                left_out.append(LeftOut(words(one.method, one.correction), keep, str(error)))
            else:
                shown = f"mean {keep}" if settings.average else keep
                found.append(Setting(shown, one.correction, pruner))
    return found, left_out


def _like(first: Any, pruner: Any) -> Pruner:
    """A method with the correction of the same method at another budget."""
    if getattr(first, "reweight", None) is None:
        return pruner  # type: ignore[no-any-return]
    bias = first.reweight
    return reweighted(pruner, bias if isinstance(bias, tuple) else [bias])


def texts(given: Iterable[str]) -> list[str]:
    """The texts in lists with commas: ["a,b", "c"] is ["a", "b", "c"]."""
    return [part.strip() for text in given for part in text.split(",") if part.strip()]
