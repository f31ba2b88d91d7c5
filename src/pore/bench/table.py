"""A benchmark as a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pore._numbers import number, spread
from pore._screen import cell
from pore.bench.results import SpeedResult, Spread

if TYPE_CHECKING:
    from rich.table import Table


def table(result: SpeedResult, parts: Collection[str] = ("time", "cost")) -> Table:
    """A result as a table for the terminal.

    Args:
        result: What `measure` returned.
        parts: "time" for the times, "cost" for tokens, FLOPs and memory; a terminal of 80 columns
            has room for one of them.

    Returns:
        One row for each setting; a time is the median ± half the distance between the quartiles.
    """
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("setting", overflow="fold")
    headings = ["prefill", "speed-up", "attainable", "first token", "a token"] * ("time" in parts)
    headings += ["tokens", "GFLOPs", "cache, MiB", "peak, MiB"] * ("cost" in parts)
    for header in headings:
        shown.add_column(header, justify="right", no_wrap=True)
    unpruned = result.settings[0].timing
    for setting in result.settings:
        timing, ideal, flops = setting.timing, setting.attainable, setting.flops
        times = [
            _cell(timing.prefill),
            _cell(unpruned.prefill.over(timing.prefill)),
            "-" if ideal is None else _cell(timing.prefill.over(ideal.prefill)),
            _cell(timing.ttft),
            "-" if timing.decode is None else _cell(timing.decode),
        ]
        costs = [
            _steps(setting.tokens),
            "-" if flops is None else number(flops.total, 1e9),
            number(timing.cache, 2**20),
            "-" if timing.peak_memory is None else number(timing.peak_memory, 2**20),
        ]
        cells = times * ("time" in parts) + costs * ("cost" in parts)
        shown.add_row(cell(setting.name), *cells)
    return shown


def about(result: SpeedResult) -> tuple[str, str]:
    """What was measured, and what the columns of the times mean, in a line each."""
    model, work = result.model, result.workload
    return (
        f"{model['name']}, {model['dtype']}, {model['attention']}, batch {work.batch_size}, "
        f"{work.text_before} + {work.visual} + {work.text_after} tokens, "
        f"{result.hardware.get('gpu', result.hardware['cpu'])}",
        f"times: medians in ms of {work.repeats} runs that take turns, ± half the distance between "
        "the quartiles; attainable: the prefill over that of layers without pruning code",
    )


def _cell(found: Spread) -> str:
    return spread(found.median, found.q1, found.q3)


def _steps(tokens: Sequence[int]) -> str:
    """Tokens by layer, one line for every change: `611`, `163 from 2`."""
    parts = [str(tokens[0])]
    for layer in range(1, len(tokens)):
        if tokens[layer] != tokens[layer - 1]:
            parts.append(f"{tokens[layer]} from {layer}")
    return "\n".join(parts)
