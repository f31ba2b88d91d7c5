"""What a folder holds from earlier sweeps: the tables show it too, as long as it is comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pore.errors import InputError
from pore.evaluation.batches import Skipped
from pore.evaluation.cells import Benchmark, Cell
from pore.evaluation.files import Results, read_results
from pore.evaluation.metrics import EXACT
from pore.evaluation.outcome import Named, Outcome
from pore.evaluation.store import answers_in, read_kept
from pore.evaluation.wanted import Setting

# Conditions of a benchmark alone; another one is comparable although these differ.
_OF_ONE = {"task", "definition", "samples"}


def kept_before(
    benchmarks: Sequence[Benchmark], settings: Sequence[Setting]
) -> dict[Named, dict[str, Cell]]:
    """The cells in the folder of a sweep that it does not ask for itself.

    Args:
        benchmarks: What it asks, at least one.
        settings: Under which settings.

    Returns:
        By setting and benchmark those that were asked under the same conditions: the same model,
        versions and settings of the evaluation; and of a benchmark that it does not ask the same
        questions and scorer as the newest of them.
    """
    own = {one.name: one.store for one in benchmarks}
    asked = {one.store.place(each.pruner) for one in benchmarks for each in settings}
    planned = {each.named for each in settings}
    found: dict[Named, dict[str, Cell]] = {}
    newest: dict[str, Any] = {}
    for path in reversed(benchmarks[0].store.files):
        document = {} if path in asked else read_kept(path)
        cell, setting = document.get("cell"), document.get("setting")
        if not isinstance(cell, list) or len(cell) != 4 or not isinstance(setting, dict):
            continue
        name, method, correction, keep = cell
        named = (method, correction, keep)
        if name in own:
            fits = named not in planned and _same(setting, own[name].conditions, {"method"})
            fits = fits and document.get("scoring") == own[name].scoring
        else:
            shared = benchmarks[0].store.conditions
            fits = _same(setting, shared, {*_OF_ONE, *(setting.keys() ^ shared.keys())})
            asks = setting | {"method": None, "scoring": document.get("scoring")}
            fits = fits and newest.setdefault(name, asks) == asks
        if fits and name not in found.get(named, {}):
            kept = _cell(document, own[name].about if name in own else {})
            if kept is not None:
                found.setdefault(named, {})[name] = kept
    return {named: found[named] for named in reversed(found)}


def _cell(document: Mapping[str, Any], about: Mapping[str, Any]) -> Cell | None:
    """The cell in a file of a store; None if it is damaged, or holds no answer.

    Args:
        document: What the file holds.
        about: What the store of its benchmark writes into files, which older ones lack.
    """
    answers = answers_in(document)
    if not answers:
        return None
    try:
        skipped = tuple(Skipped(*one) for one in document.get("skipped", ()))
    except TypeError:
        return None
    measured = document.get("measured")
    metric = about.get("metric", EXACT.name) if measured is None else measured["metric"]
    outcome = Outcome(
        None,
        answers,
        skipped=skipped,
        metric=document.get("metric", metric),
        circumstances=document.get("circumstances", {}),
    )
    return Cell.of(outcome, measured)


def fitting(
    before: Mapping[Named, Mapping[str, Cell]], name: str, cell: Cell
) -> dict[Named, dict[str, Cell]]:
    """Those cells of before that are about as many questions as another one.

    Older files do not say which samples were skipped, without which answers cannot be compared.

    Args:
        before: As from `kept_before`.
        name: A benchmark.
        cell: That of the unpruned model on it.

    Returns:
        The cells, without others of the benchmark.
    """
    n = len(cell.outcome.scores)
    return {
        named: {
            one: kept for one, kept in cells.items() if one != name or len(kept.outcome.scores) == n
        }
        for named, cells in before.items()
    }


def _same(one: Mapping[str, Any], other: Mapping[str, Any], apart_from: set[str]) -> bool:
    """Whether two conditions are the same apart from some."""
    names = one.keys() | other.keys()
    return all(one.get(name) == other.get(name) for name in names - apart_from)


def with_former(results: Results, folder: Path) -> Results:
    """Results together with those that a folder has of other settings.

    Args:
        results: The results.
        folder: Where they are about to be written.

    Returns:
        The results, and after them those of settings that are not among them, if they are about the
        same questions, the same weights and the same versions.
    """
    try:
        former = read_results(folder / "results.json")
    except (InputError, OSError):
        return results

    def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in ("method", "reweight", "keep", "layer", "guide"))

    own_versions, others = (one.circumstances.get("versions", {}) for one in (results, former))
    # A package may take part in one of them alone, such as lmms-eval beside one's own questions.
    shared = own_versions.keys() & others.keys()
    if any(own_versions[name] != others[name] for name in shared) or (
        bool(own_versions) != bool(others)
    ):
        return results
    if list(former.questions) != list(results.questions):
        return results
    own = {key(record) for record in results.records}
    weights = {record["weights"] for record in results.records}
    more = [one for one in former.records if one["weights"] in weights and key(one) not in own]
    return replace(results, records=[*results.records, *more])
