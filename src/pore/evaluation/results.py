"""Settings and results of evaluations: of the demo, and of the survey of all methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pore.bias.curve import Kind
from pore.calibration.page import Drawn
from pore.calibration.sums import Calibration
from pore.engine.corrections import Correction
from pore.evaluation.differences import Difference
from pore.evaluation.metrics import EXACT, Metric
from pore.evaluation.outcome import Outcome, records_of
from pore.evaluation.sizes import ImageSizes
from pore.plotting.labels import budget_label


@dataclass(frozen=True)
class About:
    """The circumstances of a demo or a survey.

    Attributes:
        model: Name of the model.
        command: The command line.
        calibration: Where the calibration samples come from.
        test: Where the test samples come from.
        setup: Hardware, versions and settings, in words by name.
        choice: Why the layer was chosen.
    """

    model: str
    command: str
    calibration: str
    test: str
    setup: Mapping[str, str]
    choice: str = ""


# -- the demo -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoSettings:
    """What the demo is to do.

    Attributes:
        layer: K, the first pruned layer.
        keeps: The budgets, as `keep` of a method.
        kind: Form of P where all images have one grid; for images of any size it is a power of the
            distance to the text.
        batch_size: Questions in one batch.
        seed: Seed of Random and of the bootstrap of differences.
        example_keep: The budget of the drawn examples; one of `keeps`.
        max_bad: Largest share of bad samples to skip, as in `calibrate` and `Batches`.
    """

    layer: int = 2
    keeps: tuple[int | float, ...] = (0.5, 0.25, 0.222, 0.1)
    kind: Kind = "exponential"
    batch_size: int = 32
    seed: int = 0
    example_keep: int | float = 0.25
    max_bad: float = 0.01


@dataclass(frozen=True)
class Figure:
    """A figure in a file.

    Attributes:
        caption: What it shows.
        path: The picture.
        narrow: The same drawn for a phone, as a PNG.
    """

    caption: str
    path: Path
    narrow: bytes | None = None


@dataclass(frozen=True)
class KeptBy:
    """What a method keeps of an image, for the page.

    Attributes:
        name: The method.
        answer: Its answer, in quotation marks.
        right: Whether that is right; None for the image itself.
        said: How many tokens are left.
        picture: The picture, as a PNG or JPEG.
    """

    name: str
    answer: str
    right: bool | None
    said: str
    picture: bytes


@dataclass(frozen=True)
class Example:
    """A question, and pictures of what methods kept of its image.

    Attributes:
        title: Why it is shown.
        said: The question and the right answer.
        paths: One picture of all methods, or one for each.
        kept: The methods for the page, FastV and FastV + PoRe first.
        only_ours: Whether it is shown because FastV + PoRe is right and FastV is not.
        grid: Whether all images have one grid.
    """

    title: str
    said: str
    paths: tuple[Path, ...]
    kept: tuple[KeptBy, ...]
    only_ours: bool
    grid: bool


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        settings: Its settings.
        calibration: Ā, and how it was measured.
        bias: P.
        rope: The data-free prior; None where the model has none.
        outcomes: The unpruned model first, then by budget.
        differences: Every other method against FastV, budget by budget.
        left_out: Methods that the model does not take, with the reasons.
        figures: What was measured and fitted.
        over_flops: Accuracy over FLOPs; None where these are not known.
        examples: Pictures of what is kept.
        report: The report.
    """

    settings: DemoSettings
    calibration: Calibration
    bias: Drawn
    rope: Correction | None
    outcomes: tuple[Outcome, ...]
    differences: tuple[Difference, ...]
    left_out: Mapping[str, str]
    figures: tuple[Figure, ...]
    over_flops: Figure | None
    examples: tuple[Example, ...]
    report: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of `results.json`."""
        return records_of(self.outcomes)


# -- all methods ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SurveySettings:
    """Settings of a survey of all methods.

    Attributes:
        keeps: The budgets: visual tokens left at the end, or the fraction of those there are.
        average: Whether budgets are the mean over the decoder layers instead.
        kind: Form of P; if no curve of that form fits, a spline, and else the mean attention.
        batch_size: Questions in one batch.
        max_new_tokens: Longest answer.
        timing: Whether to measure the prefill.
        seed: Seed of methods that draw at random, and of the bootstrap of differences.
        max_bad: Largest share of bad samples to skip, as in `calibrate` and `Batches`.
        metric: The rule by which answers are scored.
    """

    keeps: tuple[int | float, ...] = (1 / 3, 2 / 9, 1 / 9)
    average: bool = False
    kind: Kind = "exponential"
    batch_size: int = 32
    max_new_tokens: int = 8
    timing: bool = True
    seed: int = 0
    max_bad: float = 0.01
    metric: Metric = EXACT


@dataclass(frozen=True)
class LeftOut:
    """A method that could not be run.

    Attributes:
        method: Its name.
        keep: The budget, in tokens or as a share of each image.
        reason: Why not.
    """

    method: str
    keep: int | float
    reason: str


@dataclass(frozen=True)
class SurveyResult:
    """The result of a survey of all methods.

    Attributes:
        settings: Its settings.
        sizes: How many visual tokens the images have.
        layers: Decoder layers.
        outcomes: The unpruned model first, then budget by budget.
        differences: Every host with P compared with itself without P, over all questions and by
            third.
        left_out: Methods that could not be run.
        biases: The P of every stage, by host and the layers that it looks at.
        taught: The decoder layer from which on attention is better than a real model's, if any.
        report: The report.
    """

    settings: SurveySettings
    sizes: ImageSizes
    layers: int
    outcomes: tuple[Outcome, ...]
    differences: tuple[Difference, ...]
    left_out: tuple[LeftOut, ...]
    biases: Mapping[str, tuple[Drawn, ...]]
    taught: int | None
    report: Path

    @property
    def reasons(self) -> list[str]:
        """The methods that were left out and why, one line for every method and reason."""
        keeps: dict[tuple[str, str], list[str]] = {}
        for one in self.left_out:
            keeps.setdefault((one.method, one.reason), []).append(
                budget_label(one.keep).removeprefix("keep ")
            )
        return [
            f"{method} at {', '.join(budgets)}: {reason}"
            for (method, reason), budgets in keeps.items()
        ]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of `results.json`."""
        return records_of(self.outcomes)
