"""What the page shows of a question: the model's answer unpruned, pruned, and pruned after a
correction of its attention; what was kept, and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import PIL.Image

from pore import plotting
from pore.calibration.reading import attention_stages
from pore.data.coverage import Coverage, coverage_of
from pore.data.prompts import Resize
from pore.data.samples import Sample
from pore.engine.corrections import Correction
from pore.engine.prefill import SampleReport
from pore.engine.pruner import Pruner
from pore.engine.watching import read_corrected
from pore.errors import CalibrationError, InputError, PoreError, ProfileMismatchError
from pore.evaluation.guided import Guiding
from pore.evaluation.reweighting import biases_named, with_and_without
from pore.layout import Layout
from pore.methods.making import make
from pore.methods.registry import methods
from pore.serving.asked import Asked
from pore.serving.measured import Measured
from pore.serving.pictures import opened
from pore.serving.requests import ChatRequest
from pore.serving.served import Generation, Gone, Served

NONE = "none"
"""The name of no correction."""

_DPI = 130


@dataclass(frozen=True)
class Side:
    """One of the answers that are shown side by side.

    Attributes:
        title: How the model was pruned.
        answer: What it answered.
        seen: Visual tokens of the prompt.
        left: Those that reached the last layer.
        extra: How many of these stand for no single patch.
        tokens: Tokens, of text too, that enter every decoder layer.
        flops: FLOPs of the prefill; None if the model's sizes are not known.
        prefill_ms: From the vision tower to the scores of the first token.
        whole_ms: The whole answer.
        kept: PNG of the picture with the tokens that were kept; None where they have no place.
        settings: The method and its settings; None unpruned.
    """

    title: str
    answer: str
    seen: int
    left: int
    extra: int
    tokens: tuple[int, ...]
    flops: int | None
    prefill_ms: float
    whole_ms: float
    kept: bytes | None
    settings: str | None = None


@dataclass(frozen=True)
class Seen:
    """What the page shows.

    Attributes:
        sides: The answers: unpruned, pruned, and pruned after the correction, if there is one.
        attention: PNG of the attention that ranks, before the correction and after it; None
            without any.
        layer: The decoder layer of that attention; None without any.
        notes: What else there is to say.
    """

    sides: tuple[Side, ...]
    attention: bytes | None
    layer: int | None
    notes: tuple[str, ...]


class Viewer:
    """Answers what visitors ask, one after the other.

    Args:
        served: The model, served unpruned.
        corrections: By name, corrections that were loaded, one for every stage or a single one for
            all, or that are measured.
        uncalibrated: Names of others, which `biases_named` makes for every question.

    Attributes:
        served: The model.
        methods: Names of the methods that are offered.
        corrections: Names of the corrections that are offered.
    """

    def __init__(
        self,
        served: Served,
        corrections: Mapping[str, Sequence[Correction] | Measured],
        uncalibrated: Sequence[str],
    ) -> None:
        self.served = served
        self._corrections = dict(corrections)
        self._uncalibrated = tuple(uncalibrated)
        self.corrections = (*corrections, NONE, *uncalibrated)
        model, processor = served.model, served.processor
        longest = served.limits.new_tokens
        self._guiding = Guiding(model, processor, max_new_tokens=longest, itself=True)
        self.methods = tuple(name for name in methods() if self._can_make(name))

    def _can_make(self, name: str) -> bool:
        """Whether a method needs nothing that cannot be given here."""
        if methods()[name].videos_only:
            return False
        try:
            self._make(name, 1.0, None)
        except PoreError:
            return False
        return True

    def _make(self, name: str, keep: int | float, layer: int | None) -> Pruner:
        kind = methods().get(name)
        guide = self._guiding if kind is not None and kind.guided else None
        return make(name, self.served.model, keep, guide=guide, layer=layer)

    def pruners(self, asked: Asked, picture: PIL.Image.Image) -> tuple[list[Pruner], list[str]]:
        """The method that is asked for, without the correction and with it.

        Args:
            asked: What is asked.
            picture: The picture.

        Returns:
            One method; two if a correction is asked for that it can take too. And notes, of one
            that it cannot take.

        Raises:
            PoreError: There is no such method or correction, or the method does not take the
                settings, or cannot do without a correction.
        """
        if asked.method not in self.methods:
            raise InputError(
                f"There is no method {asked.method!r} here; choose from {', '.join(self.methods)}."
            )
        kind = methods()[asked.method]
        if asked.layer is not None and "layer" not in {each.name for each in fields(kind)}:  # type: ignore[arg-type]
            raise InputError(f"{kind.name} has no layer K to choose; leave Layer K empty.")
        made = self._make(asked.method, asked.keep, asked.layer)
        if asked.correction not in self.corrections:
            raise InputError(
                f"There is no correction {asked.correction!r} here; choose from "
                f"{', '.join(self.corrections)}."
            )
        if made.always_reweighted and asked.correction == NONE:
            raise InputError(f"{made.name} always divides attention; choose a correction.")
        if asked.correction != NONE and not made.reweightable:
            note = f"{made.name} has nothing to divide by {asked.correction}: shown without."
            return [made], [note]
        try:
            return with_and_without(made, self._biases(asked, picture, made)), []
        except PoreError as error:
            return [made], [without(made, asked.correction, error)]

    def _biases(
        self, asked: Asked, picture: PIL.Image.Image, made: Pruner
    ) -> Sequence[Correction] | None:
        found = self._corrections.get(asked.correction)
        if isinstance(found, Measured):
            return found.of(made)
        if found is not None:
            return found
        name = None if asked.correction == NONE else asked.correction
        sample = Sample("the picture", picture, asked.question)
        return biases_named(name, (), self.served.model, self.served.processor, [sample])


def without(made: Pruner, correction: str, error: PoreError) -> str:
    """The note that a method is shown without a correction.

    Args:
        made: The method.
        correction: What the page calls the correction.
        error: Why the method cannot take it.

    Raises:
        InputError: The method cannot do without one.
    """
    if isinstance(error, ProfileMismatchError):  # which goes on with what a command does
        why = f"{correction} was measured for another layer or kind of attention"
    else:
        why = f"{correction} cannot be had for it"
    if made.always_reweighted:
        raise InputError(f"{made.name}: {why}; choose another correction.") from error
    return f"{made.name}, as it is set here: {why}, so it is shown without."


class _Canvas(NamedTuple):
    """A picture as the model was shown it, and which part of it every visual token shows."""

    picture: PIL.Image.Image
    coverage: list[Coverage]


class Looking:
    """A question on its way through the model. `see` is called on the one thread that runs it.

    Args:
        viewer: What answers.
        asked: What is asked.
        file: The file of the picture.
    """

    def __init__(self, viewer: Viewer, asked: Asked, file: bytes) -> None:
        self._viewer = viewer
        self._asked = asked
        self._file = file
        self._generation: Generation | None = None
        self._gone = False

    def cancel(self) -> None:
        """Do no more, as nobody waits for it; without effect once all is done."""
        self._gone = True
        if self._generation is not None:
            self._generation.cancel()

    def see(self) -> Seen:
        """Answer, and draw what was kept.

        Returns:
            What the page shows.

        Raises:
            Gone: It was cancelled.
            PoreError: It cannot be answered; the message says why.
        """
        self._check()
        (picture,) = opened([self._file], self._viewer.served.limits)
        pruners, notes = self._viewer.pruners(self._asked, picture)
        # The pruned ones first, as they may be refused.
        runs: list[tuple[Pruner, Generation, str]] = []
        for each in pruners:
            try:
                if not runs:  # warm up, so that none of those that are timed is the first
                    self._generated(each, picture, 1)
                runs.append((each, *self._generated(each, picture)))
            except ProfileMismatchError as error:
                notes.append(without(each, self._asked.correction, error))
        first, *others = runs
        generation, answer = self._generated(None, picture)
        whole = self._canvas(picture, None, notes)
        report = _report(first[1])
        tokens = (int(generation.encoded["attention_mask"].sum()),) * len(report.tokens)
        sides = [self._side(None, generation, answer, tokens, whole)]
        for pruner, generation, answer in [first, *others]:
            smaller = pruner.resizing(self._viewer.served.model, self._viewer.served.processor)
            canvas = whole if smaller is None else self._canvas(picture, smaller, notes)
            tokens = _report(generation).tokens
            sides.append(self._side(pruner, generation, answer, tokens, canvas))
            notes += [] if generation.report is None else generation.report.notes
        ranking = runs[-1][0]
        if ranking.harmed and others:
            notes.append(
                f"A position bias made {ranking.name} worse where that was measured: "
                f"{ranking.harmed}."
            )
        drawn = layer = None
        try:
            drawn, layer = self._attention(ranking, first[1], whole)
        except CalibrationError:  # which goes on with what else can be measured
            notes.append(f"There is no attention to show: {ranking.name} ranks by another kind.")
        except PoreError as error:
            notes.append(f"There is no attention to show: {error}")
        return Seen(tuple(sides), drawn, layer, tuple(dict.fromkeys(notes)))

    def _canvas(
        self, picture: PIL.Image.Image, resize: Resize | None, notes: list[str]
    ) -> _Canvas | None:
        """What to draw on; None, with a note, where tokens have no place in the picture."""
        settings = {} if resize is None else dict(resize.settings)
        if resize is not None and resize.picture is not None:
            picture = resize.picture(picture)
        served = self._viewer.served
        try:
            found = coverage_of(served.model, served.processor, picture, **settings)
        except PoreError as error:
            notes.append(f"What is kept cannot be drawn over this picture: {error}")
            return None
        return _Canvas(picture, found)

    def _generated(
        self, pruner: Pruner | None, picture: PIL.Image.Image, longest: int | None = None
    ) -> tuple[Generation, str]:
        """A generation that has ended, and the answer; usually it is as long as it may be."""
        served = self._viewer.served
        self._check()
        parts = [{"type": "image"}, {"type": "text", "text": self._asked.question}]
        messages = ({"role": "user", "content": parts},)
        greedy = ChatRequest(messages, new_tokens=longest, temperature=0.0)
        generation = served.prepare_pruned(greedy, [picture], pruner)
        self._generation = generation
        self._check()
        inputs = generation.inputs
        tokens = generation.generate(**inputs, generation_config=generation.generation_config)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answer = served.processor.batch_decode(new, skip_special_tokens=True)[0]
        return generation, answer.strip()

    def _check(self) -> None:
        if self._gone:
            raise Gone

    def _side(
        self,
        pruner: Pruner | None,
        generation: Generation,
        answer: str,
        tokens: tuple[int, ...],
        canvas: _Canvas | None,
    ) -> Side:
        effort = generation.effort
        assert effort is not None
        kept = None
        if canvas is not None:
            figure = plotting.layout(*canvas, effort.kept if pruner else None)
            kept = plotting.to_png(figure, _DPI)
        return Side(
            title=self._title(pruner),
            answer=answer,
            seen=effort.seen,
            left=effort.left,
            extra=effort.extra,
            tokens=tokens,
            flops=effort.flops,
            prefill_ms=1000 * generation.prefill_seconds,
            whole_ms=1000 * generation.seconds,
            kept=kept,
            settings=None if pruner is None else repr(pruner),
        )

    def _title(self, pruner: Pruner | None) -> str:
        if pruner is None:
            return "Unpruned"
        if getattr(pruner, "reweight", None) is None:
            return pruner.name
        return f"{pruner.name} + {self._asked.correction}"

    def _attention(
        self, pruner: Pruner, generation: Generation, canvas: _Canvas | None
    ) -> tuple[bytes, int]:
        """The attention that a method ranks by, before its correction and after it, drawn."""
        if not pruner.reweightable:
            raise InputError(f"{pruner.name} does not rank by text-visual attention.")
        if canvas is None:
            raise InputError("It has no place in the picture.")
        stage = attention_stages(pruner)[0]
        layer = stage.reads_layer
        assert layer is not None
        model = self._viewer.served.model
        layout, before, after = read_corrected(model, generation.encoded, pruner.name, stage)
        maps = {"Before": _by_raster(layout, before)}
        if stage.correction is not None:
            maps[f"After: {self._asked.correction}"] = _by_raster(layout, after)
        figure = plotting.attention(canvas.coverage, maps, unit="attention")
        return plotting.to_png(figure, _DPI), layer


def _report(generation: Generation) -> SampleReport:
    """What a method kept of the one prompt."""
    assert generation.report is not None
    (sample,) = generation.report.samples
    return sample


def _by_raster(layout: Layout, values: Any) -> list[list[float]]:
    """(I, t) numbers of the visual tokens as a list for every image, in raster order."""
    found = []
    for valid, places, row in zip(layout.valid, layout.raster, values.float(), strict=True):
        numbers = row[valid].cpu()
        found.append(numbers[places[valid].cpu().argsort()].tolist())
    return found
