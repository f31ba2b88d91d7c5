"""The command line in this process, through typer's runner."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from pore.cli.app import app


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command, which must end with an exit code.

    Args:
        *arguments: The command and its arguments.
        code: The exit code.

    Returns:
        What it printed.
    """
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result
