"""The progress of a pass, shown in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def bar_of(progress: bool, total: int | None, seen: int) -> Progress:
    """A bar with rate and time left, to be entered.

    Args:
        progress: Whether to show it, where stderr is a terminal.
        total: Samples in all, where known.
        seen: Samples gone through before.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    from pore._text import Screen

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f} samples/s")

    console = Screen(stderr=True)
    bar = Progress(
        TextColumn("Calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[bad]} bad", markup=False),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    bar.add_task("", total=total, completed=seen, bad=0)
    return bar
