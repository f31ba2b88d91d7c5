"""Answers kept on disk, so that an interrupted evaluation can resume."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pore._files import write_atomic
from pore._saved.parsing import read_json
from pore._saved.saved import Saved
from pore._saved.seals import sealed_text, unseal
from pore.bench.results import Spread
from pore.bias.position_bias import PositionBias
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.evaluation.batches import Batches, conditions
from pore.evaluation.guided import Guiding
from pore.evaluation.journal import Journal
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.results import SurveySettings
from pore.identity import picture_of

_MAX_BYTES, _MAX_VALUES = 1 << 30, 1 << 26  # of answers, which name every token kept


_NAMES = {"answers", "cell", "circumstances", "measured", "metric", "scoring", "setting", "skipped"}
"""What a file has entries for, apart from its checksum."""

_JOURNAL = ".batches"


class Store:
    """Answers by setting, one file each; they are valid only under the same conditions.

    Args:
        folder: The folder; None to keep nothing.
        conditions: What the answers depend on other than the method, as read from JSON.
        scoring: A digest of what their scores depend on; None where a benchmark scores them.
        about: What is written with all answers, by name, though they do not depend on it.
    """

    def __init__(
        self,
        folder: Path | None,
        conditions: Mapping[str, Any],
        scoring: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self.conditions = dict(conditions)
        self.scoring = scoring
        self.about = dict(about or {})

    @property
    def files(self) -> list[Path]:
        """All files of the folder, the newest last."""
        found = () if self._folder is None else self._folder.glob("*.json")
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)

    def place(self, pruner: Pruner | None) -> Path | None:
        """The file of a setting."""
        return self._place(pruner)[0]

    def _place(self, pruner: Pruner | None) -> tuple[Path | None, dict[str, Any]]:
        setting = self.conditions | {"method": described(pruner)}
        if self._folder is None:
            return None, setting
        name = slug(Outcome(pruner, ()).label)
        return self._folder / f"{name}-{digest(setting)[:12]}.json", setting

    def read(self, pruner: Pruner | None) -> tuple[tuple[Answer, ...], dict[str, Any]] | None:
        """The answers, and what else was written; None if there is no file, or it is damaged."""
        path, setting = self._place(pruner)
        document = {} if path is None else read_kept(path)
        if document.get("setting") != setting:
            return None
        answers = answers_in(document)
        return None if answers is None else (answers, document)

    def load(
        self, pruner: Pruner | None, samples: Sequence[Sample]
    ) -> tuple[tuple[Answer, ...], dict[str, Any]] | None:
        """The answers to these samples, and what else was written with them, as in `read`."""
        found = self.read(pruner)
        if found is None or not are_of(found[0], samples):
            return None
        return found[0], {name: value for name, value in found[1].items() if name != "answers"}

    def save(self, pruner: Pruner | None, answers: Sequence[Answer], **more: Any) -> None:
        """Write the answers, and more by name, whole or not at all; their journal is done with.

        Args:
            pruner: The setting.
            answers: Its answers.
            **more: What else is written; of a name that `about` has too, in its place.
        """
        path, setting = self._place(pruner)
        if path is None:
            return
        document = {
            "setting": setting,
            **({} if self.scoring is None else {"scoring": self.scoring}),
            "answers": list(map(plain, answers)),
            **self.about,
            **more,
        }
        write_atomic(path, sealed_text(document))
        path.with_suffix(_JOURNAL).unlink(missing_ok=True)

    def journal(self, pruner: Pruner | None) -> Journal:
        """Where the answers are kept batch by batch until all are there."""
        path, setting = self._place(pruner)
        return Journal(None if path is None else path.with_suffix(_JOURNAL), setting)


def kept_times(
    path: Path,
    conditions: Mapping[str, Any],
    pruners: Sequence[Pruner | None],
    measure: Callable[[], list[Spread]],
) -> list[Spread]:
    """The prefill times of some settings: from a file, if they were measured under the conditions.

    Args:
        path: The file; written after measuring.
        conditions: What times depend on other than the method.
        pruners: The methods; None is the unpruned model.
        measure: Measures them.

    Returns:
        For each its times, in milliseconds; those of older files, which hold medians alone, are
        measured again.
    """
    settings = [digest([conditions, described(pruner)]) for pruner in pruners]
    kept = read_kept(path)
    times = kept.get("prefill_ms")
    if (
        isinstance(times, list)
        and all(isinstance(one, list) and one for one in times)
        and kept.get("settings") == settings
    ):
        return [Spread(tuple(one)) for one in times]
    measured = measure()
    samples = [list(one.samples) for one in measured]
    write_atomic(path, sealed_text({"settings": settings, "prefill_ms": samples}))
    return measured


def are_of(answers: Sequence[Answer], samples: Sequence[Sample]) -> bool:
    """Whether these are answers to these samples, as their ids and questions tell."""
    return [(a.id, a.question) for a in answers] == [(s.id, s.question) for s in samples]


def plain(answer: Answer) -> dict[str, Any]:
    """An answer as files have it: an overlap and a score only where there is one."""
    absent = [name for name in ("iou", "score") if getattr(answer, name) is None]
    return {name: value for name, value in asdict(answer).items() if name not in absent}


def answers_in(document: Mapping[str, Any]) -> tuple[Answer, ...] | None:
    """The answers in a file of a store; None if it is damaged."""
    if not document.keys() <= _NAMES:  # such as a checksum whose name is damaged, not checked then
        return None
    try:
        return read_answers(document["answers"])
    except (KeyError, TypeError):
        return None


def read_answers(entries: Iterable[Mapping[str, Any]]) -> tuple[Answer, ...]:
    """Answers as `plain` wrote them.

    Args:
        entries: They.

    Raises:
        KeyError: One lacks what an answer has.
        TypeError: Likewise, or has something else.
    """
    return tuple(map(_answer, entries))


def _answer(entry: Mapping[str, Any]) -> Answer:
    return Answer(**{**entry, "kept": tuple(tuple(image) for image in entry["kept"])})


def read_kept(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, damaged or was changed."""
    try:
        document = read_json(path, _MAX_BYTES, values=_MAX_VALUES)
        return unseal(document) if isinstance(document, dict) else {}
    except (OSError, ValueError):
        return {}


def kept_under(
    model: Any, processor: Any, batches: Batches, settings: SurveySettings
) -> dict[str, Any]:
    """What answers depend on other than the method, as read from JSON.

    Right answers are not among it: what was answered is scored anew by those of today.
    """
    from pore import __version__

    asked = [(s.id, s.question, picture_of(s.image)) for s in batches.samples]
    return {
        "pore": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **conditions(model, processor),
        "samples": digest(asked),
        "batch_size": settings.batch_size,
        "max_new_tokens": settings.max_new_tokens,
    }


def scored_by(batches: Batches) -> str:
    """A digest of what the scores of answers depend on.

    Args:
        batches: The samples, and the metric.
    """
    right = [(s.accepted, s.box, s.kind, s.third) for s in batches.samples]
    return digest([batches.metric.name, right])


def described(pruner: Pruner | None) -> Any:
    """A method's name and settings as JSON.

    A bias is described by a digest of its values, another correction by its settings, a guiding
    model by all that its guides depend on.
    """

    def told(value: Any) -> Any:
        if isinstance(value, PositionBias):
            return f"{value.kind} {digest(value.values.tolist())[:16]}"
        if isinstance(value, Guiding):
            return value.conditions
        if isinstance(value, Saved):
            return f"{type(value).__name__} {digest(value.document())[:16]}"
        if is_dataclass(value) and callable(getattr(value, "correct", None)):
            parts = {f.name: told(getattr(value, f.name)) for f in fields(value)}
            return {"name": type(value).__name__, **parts}
        if isinstance(value, (tuple, list)):
            return [told(each) for each in value]
        return value if isinstance(value, (int, float, str, type(None))) else repr(value)

    if pruner is None:
        return None
    settings = {f.name: told(getattr(pruner, f.name)) for f in fields(pruner)}  # type: ignore[arg-type]
    return {"name": pruner.name, **settings}


def digest(value: Any) -> str:
    """The SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def slug(name: str) -> str:
    """A name as part of a file's name: "SparseVLM+" is "sparsevlm-plus"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", "-plus ")).strip("-")
