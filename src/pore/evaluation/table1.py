"""Table 1 of the PoRe paper (arXiv 2508.17807): its rows, and pages with its numbers and ours.

LLaVA-1.5-7B, FastV at K = 2 and PoRe on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pore._files import write_atomic
from pore._page import filled, html, row
from pore._text import Html
from pore.evaluation.cells import Sweep
from pore.evaluation.sweep_files import name_of

MODEL = "llava-hf/llava-1.5-7b-hf"


"""The model of the table."""


TASKS: Mapping[str, str] = {
    "VQAv2": "llava_vqav2_val",
    "GQA": "llava_gqa",
    "VizWiz": "llava_vizwiz_val",
    "SQA-IMG": "llava_sqa_img",
    "TextVQA": "llava_textvqa",
    "POPE": "llava_pope",
    "MME": "llava_mme",
    "MMB": "llava_mmbench",
    "MM-Vet": "llava_mmvet",
}


"""The columns of the table, each with its task under LLaVA's protocol."""


METHODS = ("fastv", "pore")


KEEPS = (0.5, 0.25, 128 / 576, 0.1)


"""The shares of the visual tokens that the rows keep."""


PAPER: Mapping[tuple[int, str], tuple[float, ...]] = {
    (576, "unpruned"): (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 31.1),
    (288, "FastV"): (77.7, 60.0, 50.5, 69.0, 58.3, 82.4, 1514.2, 64.4, 28.5),
    (288, "FastV + PoRe"): (78.0, 61.0, 50.7, 69.0, 58.5, 83.8, 1513.9, 64.3, 29.7),
    (144, "FastV"): (74.0, 56.5, 51.2, 68.8, 57.3, 73.7, 1458.1, 64.0, 28.3),
    (144, "FastV + PoRe"): (76.2, 58.5, 51.8, 69.1, 57.8, 79.1, 1461.9, 63.9, 29.2),
    (128, "FastV"): (73.2, 55.8, 51.4, 69.1, 56.9, 72.0, 1442.3, 63.6, 25.2),
    (128, "FastV + PoRe"): (75.7, 57.9, 51.4, 69.4, 57.6, 77.6, 1498.4, 63.7, 26.3),
    (58, "FastV"): (65.2, 51.1, 51.9, 69.8, 54.6, 56.8, 1227.3, 59.9, 23.8),
    (58, "FastV + PoRe"): (70.1, 53.9, 51.7, 70.3, 55.1, 67.5, 1393.7, 60.5, 23.7),
}
"""The paper's numbers by tokens kept of 576 and method, in the order of `TASKS`."""


NOTES = (
    "VQAv2 and VizWiz: the paper has the test split, which only a server scores (EvalAI); ours are "
    "of the validation split.",
    "MM-Vet: GPT-4 gives every answer its score, a paid judge; its task writes the answers and is "
    "not part of the sweep.",
    "POPE: F1, the mean over its three splits. MME: perception. MMB: the English part of MMBench, "
    "the letter read from the answer.",
)
"""What to know of columns."""


_NOT_SCORED_HERE = ("MM-Vet",)


def scored_here() -> dict[str, str]:
    """The columns that this machine can score, each with its task."""
    return {name: task for name, task in TASKS.items() if name not in _NOT_SCORED_HERE}


def measured(sweep: Sweep | None) -> dict[tuple[int, str, str], str]:
    """Our numbers by tokens kept, method and column, with one decimal; those there are."""
    found = {}
    for one in () if sweep is None else sweep.rows:
        kept = 576 if one.keep is None else one.keep
        for column, task in TASKS.items():
            if task in one.cells and isinstance(kept, int):
                found[kept, name_of(one), column] = f"{one.cells[task].value:.1f}"
    return found


def commands() -> list[str]:
    """The command of every cell; each also asks the unpruned model."""
    names = {"FastV": "fastv", "FastV + PoRe": "pore"}
    return [
        f"pore evaluate -m {MODEL} --tasks {task} --methods {names[method]} --keep {kept}"
        f"{' --reweight llava.json' if method != 'FastV' else ''} --out runs/table1"
        for task in scored_here().values()
        for kept, method in PAPER
        if method in names
    ]


def markdown(sweep: Sweep | None = None) -> str:
    """The table as Markdown: the paper's numbers, and ours in brackets after them.

    Args:
        sweep: What was measured; None for nothing.

    Returns:
        The table and the command of every cell.
    """
    ours = measured(sweep)
    head = ["kept", "method", *TASKS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (kept, method), values in PAPER.items():
        cells = [
            f"{paper:.1f} ({ours.get((kept, method, column), '–')})"
            for column, paper in zip(TASKS, values, strict=True)
        ]
        lines.append(f"| {kept} | {method} | {' | '.join(cells)} |")
    listed = "\n".join(f"* {note}" for note in NOTES)
    return "\n".join([*lines, "", listed, "", "```", *commands(), "```", ""])


def write_page(sweep: Sweep, out: Path) -> Path:
    """Write `table1.html`: the paper's numbers, and below each ours.

    Args:
        sweep: What was measured.
        out: The folder.

    Returns:
        The path.

    Raises:
        OSError: It cannot be written.
    """
    ours = measured(sweep)
    head = ("kept", "method", *TASKS)
    lines = [f"<thead>{row(head, 'th')}</thead><tbody>"]
    for (kept, method), values in PAPER.items():
        cells = (
            html("{}<br><b>{}</b>", f"{paper:.1f}", ours.get((kept, method, column), "–"))
            for column, paper in zip(TASKS, values, strict=True)
        )
        lines.append(row((str(kept), method, *cells), own=method == "FastV + PoRe"))
    made = sweep.circumstances
    page = filled(
        "table1.html",
        "Table 1 of the PoRe paper",
        command=str(made.get("command", "")),
        setup={name: str(value) for name, value in made.items() if name != "command"},
        table=Html("<table class='results'>" + "\n".join(lines) + "</tbody></table>"),
        notes=" ".join(NOTES),
        commands="\n".join(commands()),
    )
    return write_atomic(out / "table1.html", page)
