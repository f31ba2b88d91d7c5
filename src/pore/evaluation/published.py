"""Published tables of methods on benchmarks: what to run for them, and pages with both numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pore._files import write_atomic
from pore._numbers import interval
from pore._page import filled, html, items, table
from pore._page.tables import Row
from pore.evaluation.cells import Sweep
from pore.evaluation.store import slug
from pore.evaluation.sweep_rows import name_of, relative
from pore.plotting.labels import UNPRUNED
from pore.tensors.selection import budget

AVERAGE = "Avg"
"""A column that is the mean, over the others, of the score in percent of the unpruned model's."""


@dataclass(frozen=True)
class PublishedTable:
    """A table that was published, as something that can be run.

    Attributes:
        name: What `--table` calls it.
        title: What pages call it.
        about: What it shows, and where it is from.
        model: The model that it is about.
        visual_tokens: Visual tokens of an image, where all images have as many; None otherwise.
        keeps: The shares of them that the rows keep.
        columns: The columns, each with its task; None where nothing is scored here.
        methods: The methods of the rows, each with its name after `--methods`; None for one that
            pore does not have.
        values: The published numbers of the unpruned model and, by share and method, of the others,
            in the order of the columns.
        notes: What to know of columns and rows.
        profile: The file of P that `pore calibrate` makes for it; None where no row needs one.
        judged: Columns that somebody else scores, each with the task that writes the answers.
    """

    name: str
    title: str
    about: str
    model: str
    visual_tokens: int | None
    keeps: tuple[float, ...]
    columns: Mapping[str, str | None]
    methods: Mapping[str, str | None]
    values: Mapping[tuple[float, str], tuple[float, ...]]
    notes: tuple[str, ...]
    profile: str | None = None
    judged: Mapping[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, str]:
        """The columns that this machine can score, each with its task."""
        return {name: task for name, task in self.columns.items() if task is not None}

    @property
    def wanted(self) -> list[str]:
        """The methods that pore has, by their names after `--methods`."""
        return [name for name in self.methods.values() if name is not None]

    def kept(self, share: float) -> int | float:
        """What a sweep calls the budget of a row: a number of tokens, or the share."""
        tokens = self.visual_tokens
        return share if tokens is None else budget(1.0 if share == 1 else share, tokens)

    def shown(self, share: float) -> str:
        """The budget of a row in words."""
        kept = self.kept(share)
        return f"{100 * kept:g}%" if isinstance(kept, float) else str(kept)

    def measured(self, sweep: Sweep | None) -> dict[tuple[float, str, str], str]:
        """Our numbers by share, method and column, with their intervals; those there are."""
        shares = {self.kept(share): share for share in self.keeps}
        found = {}
        for one in () if sweep is None else sweep.rows:
            share = 1.0 if one.method == UNPRUNED else shares.get(one.keep)  # type: ignore[arg-type]
            if share is None:
                continue
            for column, task in self.tasks.items():
                cell = one.cells.get(task)
                if cell is not None:
                    shown = f"{cell.value:.1f} {interval(cell.ci, 1)}"
                    found[share, name_of(one), column] = shown.strip()
            if AVERAGE in self.columns and one.relative is not None:
                shown = " ".join(relative(one))
                found[share, name_of(one), AVERAGE] = shown.strip()
        return found

    def commands(self) -> list[str]:
        """The command of every cell; those of `pore evaluate` also ask the unpruned model."""
        ours = [(share, m) for share, m in self.values if self.methods.get(m) is not None]
        scored = [
            f"pore evaluate -m {self.model} --tasks {task} --methods {self.methods[method]} "
            f"--keep {self.shown(share)}{self._p_for(method)} --out runs/{self.name}"
            for task in self.tasks.values()
            for share, method in ours
        ]
        whole = [(1.0, UNPRUNED)] if (1.0, UNPRUNED) in self.values else []
        return scored + [
            self._answers(task, share, method)
            for task in self.judged.values()
            for share, method in [*whole, *ours]
        ]

    def _p_for(self, method: str) -> str:
        return f" --reweight {self.profile}" if self.profile and method.endswith("PoRe") else ""

    def _answers(self, task: str, share: float, method: str) -> str:
        """The command that writes the answers of a cell, which somebody else scores."""
        given = f"pretrained={self.model}"
        if method != UNPRUNED:
            given += f",method={method.split(' ')[0].lower()},keep={self.shown(share)}"
        given += f",reweight={self.profile}" if self._p_for(method) else ""
        folder = f"runs/{self.name}/{task}/{slug(method)}-{self.shown(share)}"
        return (
            f"lmms-eval eval --model pore --model_args {given} --include_path $TASKS "
            f"--tasks {task} --output_path {folder}"
        )

    def markdown(self, sweep: Sweep | None = None) -> str:
        """The table as Markdown: the published numbers, and ours in brackets after them.

        Args:
            sweep: What was measured; None for nothing.

        Returns:
            The table and the command of every cell.
        """
        ours = self.measured(sweep)
        head = ["kept", "method", *self.columns]
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for (share, method), values in self.values.items():
            cells = [
                f"{number(published)} ({ours.get((share, method, column), '–')})"
                for column, published in zip(self.columns, values, strict=True)
            ]
            lines.append(f"| {self.shown(share)} | {method} | {' | '.join(cells)} |")
        listed = "\n".join(f"* {note}" for note in self.notes)
        said = "The command of every cell; that of `pore evaluate` also asks the unpruned model."
        if self.judged:
            said += (
                f" Those of {' and '.join(self.judged)} write the answers; `$TASKS` is the folder "
                "that `pore benchmarks` names."
            )
        return "\n".join([*lines, "", listed, "", said, "", "```", *self.commands(), "```", ""])

    def write_page(self, sweep: Sweep, out: Path) -> Path:
        """Write a page named after the table: the published numbers, and below each ours.

        Args:
            sweep: What was measured.
            out: The folder.

        Returns:
            The path.

        Raises:
            OSError: It cannot be written.
        """
        ours = self.measured(sweep)
        rows = []
        for (share, method), values in self.values.items():
            cells = (
                html("{}<br><b>{}</b>", number(published), ours.get((share, method, column), "–"))
                for column, published in zip(self.columns, values, strict=True)
            )
            rows.append(Row((self.shown(share), method, *cells), method.endswith("PoRe")))
        made = sweep.circumstances
        page = filled(
            "published.html",
            self.title,
            command=str(made.get("command", "")),
            setup={name: str(value) for name, value in made.items() if name != "command"},
            heading=self.title,
            about=self.about,
            name=self.name,
            table=table(self.title, ("kept", "method", *self.columns), [("", rows)]),
            notes=html("<ul>{}</ul>", items(self.notes)),
            commands="\n".join(self.commands()),
        )
        return write_atomic(out / f"{self.name}.html", page)


def number(value: float) -> str:
    """A published number with the digits that it was published with, and one decimal at least."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"
