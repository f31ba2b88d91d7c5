"""A pruning method: a frozen dataclass of settings that says in `stages` where it acts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from pore.cost.shapes import ModelShape
from pore.data.prompts import Resize
from pore.engine.limits import family_limits, reads_tower, tower_stage
from pore.engine.run import Run, remove
from pore.engine.stages import Limit, Merges, Stage
from pore.errors import PoreError
from pore.families.base import Family
from pore.tensors.selection import budget
from pore.tower.stages import TowerStage


class Pruner(ABC):
    """A pruning method with its settings: subclass as a frozen dataclass and give `stages`.

    Attributes:
        name: The method's name in tables and on the command line.
        paper: Where it was published.
        reweightable: Whether it ranks by text-visual attention and so takes `reweight`.
        always_reweighted: Whether it cannot do without `reweight`.
        videos_only: Whether it compares the frames of a video: images stay whole.
        harmed: Why a position bias made it worse where that was measured (docs/corrections.md), as
            the end of a sentence; None where it did not.
        experimental: Whether it was built from a paper's description, with no code to compare with.
        draws: Whether it chooses by chance.
        reads_positions: Whether its scores change with the numbers that positions have, so that
            left padding, if it is counted, changes them.
        guided: Whether it ranks by what another model saw; `usual` then takes that one's `guide`.
        merges: Which of the visual tokens that do not stay it merges into those that do; None where
            they are dropped.
        resizes: Whether it acts on pictures, before the processor, see `resizing`.
        registry: Every method by name.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    reweightable: ClassVar[bool] = False
    always_reweighted: ClassVar[bool] = False
    harmed: ClassVar[str | None] = None
    videos_only: ClassVar[bool] = False
    experimental: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    reads_positions: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    merges: ClassVar[Merges | None] = None
    resizes: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Pruner]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(cls.__dict__.get("name"), str):
            for name, other in Pruner.registry.items():
                # A class that is defined anew (a cell run again, a dataclass with slots) may.
                again = (cls.__module__, cls.__name__) == (other.__module__, other.__name__)
                if name.lower() == cls.name.lower() and not again:
                    raise PoreError(
                        f"A method named {name!r} exists already, {other.__module__}."
                        f"{other.__qualname__}; give {cls.__module__}.{cls.__qualname__} another "
                        "name (its attribute `name`)."
                    )
            Pruner.registry[cls.name] = cls

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> Pruner | None:
        """The method as its authors set it up, scaled to a model's depth.

        Args:
            keep: Visual tokens left at the end, per image, or the fraction.
            shape: The model's sizes.

        Returns:
            The method; None where it needs more than a model to be set up, or is for videos alone.
        """
        return cls(keep=keep)  # type: ignore[call-arg]

    @abstractmethod
    def stages(self) -> Sequence[Stage | TowerStage]:
        """Where the method acts, in the order of the data's way: tower first, then by layer."""

    def stages_in(self, depth: int) -> Sequence[Stage | TowerStage]:
        """Where it acts in a decoder of `depth` layers; methods that act in all of them ask."""
        return self.stages()

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer.

        Args:
            visual: Visual tokens that the image comes with.
            layers: Decoder layers.

        Returns:
            One number for each layer.

        Raises:
            BudgetError: The image has fewer tokens than are to be kept.
        """
        (stage,) = self.stages()
        first = stage.layer if isinstance(stage, Stage) else 0
        kept = budget(self.keep, visual)  # type: ignore[attr-defined]
        return [visual] * first + [kept] * (layers - first)

    @property
    def tower_stage(self) -> TowerStage | None:
        """The stage in the vision tower, if there is one."""
        return tower_stage(self.stages())

    @property
    def reads_tower(self) -> bool:
        """Whether it reads what goes through the vision tower, which then must run while pruned."""
        return reads_tower(self.stages())

    @property
    def looks_at(self) -> list[int]:
        """The decoder layers whose attention, or else whose output, it ranks by."""
        stages = [s for s in self.stages() if isinstance(s, Stage) and s.layer]
        return [s.layer - 1 if s.reads_layer is None else s.reads_layer for s in stages]

    def limits(self, family: Family) -> list[Limit]:
        """What a family does not take of the method with these settings, whatever the model.

        `pore models` prints it, and a run that cannot be is refused by it.

        Args:
            family: The adapter.

        Returns:
            The limits; none where the method works.
        """
        return family_limits(self.stages(), family)

    def check(self, model: nn.Module, family: Family) -> None:  # noqa: B027 - optional
        """Refuse a model that the settings do not fit.

        Args:
            model: The model to be pruned.
            family: Its adapter.

        Raises:
            PoreError: Says what does not fit and what to do.
        """

    def resizing(self, model: nn.Module, processor: Any) -> Resize | None:
        """How pictures are made smaller before they become inputs; None: they are not.

        Args:
            model: The model.
            processor: Its processor.
        """
        return None

    def __call__(self, model: nn.Module) -> Run:
        """The context manager that prunes `model`.

        Args:
            model: A supported vision-language model of transformers.

        Returns:
            The run; its `report` says what was kept.

        Raises:
            UnsupportedModelError: The model is of no family that pore knows.
        """
        return Run(self, model)

    def apply(self, model: nn.Module) -> Run:
        """Prune `model` until `remove`. A pruner applied before is replaced.

        The report of an applied run is of the latest prefill only, so that it cannot grow.

        Args:
            model: A supported vision-language model of transformers.

        Returns:
            The run.
        """
        remove(model)
        return Run(self, model, history=1).__enter__()
