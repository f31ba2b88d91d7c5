"""The tutorials do what they say: their code runs as it stands, and prints what they show."""

from __future__ import annotations

import re
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import pore
from helpers.command_line import run
from pore.cli.app import app
from pore.data.loading import load_model
from pore.methods.registry import methods

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
ADDRESS = "http://127.0.0.1:8000"


def commands(page: Path) -> list[list[str]]:
    """The commands of pore on a page, with their arguments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["pore"]]


@pytest.fixture(autouse=True)
def at_a_desk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of its own, with the methods that tutorials define forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    methods()  # so that all are in what is put back
    monkeypatch.setattr(pore.Pruner, "registry", dict(pore.Pruner.registry))


def serving() -> Any:
    """The server of the tutorial, where what it needs is there."""
    for needed in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(needed, reason="needs the extra serve: .ci/serve runs this")
    from helpers.serving import running
    from pore.serving.app import App
    from pore.serving.running import Server
    from pore.serving.served import Served

    model, processor = load_model("embedded")
    served = Served("embedded", model, processor, lambda keep: pore.FastV(keep=keep), 0.25)
    return running(Server(App(served)))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
@pytest.mark.at_once(2)
def test_code_prints_what_it_says(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("tutorial")
    monkeypatch.setitem(sys.modules, "tutorial", module)  # where dataclasses look their types up
    text = page.read_text("utf-8")
    blocks = re.findall(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL
    )
    assert blocks
    with serving() if ADDRESS in "".join(code for code, _ in blocks) else nullcontext() as address:
        for code, shown in blocks:
            code = code.replace(ADDRESS, address or ADDRESS)
            exec(compile(code, page.name, "exec"), module.__dict__)
            printed = capsys.readouterr().out
            assert not shown or printed == shown


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_commands_have_the_options_that_are_given(page: Path) -> None:
    known: Any = typer.main.get_command(app)
    outside = known.make_context("pore", ["methods"])
    for name, *arguments in commands(page):
        _, found, rest = known.resolve_command(outside, [name, *arguments])
        found.make_context(name, rest)


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    samples = pore.load_samples("embedded:test", limit=14)
    lines = []
    for number, sample in enumerate(samples):
        sample.load_image().save(f"{number}.png")
        texts = f'"question": "{sample.question}", "answer": "{sample.answer}"'
        lines.append(f'{{"image": "{number}.png", {texts}}}')
    Path("questions.jsonl").write_text("\n".join(lines))
    samples[0].load_image().save("letters.png")
    for name, *arguments in commands(page):
        if name not in ("serve", "ui"):
            run(name, *arguments)
