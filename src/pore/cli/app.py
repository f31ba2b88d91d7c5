"""The command line: `pore demo`, `calibrate`, `generate`, `evaluate`, `bench`, `plot` and more.

Every command calls the same functions that the library offers, for the embedded model and for any
other. A module that is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pore._text import for_terminal
from pore.cli.bench import bench
from pore.cli.benchmarks import benchmarks
from pore.cli.calibrate import calibrate
from pore.cli.chat import chat
from pore.cli.check import check
from pore.cli.compare import compare
from pore.cli.demo import demo
from pore.cli.evaluate import evaluate
from pore.cli.flops import flops
from pore.cli.generate import generate
from pore.cli.merge import merge
from pore.cli.methods import methods
from pore.cli.models import models
from pore.cli.plot import plot
from pore.cli.printing import complain
from pore.cli.serve import serve
from pore.cli.ui import ui
from pore.errors import PoreError

_EXIT_ERROR, _EXIT_INTERRUPTED = 1, 130


# Wrong usage of any kind; typer has no name for it.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _Group(TyperGroup):
    """Turns errors that users can fix into messages and exit codes."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the arguments before the command."""
        with _usage():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exit with 1 on an error, with 130 when interrupted."""
        try:
            with _usage():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            complain("Interrupted.", "yellow", error)
            raise typer.Exit(_EXIT_INTERRUPTED) from error
        except (PoreError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            complain("Error:", "red", error)
            raise typer.Exit(_EXIT_ERROR) from error


@contextmanager
def _usage() -> Iterator[None]:
    """Escape control characters in the usage errors that typer prints itself."""
    try:
        yield
    except _UsageError as error:
        error.message = for_terminal(error.message)
        raise


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Prune the visual tokens of vision-language models that matter least, after dividing the "
    "position bias out of attention (PoRe, arXiv 2508.17807).",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pore {version('pore-vlm')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    # Both are read before any command: `debug` by `_Group`, `version` by its callback.
    del debug, version


# In the order in which `pore --help` lists them.
for _command in (
    demo,
    calibrate,
    merge,
    generate,
    chat,
    evaluate,
    compare,
    bench,
    plot,
    flops,
    methods,
    models,
    benchmarks,
    check,
    serve,
    ui,
):
    app.command()(_command)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Escape characters that the terminal cannot show; the rest is printed as it is.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="pore")


if __name__ == "__main__":
    main()
