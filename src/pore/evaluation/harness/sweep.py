"""Benchmarks of lmms-eval as the columns of a sweep; every cell that is done is kept on disk."""

from __future__ import annotations

import importlib.metadata
import io
import logging
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers

from pore import __version__
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.batches import conditions
from pore.evaluation.cells import BenchmarkError, Cell
from pore.evaluation.circumstances import surroundings
from pore.evaluation.harness import TASKS
from pore.evaluation.harness.definition import definition
from pore.evaluation.harness.evaluator import (
    TaskManager,
    get_task_dict,
    load_yaml_config,
    simple_evaluate,
)
from pore.evaluation.harness.failures import cause, of_lmms_eval
from pore.evaluation.harness.model import PoreHF
from pore.evaluation.harness.scored import units_of
from pore.evaluation.harness.scoring import KNOWN, refusal, warning
from pore.evaluation.outcome import Answer, Named, Outcome
from pore.evaluation.running import asked_model
from pore.evaluation.store import Store
from pore.evaluation.work import Progress

_log = logging.getLogger(__name__)

_Kept = tuple[tuple[Answer, ...], dict[str, Any], Mapping[str, Any] | None]


class Tasks:
    """The tasks that a sweep runs, found once.

    Args:
        names: Names of tasks and of groups of tasks, which stand for what is in them.
        folder: Further tasks; None for those of pore and lmms-eval alone.

    Attributes:
        manager: lmms-eval's index of tasks.
        names: The tasks, none of them twice.
        warnings: What to know of who scores them.

    Raises:
        InputError: There is no such folder or task, a file of one cannot be read, or nothing of
            one is scored here.
    """

    def __init__(self, names: Iterable[str], folder: Path | None = None) -> None:
        asked, own = list(names), [str(TASKS), *([] if folder is None else [str(folder)])]
        if folder is not None and not folder.is_dir():
            raise InputError(f"--include-path {folder}: there is no such folder.")
        try:
            # lmms-eval's own index takes many seconds, so it is made only if it is needed.
            self.manager = TaskManager(include_path=own, include_defaults=False)
            if not set(asked) <= set(self.manager.all_tasks):
                self.manager = TaskManager(include_path=own)
        except Exception as error:
            where = "its own tasks" if folder is None else f"the tasks in {folder}"
            raise InputError(f"lmms-eval cannot read {where}: {cause(error)}.") from error
        unknown = [name for name in asked if name not in self.manager.all_tasks]
        if unknown:
            raise InputError(
                f"lmms-eval has no task {', '.join(unknown)}. `lmms-eval tasks` lists its own; "
                "give the folder of further ones by --include-path."
            )
        self.names = tuple(dict.fromkeys(leaf for name in asked for leaf in self._leaves(name)))
        configs = {name: self._config(name) for name in self.names}
        if silent := list(filter(None, (refusal(*each) for each in configs.items()))):
            raise InputError(
                f"{' '.join(silent)} A sweep has no score of it; leave it out of --tasks."
            )
        self.warnings = tuple(filter(None, (warning(*each) for each in configs.items())))

    def _leaves(self, name: str) -> list[str]:
        entry = self.manager.task_index[name]
        if entry["type"] in ("task", "python_task"):
            return [name]
        inner = entry["task"]
        if not isinstance(inner, list):  # a group, whose file has not been read
            inner = load_yaml_config(entry["yaml_path"], mode="simple")["task"]
        names = [one["task"] if isinstance(one, Mapping) else one for one in inner]
        return [leaf for one in names for leaf in self._leaves(one)]

    def _config(self, name: str) -> dict[str, Any]:
        """The settings of a task, functions by their names."""
        return dict(load_yaml_config(self.manager.task_index[name]["yaml_path"], mode="simple"))

    def definition_of(self, name: str) -> str:
        """A digest of all that defines a task on this machine."""
        return definition(self.manager.task_index[name]["yaml_path"])


class HarnessBenchmark:
    """A task of lmms-eval.

    Args:
        name: Its name.
        tasks: The tasks of the sweep.
        lm: The model.
        out: The folder of the sweep; cells go into its folder `answers`, and what the task writes
            for servers and judges into one of its own for every setting.
        limit: How many of its documents are asked; None for all.
        seed: Seed of examples in prompts.
    """

    def __init__(
        self, name: str, tasks: Tasks, lm: PoreHF, out: Path, *, limit: int | None, seed: int
    ) -> None:
        self._name, self._tasks, self._lm = name, tasks, lm
        self._limit, self._seed, self._out = limit, seed, out
        self._can_be_loaded = False
        asker = lm.asker
        self.store = Store(
            out / "answers",
            {
                "pore": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "lmms_eval": importlib.metadata.version("lmms-eval"),
                **conditions(asker.model, asker.processor),
                "task": name,
                "definition": tasks.definition_of(name),
                "limit": limit,
                "seed": seed,
                "batch_size": lm.batch_size,
            },
            about={"circumstances": surroundings(asker.model.device)},
        )
        self._whose = asked_model(asker.model)

    @property
    def name(self) -> str:
        """The task's name."""
        return self._name

    def ask(self, pruner: Pruner | None, advance: Progress, named: Named) -> Cell:
        """The cell of a setting, as in `cells.Benchmark`."""
        alone = self._lm.processes.alone
        kept = alone(lambda: self._kept(pruner))
        if kept is None:
            found = self._evaluate(pruner)
            kept = alone(lambda: self._keep(pruner, found, named))
        answers, measured, made = kept
        advance(1)
        metric = measured["metric"]
        outcome = Outcome(
            pruner, answers, asked=self._whose, metric=metric, circumstances=made or {}
        )
        return Cell.of(outcome, measured)

    def release(self) -> None:
        """Let go of the image features that are held for it."""
        self._lm.asker.release()

    def _kept(self, pruner: Pruner | None) -> _Kept | None:
        """The answers that are kept, what was measured, and under which circumstances."""
        found = self.store.read(pruner)
        if found is None:
            return None
        answers, written = found
        return answers, written["measured"], written.get("circumstances")

    def _evaluate(self, pruner: Pruner | None) -> Mapping[str, Any]:
        """The results of lmms-eval, in the first process.

        Raises:
            BenchmarkError: The task cannot be loaded, put or scored.
        """
        self._lm.pruner = pruner
        if self._lm.processes.size == 1:
            with of_lmms_eval(self._name):
                return self._results(pruner, "accelerate")
        if not self._can_be_loaded:  # else one process fails while the others wait for it
            self._lm.processes.alone(self._load)
            self._can_be_loaded = True
        try:
            # By the processes that are there; the other backend makes some of its own.
            with of_lmms_eval(self._name):
                return self._results(pruner, "torchrun")
        except BenchmarkError as error:
            # The other processes may be anywhere: this one must end, and torchrun ends them.
            raise RuntimeError(str(error)) from error

    def _load(self) -> None:
        """Have lmms-eval load the task, to see that it can be."""
        with of_lmms_eval(self._name):
            get_task_dict([self._name], self._tasks.manager, "chat")

    def _results(self, pruner: Pruner | None, backend: str) -> Mapping[str, Any]:
        place = self.store.place(pruner)
        folder = self._out / self._name / (place.stem if place else "")
        given = {"output_path": str(folder), "tasks": self._name, "process_with_media": True}
        with redirect_stdout(io.StringIO()) as said:
            found: Mapping[str, Any] = simple_evaluate(
                self._lm,
                tasks=[self._name],
                task_manager=self._tasks.manager,
                limit=self._limit,
                bootstrap_iters=0,
                random_seed=self._seed,
                fewshot_random_seed=self._seed,
                cli_args=Namespace(**given),
                distributed_executor_backend=backend,
            )
        if said.getvalue():
            _log.info(said.getvalue())
        return found

    def _keep(self, pruner: Pruner | None, found: Mapping[str, Any], named: Named) -> _Kept:
        """Keep the answers, and what was measured."""
        with of_lmms_eval(self._name):
            answers, measured = self._read(found)
        self.store.save(pruner, answers, measured=measured, cell=[self._name, *named])
        return answers, measured, self.store.about["circumstances"]

    def _read(self, found: Mapping[str, Any]) -> tuple[tuple[Answer, ...], dict[str, Any]]:
        """The answers in lmms-eval's results, and what it measured."""
        known, config = KNOWN.get(self._name), found["configs"][self._name]
        metric, value = headline(
            found["results"][self._name], config, known.metric if known else None
        )
        samples = sorted(found["samples"][self._name], key=lambda sample: int(sample["doc_id"]))
        scores = [score_of(sample.get(metric)) for sample in samples]
        scored = all(score is not None for score in scores)
        shares = scored and all(0 <= score <= 1 for score in scores if score is not None)
        efforts = {one.doc: one for one in self._lm.asked if one.task == self._name}
        answers = [
            _answer(sample, score if shares else None, efforts[sample["doc_id"]])
            for sample, score in zip(samples, scores, strict=True)
        ]
        adds_up = scored and known is not None and known.adds_up
        if adds_up:
            value = sum(score for score in scores if score is not None) / len(scores)
        mean = shares and (adds_up or _is_mean(metric, config))
        units = None if mean else units_of([sample.get(metric) for sample in samples], value)
        scale = 100.0 if shares and 0 <= value <= 1 else 1.0
        measured = {
            "metric": metric,
            "value": value,
            "scale": scale if known is None else known.scale,
            "scored": shares,
            "mean": mean,
            "units": None if units is None else units.record(),
        }
        return tuple(answers), measured


def headline(
    results: Mapping[str, Any], config: Mapping[str, Any], metric: str | None = None
) -> tuple[str, float]:
    """What a task measures: the first of its metrics that is a number.

    Args:
        results: Its results in lmms-eval, such as `{"exact_match,none": 0.5}`.
        config: Its settings.
        metric: The metric, where it is known.

    Returns:
        The metric's name, and its value.

    Raises:
        BenchmarkError: It has none: it only writes answers for a server or a judge.
    """
    listed = [one["metric"] for one in config.get("metric_list") or ()]
    names = listed if metric is None else [metric]
    for name in names:
        for key, value in results.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key.partition(",")[0] == name and number:
                return name, float(value)
    raise BenchmarkError(
        f"{config.get('task')} gives no score here; it writes its answers for somebody else to "
        "score. Leave it out of the sweep."
    )


def _is_mean(metric: str, config: Mapping[str, Any]) -> bool:
    listed = config.get("metric_list") or ()
    return any(one["metric"] == metric and one.get("aggregation") == "mean" for one in listed)


def score_of(value: Any) -> float | None:
    """The score of a document, which tasks give as a number or as the entry "score" of an object.

    Args:
        value: What lmms-eval logs of a document for the metric.

    Returns:
        The score; None where there is none.
    """
    if isinstance(value, Mapping):
        value = value.get("score")
    return float(value) if isinstance(value, (int, float)) else None


def _answer(sample: Mapping[str, Any], score: float | None, effort: Any) -> Answer:
    doc = sample["doc"]
    given: Sequence[Any] = sample["filtered_resps"]
    kind, third = (doc.get(name) for name in ("kind", "third"))
    return Answer(
        id=str(sample["doc_id"]),
        question=str(doc.get("question", sample["doc_hash"])),
        expected=str(sample["target"]),
        given=str(given[0]) if given else "",
        right=score == 1,
        kind=kind if isinstance(kind, str) else None,
        third=third if isinstance(third, str) else None,
        # Only how many tokens were left is told, not which.
        kept=(),
        extra=effort.visual_tokens_left,
        flops=effort.flops,
        mean_tokens=effort.mean_visual_tokens,
        score=None if score in (0, 1) else score,
    )
