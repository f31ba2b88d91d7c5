"""How much transformers logs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers.utils import logging

from pore._compat.logs import LEVEL, level, log_at


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.at_once(1)
def test_it_logs_as_much_as_is_asked(verbose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before, meant = logging.get_verbosity(), {True: logging.INFO, False: logging.ERROR}[verbose]
    try:
        log_at(verbose)
        assert logging.get_verbosity() == meant
    finally:
        logging.set_verbosity(before)
    monkeypatch.setenv(LEVEL, level(verbose))
    code = "from transformers.utils import logging; print(logging.get_verbosity())"
    told = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True)
    assert int(told.stdout) == meant
