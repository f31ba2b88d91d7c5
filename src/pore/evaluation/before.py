"""What a folder holds from earlier sweeps: the tables show it too, as long as it is comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pore.errors import InputError
from pore.evaluation.cells import Benchmark, Cell
from pore.evaluation.files import Results, read_results
from pore.evaluation.outcome import Named, Outcome
from pore.evaluation.store import answers_in, read_kept
from pore.evaluation.wanted import Setting

# Conditions of a benchmark alone; another one is comparable although these differ.
_OF_ONE = {"task", "file", "samples"}


def kept_before(
    benchmarks: Sequence[Benchmark], settings: Sequence[Setting]
) -> dict[Named, dict[str, Cell]]:
    """The cells in the folder of a sweep that it does not ask for itself.

    Args:
        benchmarks: What it asks, at least one.
        settings: Under which settings.

    Returns:
        By setting and benchmark those that were asked under the same conditions, the newest of
        each: the same model, versions and settings of the evaluation.
    """
    own = {one.name: one.store for one in benchmarks}
    asked = {one.store.place(each.pruner) for one in benchmarks for each in settings}
    planned = {each.named for each in settings}
    found: dict[Named, dict[str, Cell]] = {}
    for path in benchmarks[0].store.files:
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
        answers = answers_in(document) if fits else None
        if answers:
            measured = document.get("measured")
            found.setdefault(named, {})[name] = Cell.of(Outcome(None, answers), measured)
    return found


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

    versions = [one.circumstances.get("versions") for one in (results, former)]
    if versions[0] != versions[1] or list(former.questions) != list(results.questions):
        return results
    own = {key(record) for record in results.records}
    weights = {record["weights"] for record in results.records}
    more = [one for one in former.records if one["weights"] in weights and key(one) not in own]
    return replace(results, records=[*results.records, *more])
