"""A benchmark as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pore._text import cell
from pore.bench.results import SpeedResult, Spread

if TYPE_CHECKING:
    from rich.table import Table


def table(result: SpeedResult) -> Table:
    """A result as a table for the terminal.

    Args:
        result: What `measure` returned.

    Returns:
        One row for each setting; times are medians with quartiles.
    """
    from rich.table import Table

    model, work = result.model, result.workload
    title = (
        f"{model['name']}, {model['dtype']}, {model['attention']}, batch {work.batch_size}, "
        f"{work.text_before} + {work.visual} + {work.text_after} tokens, "
        f"{result.hardware.get('gpu', result.hardware['cpu'])}"
    )
    caption = f"medians (and quartiles) in ms, of {work.repeats} interleaved runs"
    shown = Table(title=cell(title), caption=caption)
    shown.add_column("setting", overflow="fold")
    shown.add_column("tokens", justify="right", no_wrap=True)
    for header in (
        "TFLOPs",
        "prefill",
        "speed-up",
        "x attainable",
        "first token",
        "decode, a token",
        "cache, MiB",
        "peak, MiB",
    ):
        shown.add_column(header, justify="right")
    unpruned = result.settings[0].timing
    for setting in result.settings:
        timing, ideal, flops = setting.timing, setting.attainable, setting.flops
        peak = timing.peak_memory
        shown.add_row(
            cell(setting.name),
            _steps(setting.tokens),
            "-" if flops is None else f"{flops.total / 1e12:.3g}",
            _cell(timing.prefill),
            _cell(unpruned.prefill.over(timing.prefill), 2),
            "-" if ideal is None else _cell(timing.prefill.over(ideal.prefill), 3),
            _cell(timing.ttft),
            "-" if timing.decode is None else _cell(timing.decode),
            f"{timing.cache / 2**20:,.1f}",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
        )
    return shown


def _cell(spread: Spread, digits: int = 1) -> str:
    return f"{spread.median:.{digits}f}\n({spread.q1:.{digits}f}-{spread.q3:.{digits}f})"


def _steps(tokens: Sequence[int]) -> str:
    """Tokens by layer, one line for every change: `611`, `163 from 2`."""
    parts = [str(tokens[0])]
    for layer in range(1, len(tokens)):
        if tokens[layer] != tokens[layer - 1]:
            parts.append(f"{tokens[layer]} from {layer}")
    return "\n".join(parts)
