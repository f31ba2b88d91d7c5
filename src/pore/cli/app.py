"""The command line: `pore demo`, `calibrate`, `generate`, `evaluate`, `bench`, `plot` and more.

Every command calls the same functions that the library offers, for the embedded model and for any
other. A command is imported when it is run, and what is slow to import by the command that needs
it, so that `pore --help` waits for neither.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pore import __version__
from pore._text import for_terminal
from pore.cli.config_file import CONFIG
from pore.cli.verbosity import CHOSEN, Debug, Quiet, Verbose, choose
from pore.errors import PoreError

_EXIT_ERROR, _EXIT_INTERRUPTED = 1, 130

# In the order in which `pore --help` lists them, with the first sentence of their own help.
COMMANDS = {
    "demo": "Calibrate, prune, ask and compare, and write a report.",
    "calibrate": "Measure a model's position bias, fit P and save it.",
    "merge": "Fit one P to what several calibrations measured.",
    "generate": "Answer a question about images or a video.",
    "chat": "Talk about images or a video, one question a line.",
    "evaluate": "Ask questions with known answers, with and without pruning.",
    "compare": "Say which differences between two files of results are real.",
    "bench": "Measure time and memory, with and without pruning.",
    "plot": "Draw the figures of saved results.",
    "flops": "Count the FLOPs of a prefill, with and without pruning.",
    "methods": "List the pruning methods and their settings.",
    "models": "List the model families, and the methods that each takes.",
    "benchmarks": "List the benchmarks of the PoRe paper's Table 1.",
    "check": "Prove on this machine that pruning a model is exact.",
    "serve": "Serve a pruned model behind OpenAI's chat completions.",
    "ui": "Serve a page: drop a picture, ask, and see what is kept.",
}

_MARKUP: Any = "markdown"

# What typer itself makes a message of, and wrong usage of any kind; typer has no names for them.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickError: Any = typer.BadParameter.__mro__[2]


def function_of(name: str) -> Callable[..., None]:
    """The function of a command, which is in the file of the same name."""
    function: Callable[..., None] = getattr(import_module(f"pore.cli.{name}"), name)
    return function


class _Group(TyperGroup):
    """Imports a command when it is run; turns errors that users can fix into messages."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # What stands for a command until it is run: enough for `pore --help` and for completion.
        self.commands = {name: TyperCommand(name, help=line) for name, line in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the line names, imported."""
        name, found, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            one = typer.Typer(
                add_completion=False, rich_markup_mode=_MARKUP, pretty_exceptions_enable=False
            )
            one.command(name)(function_of(name))
            found = typer.main.get_command(one)
        return name, found, rest

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
            _complain("Interrupted.", "yellow", str(error))
            raise typer.Exit(_EXIT_INTERRUPTED) from error
        except (typer.Exit, typer.Abort, _ClickError, BrokenPipeError):
            raise
        except Exception as error:
            if CHOSEN.debug:
                raise
            if isinstance(error, (PoreError, OSError)):
                _complain("Error:", "red", _words(error))
            else:
                what = f"{type(error).__name__}: {error}".strip().replace("\n", " ")
                _complain("Error:", "red", f"{what}. {_UNEXPECTED}")
            raise typer.Exit(_EXIT_ERROR) from error


_UNEXPECTED = (
    "pore did not expect this error. Run the same command with --debug to see where it comes from."
)


def _words(error: Exception) -> str:
    """An error in words; one of the system without its number: "no.json: no such file ..."."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}."
    return str(error)


def _complain(what: str, style: str, message: str) -> None:
    from pore.cli.printing import complain

    complain(what, style, message)


@contextmanager
def _usage() -> Iterator[None]:
    """Escape control characters in the usage errors that typer prints itself.

    Where the value is from a file of options, they name the file.
    """
    try:
        yield
    except _UsageError as error:
        file, name = error.ctx and error.ctx.meta.get(CONFIG), getattr(error, "param", None)
        if file and name and error.ctx.get_parameter_source(name.name).name == "DEFAULT_MAP":
            error.message = f"{error.message} (from {file})"
        error.message = for_terminal(error.message)
        raise


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=_MARKUP,
    pretty_exceptions_enable=False,
    help="Prune the visual tokens of vision-language models that matter least, after dividing the "
    "position bias out of attention (PoRe, arXiv 2508.17807).",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pore {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    del version  # read by its callback
    choose(debug, verbose, quiet, first=True)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Escape characters that the terminal cannot show; the rest is printed as it is.
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    app(prog_name="pore")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line, without the line of code that gave it."""
    from pore.cli.printing import warn

    warn(" ".join(str(message).split()))


if __name__ == "__main__":
    main()
