"""Samples as model inputs, batch by batch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from pore._processes import Processes
from pore.data.prompts import build_inputs, processor_settings, prompt_template
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.features import MEMORY, Memory, encoding_once
from pore.evaluation.metrics import EXACT, Metric
from pore.identity import identity

_Value = TypeVar("_Value")

_log = logging.getLogger(__name__)


class Skipped(NamedTuple):
    """A sample that could not be asked.

    Attributes:
        number: Its place among the samples, from 0.
        id: Its id.
        reason: What was wrong with it.
    """

    number: int
    id: str
    reason: str


def listed(skipped: Sequence[Skipped]) -> str:
    """The end of a message, such as " Skipped: a: no answer"; empty if nothing was skipped."""
    if not skipped:
        return ""
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return " Skipped: " + "; ".join(f"{one.id}: {one.reason}" for one in skipped[:3]) + more


class Batches:
    """Model inputs of samples in batches, made once and used for every method.

    Inside a block of `encoding` the vision tower, too, runs only once per batch.

    Args:
        model: The model that the inputs are for.
        processor: Its processor.
        samples: The samples; each needs an answer or a box.
        batch_size: Samples in one batch.
        memory: Largest number of bytes of inputs and features to hold; what does not fit is made
            again for every method.
        max_bad: The share of bad samples (no answer, no readable image, refused by the processor)
            up to which they are skipped, for every method from then on. Of three samples or more,
            a single bad one is always skipped, unless the share is 0.
        processes: Those that share the batches.
        metric: The rule by which answers are scored; a sample that it cannot score is bad.

    Attributes:
        metric: The rule by which answers are scored.
        processes: Those that share the batches.
        skipped: The bad samples so far, by their place among the samples; of those that share the
            batches each knows its own until they `meet`.

    Raises:
        InputError: There is no sample, or too many have no answer to compare with.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        *,
        batch_size: int = 32,
        memory: int = MEMORY,
        max_bad: float = 0.01,
        processes: Processes = Processes(),  # noqa: B008
        metric: Metric = EXACT,
    ) -> None:
        if not samples:
            raise InputError("There are no samples to evaluate on.")
        if batch_size < 1:
            raise InputError(f"A batch has at least 1 sample, not {batch_size}.")
        if not 0 <= max_bad <= 1:
            raise InputError(f"max_bad is a share from 0 to 1, not {max_bad!r}.")
        self.model = model
        self.processor = processor
        self.samples = tuple(samples)
        self.batch_size = batch_size
        self.processes = processes
        self.metric = metric
        self._memory = Memory(memory)
        self._max_bad = max_bad
        self.skipped: dict[int, Skipped] = {}
        for number, sample in enumerate(self.samples):
            if (fault := metric.fault(sample)) is not None:
                self._leave_out(number, fault)
        self._check()

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def whose(self, i: int, pruner: Pruner | None) -> int:
        """The rank of the process that asks a batch under a setting.

        What a method draws by chance depends on the batches before, so one process asks all.
        """
        return 0 if pruner is not None and pruner.draws else i % self.processes.size

    def own(self, part: range, pruner: Pruner | None) -> list[int]:
        """The numbers of those batches of a part that this process asks under a setting."""
        return [i for i in part if self.whose(i, pruner) == self.processes.rank]

    @property
    def good(self) -> list[Sample]:
        """The samples that are not known to be bad."""
        return [each for number, each in enumerate(self.samples) if number not in self.skipped]

    def numbers(self, i: int) -> list[int]:
        """The indices, among all samples, of those in a batch that are not known to be bad."""
        return [number for number in self.of(range(i, i + 1)) if number not in self.skipped]

    def of(self, part: range) -> range:
        """The indices, among all samples, of those in some batches, bad ones too."""
        return range(len(self.samples))[part.start * self.batch_size : part.stop * self.batch_size]

    def inputs(self, i: int) -> dict[str, Any]:
        """The inputs of a batch as the processor gives them, pixels and all.

        Args:
            i: Number of the batch.

        Returns:
            Inputs of the good samples, those of `numbers(i)`; nothing where there is none.

        Raises:
            InputError: More samples are bad than `max_bad` allows.
        """
        held = self._memory.get(("inputs", i))
        if held is not None:
            return held  # type: ignore[no-any-return]
        numbers = self.numbers(i)
        made, bad = good_inputs(
            self.model, self.processor, [self.samples[number] for number in numbers]
        )
        for place, reason in bad.items():
            self._leave_out(numbers[place], reason)
        self._check()
        return self._memory.hold(("inputs", i), made)

    def encoding(self, pruner: Pruner | None) -> AbstractContextManager[None]:
        """A block in which images that were encoded before are not encoded again.

        It does nothing for a method that looks into the vision tower, or makes pictures smaller.
        """
        if pruner is not None and (pruner.resizes or pruner.reads_tower):
            return nullcontext()
        return encoding_once(self.model, self._memory)

    def of_method(self, i: int, pruner: Pruner | None) -> dict[str, Any]:
        """The inputs of a batch as a method takes them, which may be from smaller pictures.

        Args:
            i: Number of the batch.
            pruner: The method; None for the unpruned model.

        Returns:
            As `inputs` gives them.

        Raises:
            PoreError: As `inputs`; or a picture cannot be made small enough.
        """
        inputs = self.inputs(i)
        if pruner is None or not pruner.resizes or not inputs:
            return inputs
        resize = pruner.resizing(self.model, self.processor)
        samples = [self.samples[number] for number in self.numbers(i)]
        model = self.model
        return dict(build_inputs(self.processor, samples, model.device, model.dtype, resize))

    def release(self) -> None:
        """Let go of all inputs that are held; they are made again when they are asked for."""
        self._memory.clear()

    def sift(self) -> None:
        """Make all inputs once, to find bad samples before the first question is asked.

        Raises:
            InputError: More samples are bad than `max_bad` allows.
        """

        def make() -> None:
            for i in self.own(range(len(self)), None):
                self.inputs(i)

        self.meet(make)

    def meet(self, action: Callable[[], _Value]) -> list[_Value]:
        """Do something in every process; then all know all bad samples.

        Args:
            action: What this process does.

        Returns:
            The values of all processes, by rank.

        Raises:
            PoreError: As in `Processes.meet`; or more samples are bad than `max_bad` allows.
            OSError: As in `Processes.meet`.
        """
        told = self.processes.meet(lambda: (action(), self.skipped))
        for _, skipped in told:
            for number in skipped.keys() - self.skipped.keys():
                self._forget(number, skipped[number])
        self._check()
        return [value for value, _ in told]

    def skip(self, number: int, reason: str) -> None:
        """Leave a sample out from now on.

        Args:
            number: Its place among the samples.
            reason: Why.

        Raises:
            InputError: More samples are bad than `max_bad` allows.
        """
        self._leave_out(number, reason)
        self._check()

    def _leave_out(self, number: int, reason: str) -> None:
        name = self.samples[number].id
        self._forget(number, Skipped(number, name, reason))
        _log.warning("Skipped the sample %s: %s", name, reason)

    def _forget(self, number: int, skipped: Skipped) -> None:
        """Note a bad sample, and make the inputs of its batch anew."""
        self.skipped[number] = skipped
        self._memory.drop(("inputs", number // self.batch_size))

    def _check(self) -> None:
        """Refuse more bad samples than `max_bad` allows."""
        bad, n = len(self.skipped), len(self.samples)
        one = n > 2 and self._max_bad > 0
        if bad > max(one, int(self._max_bad * n + 1e-9)):
            raise InputError(
                f"{bad} of {n} samples are bad, more than the share max_bad={self._max_bad:g} "
                "allows; fix the data, or raise max_bad."
                f"{listed(list(self.skipped.values()))}"
            )
        if bad == n:
            raise InputError(f"All samples are bad.{listed(list(self.skipped.values()))}")


def good_inputs(
    model: Any, processor: Any, samples: Sequence[Sample]
) -> tuple[dict[str, Any], dict[int, str]]:
    """The inputs of the samples that can be asked, and what is wrong with the others.

    Args:
        model: The model that the inputs are for.
        processor: Its processor.
        samples: The samples of a batch.

    Returns:
        Inputs of the good samples, empty where there is none; reasons by place of the bad ones.

    Raises:
        InputError: The processor refuses samples together that it takes one by one.
    """
    bad: dict[int, str] = {}
    loaded: dict[int, Sample] = {}
    for place, sample in enumerate(samples):
        try:
            loaded[place] = replace(sample, image=sample.load())
        except InputError as error:
            bad[place] = str(error)
    if not loaded:
        return {}, bad
    try:
        made = dict(build_inputs(processor, [*loaded.values()], model.device, model.dtype))
    except InputError:
        for place, sample in list(loaded.items()):
            try:
                build_inputs(processor, [sample], model.device, model.dtype)
            except InputError as error:
                bad[place] = str(error)
                del loaded[place]
        if not loaded:
            return {}, bad
        made = dict(build_inputs(processor, [*loaded.values()], model.device, model.dtype))
    return made, bad


def conditions(model: Any, processor: Any) -> dict[str, Any]:
    """The conditions of answers other than the samples and how they are asked, as read from JSON.

    Args:
        model: The model.
        processor: Its processor.

    Returns:
        The model's identity and floating type, how it generates, the processor's settings, the
        prompt template and how the tokenizer reads it.
    """
    template = prompt_template(processor)
    generation = model.generation_config.to_dict()
    conditions = {
        **identity(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "generation": {k: v for k, v in generation.items() if k != "transformers_version"},
        "processor": processor_settings(processor),
        "template": template,
        "tokens": processor.tokenizer(template)["input_ids"],
    }
    return json.loads(json.dumps(conditions, default=str))  # type: ignore[no-any-return]
