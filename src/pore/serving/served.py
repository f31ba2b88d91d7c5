"""A model that is served: how requests become inputs, and what happens while one is answered."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import LogitsProcessor

from pore.data.prompts import Prompt, prompt_inputs, render_messages
from pore.engine.pruner import Pruner
from pore.engine.report import Report
from pore.engine.run import Run
from pore.errors import BudgetError, PoreError
from pore.evaluation.effort import Effort, pruned_efforts, unpruned_efforts
from pore.evaluation.guided import guiding_of, with_guide
from pore.serving.metrics import Metrics
from pore.serving.requests import ChatRequest, Limits, RequestError
from pore.serving.stops import Stops

_BUDGETS = 64  # so many are kept, of those that requests ask for


class Gone(Exception):
    """Nobody waits for the answer any more."""


class Served:
    """A model, and the method that prunes it at the budget of every request.

    Args:
        name: What requests call the model.
        model: A supported vision-language model, not pruned.
        processor: Its processor.
        method: Makes the method for a budget; None serves the model unpruned.
        keep: The budget of requests that name none.
        limits: What requests may ask for.

    Attributes:
        metrics: What is counted.
        limits: As given, and texts no longer than the model could take.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        method: Callable[[int | float], Pruner] | None = None,
        keep: int | float = 0.25,
        limits: Limits | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.processor = processor
        self.keep = keep
        self._positions = _positions(model)
        self.limits = (limits or Limits()).of(self._positions)
        # One tokenizer must not encode in one thread while it decodes in another.
        self._encoder = copy.deepcopy(processor)
        # Of type and value: 1 is one token, 1.0 are all.
        self._made = None if method is None else lru_cache(_BUDGETS, typed=True)(method)
        self.metrics = self._metrics()

    def _metrics(self) -> Metrics:
        usual = self.pruner(None)
        return Metrics(
            model=self.name,
            method="none" if usual is None else usual.name,
            settings="" if usual is None else repr(usual),
        )

    def pruner(self, keep: int | float | None) -> Pruner | None:
        """The method at a budget.

        Args:
            keep: Visual tokens kept per image (int), or the fraction (float); None for the usual.

        Returns:
            The method; None for the unpruned model.

        Raises:
            RequestError: There is a budget, but the model is served unpruned.
            PoreError: The method takes no such budget.
        """
        if self._made is None:
            if keep is not None:
                raise RequestError("This server does not prune; leave `keep` out.")
            return None
        return self._made(self.keep if keep is None else keep)

    def prepare(self, asked: ChatRequest, images: Sequence[PIL.Image.Image]) -> Generation:
        """What is to be generated for a request. One thread at a time may call this.

        Args:
            asked: The request.
            images: Its pictures.

        Returns:
            The generation, not begun.

        Raises:
            PoreError: The request cannot be answered; the message says why.
        """
        return self.prepare_pruned(asked, images, self.pruner(asked.keep))

    def prepare_pruned(
        self, asked: ChatRequest, images: Sequence[PIL.Image.Image], pruner: Pruner | None
    ) -> Generation:
        """What is to be generated for a request, by a method that is given with it.

        Args:
            asked: As in `prepare`; its budget does not count.
            images: As in `prepare`.
            pruner: The method; None for the unpruned model.

        Returns:
            As `prepare`.

        Raises:
            PoreError: As `prepare`.
        """
        usual = self.model.generation_config
        if asked.stream and usual.num_beams not in (None, 1):
            raise RequestError("This model searches by beams, which cannot be streamed.")
        try:
            text = render_messages(self._encoder, asked.messages)
        except PoreError:
            raise
        except Exception as error:  # templates raise errors of their own
            raise RequestError(f"The chat template refuses the messages: {error}") from error
        prompt = Prompt("this request", text, images)
        model, encoder = self.model, self._encoder
        resize = None if pruner is None else pruner.resizing(model, encoder)
        inputs = prompt_inputs(encoder, [prompt], model.device, model.dtype, resize)
        asked = self._with_length(asked, inputs["input_ids"].shape[1])
        config = copy.deepcopy(usual)
        config.update(**asked.decoding(usual))
        # A picture may be large, and is needed again only by another model that guides.
        prompts = [] if guiding_of(pruner) is None else [prompt]
        return Generation(self, asked, prompts, inputs, pruner, config)

    def _with_length(self, asked: ChatRequest, length: int) -> ChatRequest:
        """A request whose prompt has so many tokens, with the most that its answer may have."""
        longest = self._positions
        room = math.inf if longest is None else longest - length
        new = asked.new_tokens
        if new is None:
            new = int(max(1, min(self.limits.new_tokens, room)))
        if new > room:
            less = ", or give a smaller max_tokens" if new > 1 else ""
            raise RequestError(
                f"The prompt has {length} tokens and asks for up to {new} more; the model takes "
                f"{longest} in all. Shorten it{less}."
            )
        return replace(asked, new_tokens=new)

    def try_out(self) -> None:
        """Answer a question about a blank picture, so that what cannot work is known at once.

        It is not counted.

        Raises:
            PoreError: The method cannot prune this model, or needs what it was not given.
        """
        part = {"type": "text", "text": "What is this?"}
        messages = ({"role": "user", "content": [{"type": "image"}, part]},)
        generation = self.prepare(
            ChatRequest(messages, new_tokens=1), [PIL.Image.new("RGB", (448, 448), "white")]
        )
        with suppress(BudgetError):  # other pictures may have more tokens
            generation.generate(**generation.inputs, generation_config=generation.generation_config)
        self.metrics = self._metrics()


class Generation:
    """One request on its way through the model.

    It stands in for the model where an answer is generated, so that the method's block is entered
    and left around this request's `generate` alone.

    Attributes:
        asked: The request.
        encoded: What the processor made of the prompt.
        inputs: What `generate` gets.
        generation_config: How it decodes.
        began: Done once the prompt is prefilled, or will not be.
        ended: Done once the model is as it was before.
        effort: What the prefill took; None before it.
        report: What the prefill kept; None before it, and without a method.
        prefill_seconds: From the vision tower to the first scores; 0 before them.
        seconds: The whole of `generate`; 0 before its end.
        error: What `generate` raised.
    """

    def __init__(
        self,
        served: Served,
        asked: ChatRequest,
        prompts: Sequence[Prompt],
        inputs: Any,
        pruner: Pruner | None,
        config: Any,
    ) -> None:
        self._served = served
        self.asked = asked
        self._prompts = prompts
        self.encoded = inputs
        self._pruner = pruner
        self._run: Run | None = None
        self._since = 0.0
        self._gone = False
        self.inputs: dict[str, Any] = {**inputs, "logits_processor": [_Watch(self._scored)]}
        if asked.stop:
            length = inputs["input_ids"].shape[1]
            stops = Stops(served.processor.tokenizer, asked.stop, length)
            self.inputs["stopping_criteria"] = [stops]
        self.generation_config = config
        self.began: Future[None] = Future()
        self.ended: Future[None] = Future()
        self.effort: Effort | None = None
        self.report: Report | None = None
        self.prefill_seconds = self.seconds = 0.0
        self.error: BaseException | None = None

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self._served.model.config

    def cancel(self) -> None:
        """Generate no further, as nobody waits for it; without effect once it has ended."""
        self._gone = True

    def generate(self, **given: Any) -> Any:
        """Call the model's `generate`, pruned.

        Args:
            **given: Its arguments.

        Returns:
            What it returns.

        Raises:
            Gone: It was cancelled.
            Exception: Whatever it raises; also kept as `error`.
        """
        model = self._served.model
        # Handed over is a processor, from which a checkpoint's own stop texts cannot be read.
        given["tokenizer"] = self._served.processor.tokenizer
        self._since = time.monotonic()
        try:
            self._check()
            with torch.inference_mode(), _seeded(self.asked.seed, model.device):
                longest = self.generation_config.max_new_tokens
                pruner = with_guide(self._pruner, self._prompts, self.encoded, longest)
                with nullcontext() if pruner is None else pruner(model) as self._run:
                    return model.generate(**given)
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._run = None
            self.seconds = time.monotonic() - self._since
            self._served.metrics.generated(self.seconds)
            if not self.began.done():
                self.began.set_result(None)
            self.ended.set_result(None)

    def _scored(self) -> None:
        """The model has scored the next token."""
        self._check()
        if self.effort is not None:
            return
        model = self._served.model
        if model.device.type != "cpu":  # the work has only been asked for so far
            torch.accelerator.synchronize(model.device)
        self.prefill_seconds = time.monotonic() - self._since
        if self._run is None:
            self.effort = unpruned_efforts(model, self.encoded)[0]
        else:
            self.report = self._run.report
            self.effort = pruned_efforts(self.report)[0]
        effort = self.effort
        self._served.metrics.prefilled(effort.seen, effort.left, self.prefill_seconds)
        self.began.set_result(None)

    def _check(self) -> None:
        if self._gone:
            raise Gone


def _positions(model: Any) -> int | None:
    """How many tokens a model takes; None if it does not say."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


class _Watch(LogitsProcessor):  # type: ignore[misc]
    """Tells that scores were computed, and leaves them as they are."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._tell()
        return scores


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers of this request alone, if it has a seed."""
    if seed is None:
        yield
        return
    own = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices=[device] if own else [], **own):
        torch.manual_seed(seed)
        yield
