"""Which samples a calibration has processed, so that none counts twice or is left out.

Two things are kept: for a pass, one digest of the ids and questions of its samples in their order;
and for every sample a mark, 8 bytes for its picture and its tokens and 4 for its id.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from pore.data.prompts import prompt_template
from pore.data.samples import Sample
from pore.errors import CalibrationError
from pore.identity import picture_of

_log = logging.getLogger("pore.calibration")


_CONTENT_BYTES, _ID_BYTES = 8, 4


_MARK_BYTES = _CONTENT_BYTES + _ID_BYTES


def digest(before: str, samples: Sequence[Sample]) -> str:
    """The digest of a pass after more samples, in their order.

    Args:
        before: The digest before them; before the first sample, what else the pass depends on.
        samples: The samples.
    """
    for sample in samples:
        text = "\0".join((before, sample.id, sample.question))
        before = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return before


def tokens_of(processor: Any) -> str:
    """What tells a processor's tokenizer from others: its token ids for the template."""
    ids = processor.tokenizer(prompt_template(processor))["input_ids"]
    return json.dumps(ids)


def marks_of(tokens: str, samples: Sequence[Sample]) -> bytes:
    """The marks of samples, one after another.

    Args:
        tokens: What `tokens_of` returns.
        samples: The samples.
    """

    def short(size: int, *texts: str) -> bytes:
        text = json.dumps(texts).encode()
        return hashlib.blake2b(text, digest_size=size).digest()

    return b"".join(
        short(_CONTENT_BYTES, tokens, sample.question, picture_of(sample.image))
        + short(_ID_BYTES, sample.id)
        for sample in samples
    )


def one_by_one(marks: bytes) -> list[bytes]:
    """The mark of every sample."""
    return [marks[i : i + _MARK_BYTES] for i in range(0, len(marks), _MARK_BYTES)]


def united(one: bytes | None, other: bytes | None) -> bytes | None:
    """The marks of the samples of two calibrations; None if those of either are unknown.

    Args:
        one: Marks.
        other: Marks of other samples.

    Raises:
        CalibrationError: A sample is in both. If only its id differs, a warning is logged.
    """
    if one is None or other is None:
        return None
    parts = one_by_one(one), one_by_one(other)
    same = len(set(parts[0]) & set(parts[1]))
    if same:
        raise CalibrationError(
            f"These calibrations share {same} samples, which would count twice; split the data "
            "into shards that have no sample in common, and merge each once."
        )
    pictures, others = ({mark[:_CONTENT_BYTES] for mark in part} for part in parts)
    if twice := len(pictures & others):
        _log.warning(
            "The calibrations to merge share %d samples with the same picture and question but "
            "different ids; they count twice.",
            twice,
        )
    return b"".join(sorted(parts[0] + parts[1]))


def to_text(marks: bytes | None) -> str | None:
    """Marks as text for JSON."""
    return None if marks is None else base64.b64encode(marks).decode()


def of_text(text: str | None, count: int) -> bytes | None:
    """The marks of `count` samples from such text; ValueError if it does not hold them."""
    if text is None:
        return None
    marks = base64.b64decode(text, validate=True)
    if len(marks) != _MARK_BYTES * count:
        raise ValueError("samples must hold a mark for every sample.")
    return marks
