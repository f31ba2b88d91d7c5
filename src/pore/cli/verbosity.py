"""How much commands say: `--debug`, `-v` and `-q`, which stand anywhere on the line."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from typing import Annotated

import typer

from pore import _progress
from pore._compat.logs import LEVEL, level, log_at

PANEL = "Every command"

_CHOSEN_BY_USER = LEVEL in os.environ

Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the full traceback of an error.", rich_help_panel=PANEL),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Also show what transformers and pore log, warnings included.",
        rich_help_panel=PANEL,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Show answers and errors only.", rich_help_panel=PANEL),
]


@dataclass
class Verbosity:
    """How much this process says.

    Attributes:
        debug: Whether an error shows its traceback.
        verbose: Whether logs are shown.
        quiet: Whether only answers and errors are.
        options: The options of the command, by the names that Python has for them.
        given: Those of them that stand on the line, or in a file with another value than the
            default.
    """

    debug: bool = False
    verbose: bool = False
    quiet: bool = False
    options: dict[str, str] = field(default_factory=dict)
    given: frozenset[str] = frozenset()


CHOSEN = Verbosity()
"""What the command line that is being run asks for."""


def choose(debug: bool, verbose: bool, quiet: bool, *, first: bool = False) -> None:
    """Note what stands on the line, before the command or after it, and set up the logs.

    Args:
        debug: Whether `--debug` stands there.
        verbose: Whether `-v` does.
        quiet: Whether `-q` does.
        first: Whether this is the start of a line, before which nothing was asked for.

    Raises:
        BadParameter: Both `-v` and `-q` stand on the line.
    """
    CHOSEN.debug = debug or (CHOSEN.debug and not first)
    CHOSEN.verbose = verbose or (CHOSEN.verbose and not first)
    CHOSEN.quiet = quiet or (CHOSEN.quiet and not first)
    if CHOSEN.verbose and CHOSEN.quiet:
        raise typer.BadParameter("-v asks for more and -q for less; give one of them.")
    _progress.hidden = CHOSEN.quiet
    if CHOSEN.verbose or not _CHOSEN_BY_USER:
        # transformers reads this when it is imported, here or in a process started from here.
        os.environ[LEVEL] = level(CHOSEN.verbose)
        if "transformers" in sys.modules:
            log_at(CHOSEN.verbose)
    if CHOSEN.verbose:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("pore").setLevel(logging.INFO)
