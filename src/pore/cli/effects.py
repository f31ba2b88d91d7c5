"""Options of `pore evaluate` that have no effect in a job are refused when they are given."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from pore.cli.checks import naming
from pore.errors import InputError

if TYPE_CHECKING:
    from pore.cli.evaluate_options import Options

# What questions of one's own are, and how they are asked and scored.
_OWN = ("samples", "questions", "split", "columns", "metric", "max_new_tokens", "max_bad")

_SEVERAL = "they are for --all, --corrections, --tasks and --methods"
_SWEEP = "in a sweep --methods names the methods, and no time is measured"
_TASKS_ALONE = "only 'samples' among --tasks is asked so, and lmms-eval's tasks set it themselves"


def check_lists(options: Options) -> None:
    """Refuse a list that is given and names nothing.

    Args:
        options: The options of a job over several methods.

    Raises:
        InputError: There is one.
    """
    from pore.evaluation.wanted import texts

    lists = {"--tasks": options.tasks, "--methods": options.methods, "--keep": options.keep}
    for flag, given in lists.items():
        if given and not texts(given):
            raise InputError(f"{flag} {given[0]!r} names nothing; give a name, or leave it out.")


def check_effects(
    options: Options,
    given: Collection[str],
    names: Collection[str] | None,
    wanted: Collection[str],
    own: bool,
) -> None:
    """Refuse options that are given and have no effect.

    Args:
        options: The options.
        given: Those that are given, by the names that Python has for them.
        names: The benchmarks of a sweep; None for another job.
        wanted: The methods of a sweep.
        own: Whether questions of one's own are asked.

    Raises:
        InputError: There are some.
    """
    for without, why in _without_effect(options, names, wanted, own):
        stray = [name for name in without if name in given]
        if stray:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in stray)
            it = "them" if stray[1:] else "it"
            raise InputError(f"{flags}: without effect here, as {why}; leave {it} out.")


def _without_effect(
    options: Options, names: Collection[str] | None, wanted: Collection[str], own: bool
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Options that have no effect, and why."""
    if not options.reweight:
        yield ("allow",), "it is for P of a file, which --reweight names"
    if names is None:
        yield ("include_path",), "it is for --tasks"
        several = options.every or options.corrections
        if several:
            yield ("method",), "all methods are asked; --methods names some"
        else:
            yield ("calibration", "images"), _SEVERAL
        return
    from pore.evaluation.sweeping import SAMPLES
    from pore.evaluation.wanted import PORE, read_wanted
    from pore.methods.registry import method_named

    with naming("--methods"):
        methods = read_wanted(wanted)
    corrections = {one.correction for one in methods}
    measured = (PORE in corrections and not options.reweight) or "rope" in corrections
    guided = any(method_named(one.method).guided for one in methods)
    yield ("method", *(("timing",) if options.timing else ())), _SWEEP
    if not set(names) - {SAMPLES}:
        yield ("include_path",), "it is for tasks of lmms-eval among --tasks"
    if PORE not in corrections:
        yield ("reweight", "allow"), "no method among --methods has +pore"
    if not measured:
        yield ("calibration", "images"), "no method among --methods has a P to be measured"
    if not guided:
        yield ("guide",), "no method among --methods is guided by a model (SGL is)"
    if not own:
        # A guide answers too, and P is measured on samples that may be bad.
        used = {"max_new_tokens": guided, "max_bad": measured}
        yield tuple(name for name in _OWN if not used.get(name)), _TASKS_ALONE
