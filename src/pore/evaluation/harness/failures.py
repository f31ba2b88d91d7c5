"""What lmms-eval raises, in words: which task it was, why, and what to do."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pore.errors import PoreError
from pore.evaluation.cells import BenchmarkError

# Where the model is asked: an error from there is none of lmms-eval's.
_ASKING = "pore.evaluation.harness.asking"

_LONGEST = 400  # letters of a cause; some hold a whole page of a server

_DATA = (
    "See that this machine reaches it, and that its data set is open to you (a gated one wants its "
    "terms accepted on the hub, and `hf auth login`); or leave the task out."
)
_SCORING = "The task itself is at fault, or does not fit this version of lmms-eval; leave it out."


@contextmanager
def of_lmms_eval(task: str) -> Iterator[None]:
    """Errors in the block that are lmms-eval's own name the task and their cause.

    Args:
        task: The task that lmms-eval loads, puts or scores.

    Raises:
        BenchmarkError: Loading the task, putting its questions or scoring its answers failed.
    """
    try:
        yield
    except PoreError:
        raise
    except Exception as error:
        where = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(frame.f_globals.get("__name__") == _ASKING for frame in where):
            raise
        loading = any(frame.f_code.co_name == "get_task_dict" for frame in where)
        done = "be loaded" if loading else "be put or scored"
        raise BenchmarkError(
            f"lmms-eval's task {task} cannot {done}: {cause(error)}. "
            f"{_DATA if loading else _SCORING}"
        ) from error


def cause(error: BaseException) -> str:
    """Why something failed, in the words of the error and of the innermost one behind it.

    Args:
        error: What was raised; of an error that only says how often something was tried, what was
            raised the last time counts.
    """
    if type(error).__name__ == "RetryError" and error.__cause__ is not None:
        error = error.__cause__
    inner: BaseException = error
    seen = {id(inner)}
    while (behind := _behind(inner)) is not None and id(behind) not in seen:
        inner = behind
        seen.add(id(inner))
    found = _words(error)
    return found if inner is error else f"{found} ({_words(inner)})"


def _behind(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
