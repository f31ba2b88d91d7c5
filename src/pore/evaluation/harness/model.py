"""The model that lmms-eval runs: any supported one, pruned by any method, or not at all."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from pore._processes import Processes, joined
from pore.data.loading import load_model
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.batches import conditions
from pore.evaluation.circumstances import surroundings
from pore.evaluation.guided import Guiding
from pore.evaluation.harness.arguments import Arguments
from pore.evaluation.harness.asking import LONGEST, Asker, Conversation, Decoding, Reply
from pore.evaluation.harness.benchmarks import not_scored_here
from pore.evaluation.harness.efforts import Asked, averages, write_report
from pore.evaluation.harness.lmms import (
    PADDING,
    ChatMessages,
    GenerationResult,
    Instance,
    Lmms,
    TokenCounts,
    log_metrics,
)
from pore.evaluation.harness.plugin import MODEL
from pore.evaluation.reweighting import biases_named, reweighted
from pore.evaluation.store import described, digest
from pore.identity import names_of
from pore.methods.making import make
from pore.methods.registry import method_named

_log = logging.getLogger(__name__)


class PoreHF(Lmms):  # type: ignore[misc]
    """A vision-language model of transformers for lmms-eval, pruned or not.

    lmms-eval makes it from `--model_args` (see `Arguments`). In Python it is made of a loaded model
    and given to `simple_evaluate`, again and again, with another `pruner` if wanted:

        lm = PoreHF(model=model, processor=processor, pruner=pore.FastV(keep=128), batch_size=8)
        simple_evaluate(lm, tasks=["pope"])

    Args:
        model: A loaded model, instead of `pretrained`.
        processor: Its processor.
        pruner: The method for it; None is the unpruned model.
        **given: What `Arguments` takes; beside a loaded model, `batch_size` and `report`.

    Attributes:
        asked: What the prompts of the last evaluation took, in the first process. Prompts whose
            answers came from lmms-eval's cache are not among them.

    Raises:
        PoreError: A setting is unknown or does not fit, or the model is not supported.
    """

    is_simple = False

    def __init__(
        self,
        *,
        model: Any = None,
        processor: Any = None,
        pruner: Pruner | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        if model is None:
            own = Arguments.read({**given, "device": _device(given.get("device"))})
            model, processor = _loaded(own, own.pretrained, own.revision)
            pruner = _pruner(own, model, processor)
        else:
            if stray := given.keys() - {"batch_size", "report"}:
                raise InputError(
                    f"{', '.join(sorted(stray))}: a model that is loaded already takes no other "
                    "settings than pruner, batch_size and report."
                )
            own = Arguments.read({"pretrained": "", **given})
        self.batch_size = own.batch_size
        self._report = own.report
        self._device = model.device
        if self._world_size > 1 and model.device.index is not None:
            # Where the processes meet that have an accelerator each.
            torch.accelerator.set_device_index(model.device.index)
        self._asker: Asker | None = Asker(model, processor, pruner)
        self._made_for_one_run = False
        self._asked: dict[tuple[str, int], Asked] = {}
        self._seconds = 0.0
        self.asked: list[Asked] = []

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> PoreHF:
        """The model as lmms-eval makes it from its command line: for one evaluation."""
        made: PoreHF = super().create_from_arg_string(arg_string, additional_config)
        made._made_for_one_run = True
        return made

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self._device
        return found

    @property
    def processes(self) -> Processes:
        """The processes that share an evaluation."""
        several = self.world_size > 1 and dist.is_initialized()
        return joined() if several else Processes()

    @property
    def asker(self) -> Asker:
        """What puts prompts to the model.

        Raises:
            InputError: lmms-eval made this model for one evaluation, which is over.
        """
        if self._asker is None:
            raise InputError("This model was made for one evaluation, which is over; make another.")
        return self._asker

    @property
    def pruner(self) -> Pruner | None:
        """The method; None is the unpruned model. It may be set between evaluations."""
        return self.asker.pruner

    @pruner.setter
    def pruner(self, pruner: Pruner | None) -> None:
        self.asker.pruner = pruner
        self._asked.clear()

    @property
    def about(self) -> dict[str, Any]:
        """The model and the method, for reports."""
        return {**names_of(self.asker.model), "method": described(self.pruner)}

    def __str__(self) -> str:
        """All that answers depend on: by this text lmms-eval's cache tells models apart."""
        asker = self.asker
        known = [conditions(asker.model, asker.processor), described(asker.pruner)]
        return f"{MODEL} {digest(known)}"

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests, those of the same settings in batches.

        Args:
            requests: Requests of lmms-eval for chat models.

        Returns:
            An answer to each, in their order.

        Raises:
            PoreError: A request asks about something else than text and images, or cannot be put
                to the model; of several processes all raise what one of them met with.
        """
        if self.rank == 0:
            for line in not_scored_here(str(request.args[-2]) for request in requests):
                _log.warning(line)
        found: list[GenerationResult] = []
        self.processes.meet(lambda: found.extend(self._answers(requests)))
        return found

    def _answers(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        began = time.perf_counter()
        answers = [GenerationResult("", TokenCounts(0, 0)) for _ in requests]
        waiting: dict[tuple[str, bool], list[tuple[int, Conversation]]] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answering") as bar:

            def answer(key: tuple[str, bool]) -> None:
                batch = waiting.pop(key)
                decoding = Decoding.read(json.loads(key[0]))
                replies = self.asker.ask([asked for _, asked in batch], decoding)
                for (place, _), reply in zip(batch, replies, strict=True):
                    answers[place] = self._note(requests[place], reply)
                bar.update(len(batch))

            for place, request in enumerate(requests):
                if (request.metadata or {}).get(PADDING):
                    bar.update(1)
                    continue
                asked, settings = self._conversation(request)
                key = json.dumps(settings, sort_keys=True, default=str), bool(asked.images)
                waiting.setdefault(key, []).append((place, asked))
                if len(waiting[key]) == self.batch_size:
                    answer(key)
            for key in list(waiting):
                answer(key)
        self._seconds += time.perf_counter() - began
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported: pruning is about prompts that are answered."""
        raise NotImplementedError(f"{MODEL} answers questions; it gives no loglikelihoods.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError(f"{MODEL} answers in one round.")

    def clean(self) -> None:
        """End an evaluation, which lmms-eval does in all processes once all requests are answered.

        The first process gathers what the prompts took, and writes the report.
        """
        super().clean()
        own = [*self._asked.values()]
        gathered = self.processes.meet(lambda: (own, self._seconds))
        if self.rank == 0:
            self.asked = sorted((one for part, _ in gathered for one in part), key=_place)
            self._save(sum(seconds for _, seconds in gathered))
        self._asked.clear()
        self._seconds = 0.0
        if self._made_for_one_run:  # a judge may need the memory
            self._asker = None

    def _conversation(self, request: Instance) -> tuple[Conversation, Mapping[str, Any]]:
        """What a request asks, and how the answer is decoded."""
        make_messages, settings, doc_id, task, split = request.args[-5:]
        doc = self.task_dict[task][split][doc_id]
        chat = ChatMessages(messages=make_messages(doc))
        images, videos, audios = chat.extract_media()
        name = f"{task}, document {doc_id}"
        if videos or audios:
            raise InputError(f"{name} asks about a video or a sound; {MODEL} takes images.")
        return Conversation(name, chat.to_hf_messages(), images), settings

    def _note(self, request: Instance, reply: Reply) -> GenerationResult:
        """Note what a prompt took, and give its answer to lmms-eval."""
        doc_id, task, _ = request.args[-3:]
        self._asked[task, doc_id] = Asked.of(task, doc_id, reply)
        return GenerationResult(reply.text, TokenCounts(reply.input_tokens, reply.output_tokens))

    def _save(self, seconds: float) -> None:
        """Give averages to lmms-eval's results, and write the report."""
        if self.asked:
            means = averages(self.asked)
            written = sum(one.output_tokens for one in self.asked)
            log_metrics(
                total_elapsed_time=seconds,
                total_gen_tokens=written,
                avg_speed=written / seconds,
                additional_metrics={name: means[name] for name in _IN_RESULTS},
            )
        if self._report is not None:
            made = surroundings(self.device)
            if self.world_size > 1:
                made["hardware"]["processes"] = self.world_size
            write_report(Path(self._report), self.about | made, self.asked)


# What lmms-eval shows among its own numbers of a run, each with "avg_" before its name.
_IN_RESULTS = (
    "visual_tokens",
    "visual_tokens_left",
    "mean_visual_tokens",
    "flops",
    "unpruned_flops",
)


def _place(one: Asked) -> tuple[str, int]:
    return one.task, one.doc


def _device(name: Any) -> str:
    """The device of this process: of several on one machine, each takes its own accelerator."""
    asked = "auto" if name is None else str(name)
    kind = asked.partition(":")[0]
    if kind == "auto" and (found := torch.accelerator.current_accelerator(check_available=True)):
        kind = found.type
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return (
        f"{kind}:{os.environ['LOCAL_RANK']}" if several and kind not in ("auto", "cpu") else asked
    )


def _loaded(own: Arguments, name: str, revision: str | None) -> tuple[Any, Any]:
    return load_model(name, device=own.device, dtype=own.dtype, attn=own.attn, revision=revision)


def _pruner(own: Arguments, model: Any, processor: Any) -> Pruner | None:
    """The method that the settings name."""
    if own.method is None:
        return None
    guiding = None
    if method_named(own.method).guided:
        other = None if own.guide in (None, own.pretrained) else _loaded(own, str(own.guide), None)
        guiding = Guiding(
            *(other or (model, processor)), max_new_tokens=LONGEST, itself=other is None
        )
    biases = biases_named(own.reweight, own.allow, model, processor, ())
    pruner = make(
        own.method,
        model,
        own.keep,
        average=own.average,
        texts=own.settings,
        guide=guiding,
        layer=own.layer,
        normalize=own.normalize,
    )
    return pruner if biases is None else reweighted(pruner, biases)
