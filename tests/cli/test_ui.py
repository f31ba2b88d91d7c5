"""`pore ui`: what its page offers, and what it needs."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.command_line import run
from helpers.serving import call, running
from pore.cli.ui import EXAMPLES, Options, _app
from pore.evaluation.reweighting import ROPE, UNCALIBRATED


def test_without_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "pore.serving.running", raising=False)
    found = run("ui", "-m", model, code=1)
    assert "'pore-vlm[ui]'" in " ".join(found.output.split())


def test_without_matplotlib(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = run("ui", "-m", model, code=1)
    assert "pip install 'pore-vlm[plot]'" in " ".join(found.output.split())


@pytest.mark.skipif(
    None in (find_spec("starlette"), find_spec("uvicorn")),
    reason="needs the extra ui: .ci/serve runs this",
)
def test_any_checkpoint(model: Path, profile: Path) -> None:
    """Its page offers P where it was given one, and says nothing of how it answers examples."""
    from pore.serving.running import Server

    others = ["none", ROPE, *UNCALIBRATED]
    for given, offered in (
        (None, others),
        (str(profile), ["P", *others]),
        (ROPE, [ROPE, "none", *UNCALIBRATED]),
    ):
        app = _app(Options(str(model), reweight=given))
        with running(Server(app)) as address:
            page = call(address, "/").text
        choices = page[page.index('id="correction"') :].split("</select>")[0]
        assert re.findall("<option.*?>(.*)</option>", choices) == offered
        assert str(model) in page
        assert page.count("data-question=") == len(EXAMPLES)
        assert "FastV errs" not in page
