"""Benchmarks of lmms-eval as the columns of a sweep; every cell that is done is kept on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pore import __version__
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.batches import conditions
from pore.evaluation.cells import Cell
from pore.evaluation.harness import TASKS
from pore.evaluation.harness.benchmarks import BENCHMARKS, OTHERS, not_scored_here
from pore.evaluation.harness.evaluator import TaskManager, load_yaml_config, simple_evaluate
from pore.evaluation.harness.model import PoreHF
from pore.evaluation.harness.scored import units_of
from pore.evaluation.outcome import Answer, Named, Outcome
from pore.evaluation.running import asked_model
from pore.evaluation.store import Store
from pore.evaluation.work import Progress

# What published tables show of a task; of other tasks the first metric counts.
_KNOWN = {one.task: one for one in (*BENCHMARKS, *OTHERS)}


class Tasks:
    """The tasks that a sweep runs, found once.

    Args:
        names: Names of tasks and of groups of tasks, which stand for what is in them.
        folder: Further tasks; None for those of pore and lmms-eval alone.

    Attributes:
        manager: lmms-eval's index of tasks.
        names: The tasks, none of them twice.

    Raises:
        InputError: There is no such task, or nothing of one is scored here.
    """

    def __init__(self, names: Iterable[str], folder: Path | None = None) -> None:
        asked, own = list(names), [str(TASKS), *([] if folder is None else [str(folder)])]
        # lmms-eval's own index takes many seconds, so it is made only if it is needed.
        self.manager = TaskManager(include_path=own, include_defaults=False)
        if not set(asked) <= set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=own)
        unknown = [name for name in asked if name not in self.manager.all_tasks]
        if unknown:
            raise InputError(
                f"lmms-eval has no task {', '.join(unknown)}. `lmms-eval tasks` lists its own; "
                "give the folder of further ones by --include-path."
            )
        self.names = tuple(dict.fromkeys(leaf for name in asked for leaf in self._leaves(name)))
        silent = [name for name in self.names if name in _KNOWN and _KNOWN[name].metric is None]
        if silent:
            why = " ".join(not_scored_here(silent))
            raise InputError(f"{why} A sweep has no score of it; leave it out of --tasks.")

    def _leaves(self, name: str) -> list[str]:
        entry = self.manager.task_index[name]
        if entry["type"] == "task":
            return [name]
        inner = entry["task"]
        if not isinstance(inner, list):  # a group, whose file has not been read
            inner = load_yaml_config(entry["yaml_path"], mode="simple")["task"]
        names = [one["task"] if isinstance(one, Mapping) else one for one in inner]
        return [leaf for one in names for leaf in self._leaves(one)]

    def file_of(self, name: str) -> str:
        """A digest of the file of a task; empty for a task without one."""
        path = self.manager.task_index[name]["yaml_path"]
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path != -1 else ""


class HarnessBenchmark:
    """A task of lmms-eval.

    Args:
        name: Its name.
        tasks: The tasks of the sweep.
        lm: The model.
        out: The folder of the sweep; cells go into its folder `answers`.
        limit: How many of its documents are asked; None for all.
        seed: Seed of examples in prompts.
    """

    def __init__(
        self, name: str, tasks: Tasks, lm: PoreHF, out: Path, *, limit: int | None, seed: int
    ) -> None:
        self._name, self._tasks, self._lm = name, tasks, lm
        self._limit, self._seed = limit, seed
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
                "file": tasks.file_of(name),
                "limit": limit,
                "seed": seed,
                "batch_size": lm.batch_size,
            },
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
        answers, measured = kept
        advance(1)
        outcome = Outcome(pruner, answers, asked=self._whose, metric=measured["metric"])
        return Cell.of(outcome, measured)

    def release(self) -> None:
        """Let go of the image features that are held for it."""
        self._lm.asker.release()

    def _kept(self, pruner: Pruner | None) -> tuple[tuple[Answer, ...], dict[str, Any]] | None:
        """The answers that are kept, and what was measured."""
        found = self.store.read(pruner)
        return None if found is None else (found[0], found[1]["measured"])

    def _evaluate(self, pruner: Pruner | None) -> Mapping[str, Any]:
        """The results of lmms-eval, in the first process."""
        self._lm.pruner = pruner
        several = self._lm.processes.size > 1
        return simple_evaluate(  # type: ignore[no-any-return]
            self._lm,
            tasks=[self._name],
            task_manager=self._tasks.manager,
            limit=self._limit,
            bootstrap_iters=0,
            random_seed=self._seed,
            fewshot_random_seed=self._seed,
            # By the processes that are there; the other backend makes some of its own.
            distributed_executor_backend="torchrun" if several else "accelerate",
        )

    def _keep(
        self, pruner: Pruner | None, found: Mapping[str, Any], named: Named
    ) -> tuple[tuple[Answer, ...], dict[str, Any]]:
        """Keep the answers, and what was measured."""
        known, config = _KNOWN.get(self._name), found["configs"][self._name]
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
        self.store.save(pruner, answers, measured=measured, cell=[self._name, *named])
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
        InputError: It has none: it only writes answers for a server or a judge.
    """
    listed = [one["metric"] for one in config.get("metric_list") or ()]
    names = listed if metric is None else [metric]
    for name in names:
        for key, value in results.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key.partition(",")[0] == name and number:
                return name, float(value)
    raise InputError(
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
