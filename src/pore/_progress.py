"""The progress bar of a long job, shown in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

hidden = False
"""Whether no bar is shown in this process, as with `pore -q`."""


@contextmanager
def progress(
    total: float | None = 1.0, unit: str = "", *, show: bool = True
) -> Iterator[Callable[[str, float], None]]:
    """One bar on stderr for a whole job, gone when the job ends.

    Args:
        total: How much there is to do; None if that is not known.
        unit: What is counted, such as "samples", shown with its rate; "" shows the share.
        show: Whether to show the bar if stderr is a terminal.

    Yields:
        A function to call with what is being done and how much of the total is done.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    from pore._screen import Screen
    from pore._text import visible

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f} {unit}/s")

    console = Screen(stderr=True, soft_wrap=True)
    with Progress(
        BarColumn(),
        *((MofNCompleteColumn(), Rate()) if unit else (TaskProgressColumn(),)),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=not (show and console.is_terminal) or hidden,
    ) as bar:
        task = bar.add_task("", total=total)

        def tell(what: str, done: float) -> None:
            bar.update(task, description=visible(what), completed=done)

        yield tell
