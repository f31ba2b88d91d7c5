"""The command line in this process, through typer's runner."""

from __future__ import annotations

import sys
from unittest.mock import patch

from click.testing import Result
from typer.testing import CliRunner

from pore.cli.app import app


def run(*arguments: object, code: int = 0, stdin: str | None = None) -> Result:
    """Run a command, which must end with an exit code.

    Args:
        *arguments: The command and its arguments.
        code: The exit code.
        stdin: What it reads.

    Returns:
        What it printed.
    """
    given = [str(argument) for argument in arguments]
    with patch.object(sys, "argv", ["pore", *given]):  # files of results say how they were made
        result = CliRunner().invoke(app, given, input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result
