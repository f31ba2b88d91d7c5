"""The rows of a sweep in words."""

from __future__ import annotations

from collections.abc import Iterator

from pore._numbers import fixed, interval, number, percent, tokens
from pore.evaluation.cells import Cell, Row, Sweep
from pore.plotting.labels import UNPRUNED, budget_label


def name_of(one: Row) -> str:
    """A row's method in words, such as "FastV + PoRe"."""
    return words(one.method, one.reweight)


def words(method: str, reweight: str | None) -> str:
    """A method with what `--methods` calls its correction, in words, such as "FastV + PoRe"."""
    if reweight is None:
        return method
    shown = {"pore": "PoRe", "rope": "RoPE prior"}.get(reweight, reweight)
    return f"{method} + {shown}"


def blocks(sweep: Sweep) -> Iterator[tuple[str, list[Row]]]:
    """The rows by budget, with the name of the budget."""
    found: dict[str, list[Row]] = {}
    for one in sweep.rows:
        unpruned = one.method == UNPRUNED
        name = "all visual tokens" if unpruned else budget_label(one.keep)
        found.setdefault(name, []).append(one)
    yield from found.items()


def value(cell: Cell | None) -> str:
    """What a benchmark measures, with one decimal; "-" where a cell is not done."""
    return "-" if cell is None else fixed(cell.value)


def relative(one: Row) -> tuple[str, str]:
    """The mean relative to the unpruned model in percent, and its interval."""
    if one.relative is None:
        return "-", ""
    return percent(one.relative), interval(one.relative_ci)


def parts_of(sweep: Sweep) -> list[str]:
    """What benchmarks ask for, where they differ in that."""
    return list(dict.fromkeys(part for one in sweep.rows for part in one.relative_by or {}))


def costs(one: Row) -> tuple[str, str]:
    """Visual tokens that reach the last layer, and GFLOPs."""
    return "-" if one.tokens is None else tokens(one.tokens), number(one.flops, 1e9)
