"""Commands given text that somebody may have written: in questions, kinds, ids and names."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import Result
from typer.testing import CliRunner

import pore
from helpers.checkpoint import save_checkpoint
from helpers.nasty import NASTY, obeyed
from pore import plotting
from pore._text import visible
from pore.cli.app import app
from pore.errors import InputError
from pore.methods.registry import methods

NAME = "[red]$x$=1 &<b>\x1b[31m\u202e"
"""The name of a folder, which is the model's in tables and pages."""


def run(*arguments: object, code: int = 0) -> Result:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exit_code == code, (found.output, found.exception)
    assert not obeyed(found.stdout), found.stdout
    assert not obeyed(found.stderr), found.stderr
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / NAME


@pytest.fixture(scope="module")
def model(home: Path) -> Path:
    return save_checkpoint(home / f"model {NAME}")


@pytest.fixture(scope="module")
def samples(home: Path) -> Path:
    """A question for every text, which is its id, answer and kind as well."""
    home.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for i, text in enumerate(NASTY):
        if not any(0xD800 <= ord(c) < 0xE000 for c in text):  # which no tokenizer takes
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(home / f"{i}.png")
            entry = dict.fromkeys(("question", "answer", "id", "kind"), text[:60])
            lines.append(entry | {"image": f"{i}.png", "third": NAME})
    path = home / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.slow
def test_generate(model: Path, home: Path, samples: Path) -> None:
    for i, text in enumerate(NASTY[:12]):
        if not samples.with_name(f"{i}.png").exists():
            continue
        out = home / f"kept {i}.png"
        found = run(
            *("generate", home / f"{i}.png", text, "-m", model, "--draw", out),
            *("--max-new-tokens", 1),
        )
        assert f"Wrote {visible(str(out))}." in found.stdout
        assert out.exists()


@pytest.mark.parametrize("name", [b"\xff[red]", "\ud83d".encode("utf-8", "surrogatepass")])
def test_file_names_that_are_no_text(
    model: Path, samples: Path, tmp_path: Path, name: bytes
) -> None:
    try:
        folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    image = samples.parent / "0.png"
    found = run(
        *("generate", image, "w6", "-m", model, "--draw", folder / "a.png"),
        *("--max-new-tokens", 1),
    )
    assert visible(str(folder)) in found.stdout
    assert visible(str(folder / "no.png")) in run("plot", folder / "no.png", code=1).stderr


def test_evaluate(model: Path, samples: Path, home: Path) -> None:
    out = home / "evaluated"
    found = run(
        *("evaluate", "-m", model, "-s", samples, "-o", out, "--method", "SGL", "--keep", 4),
        *("--guide", save_checkpoint(home / f"=guide {NAME}"), "--no-timing"),
        *("--max-new-tokens", 1),
    )
    assert f"Wrote {visible(str(out / 'results.json'))}" in found.stdout
    assert visible(f"§ Guided by =guide {NAME}") in found.stdout
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len({len(row) for row in rows}) == 1
    assert visible(f"'=guide {NAME}") in rows[2]
    drawn = run("plot", out / "results.json", "-o", home / "drawn")
    assert visible(str(home / "drawn" / "accuracy.png")) in drawn.stdout


@pytest.mark.slow
def test_evaluate_all(
    model: Path, samples: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pore.Pruner, "registry", {name: methods()[name] for name in ("FastV", "SGL", "Scored")}
    )
    out = home / "all"
    run(
        *("evaluate", "--all", "-m", model, "-s", samples, "--calibration", samples, "-o", out),
        *("--keep", 4, "--no-timing", "--max-new-tokens", 1, "--limit", 6, "--images", 6),
    )
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_demo(model: Path, samples: Path, home: Path) -> None:
    out = home / "demo"
    found = run(
        *("demo", "-m", model, "--calibration", samples, "--test", samples, "-o", out),
        *("--keep", "25%", "--questions", 4),
    )
    assert f"Wrote {visible(str(out / 'report.html'))}" in found.stdout
    assert len(list((out / "examples").iterdir())) == 4  # a kind each


@pytest.mark.slow
def test_calibrate_and_bench(model: Path, samples: Path, home: Path) -> None:
    out, figures = home / "p.json", home / "figures"
    found = run("calibrate", "-m", model, "-s", samples, "-o", out, "--figures", figures)
    assert visible(str(out)) in found.stdout
    assert visible(str(figures / "figure1.png")) in found.stdout
    found = run(
        *("bench", "-m", model, "--keep", 4, "--repeats", 1, "--warmup", 0, "--new-tokens", 2),
        *("--text-before", 3, "--text-after", 2, "-o", home / "bench.json"),
    )
    assert visible(str(home / "bench.json")) in found.stdout
    assert run("flops", "-m", model, "--keep", 4).stdout


def test_methods_and_models(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "[red]\x07"
    kind: Any = type("Foreign", (pore.FastV,), {"__doc__": f"{name}.", "paper": name})
    monkeypatch.setitem(pore.Pruner.registry, name, kind)
    assert run("methods").stdout.count("[red]\\x07") == 2
    assert run("models").stdout


@pytest.mark.parametrize("text", NASTY[6:-2], ids=repr)
def test_errors_show_text_as_it_is(text: str, home: Path) -> None:
    for given in (
        ("evaluate", "-m", f"./no model {text}"),
        ("evaluate", "--method", text, "-m", "embedded", "--limit", 1),
        ("calibrate", "--kind", text),
        ("flops", "--shape", text),
        ("calibrate", "-s", f"./{text}", "-m", f"./{text}"),
        ("plot", f"./no {text}"),
    ):
        if given[0] == "plot" and "\x00" in text:
            continue  # which is no name at all
        found = CliRunner().invoke(app, [str(argument) for argument in given])
        assert found.exit_code == 1 or "\ud83d" in text  # which typer refuses itself
        assert not obeyed(found.output), found.output
        assert "Error" in found.stderr
    for wrong in (("flops", "--keep", f"x{text}"), ("flops", f"--{text}"), (f"x{text}",)):
        found = CliRunner().invoke(app, [str(argument) for argument in wrong])
        assert found.exit_code == 2, found.output
        assert not obeyed(found.output), found.output


@pytest.mark.slow
def test_letters_that_a_terminal_lacks_are_spelled_out() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    found = subprocess.run(
        [sys.executable, "-m", "pore.cli.app", "flops", "--keep", "25%"],
        env=environment,
        capture_output=True,
        check=True,
    )
    assert b"54.6" in found.stdout or b"32.8" in found.stdout
    found.stdout.decode("ascii")


# -- what is printed when -------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_picture_that_fails_leaves_the_answer(
    model: Path, samples: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise InputError("no picture of this")

    common = ("generate", samples.parent / "0.png", "w6", "-m", model, "--max-new-tokens", 2)
    plain = run(*common, *form)
    monkeypatch.setattr(plotting, "layouts", fails)
    found = run(*common, *form, "--draw", samples.parent / "lost.png", code=1)
    assert found.stdout == plain.stdout
    assert found.stderr.strip().endswith("(--draw) was not written: no picture of this")
    assert not (samples.parent / "lost.png").exists()


def test_a_table_that_fails_leaves_the_results(
    model: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise InputError("no table of this")

    monkeypatch.setattr("pore.evaluation.tables.table", fails)
    run(
        *("evaluate", "-m", model, "-s", samples, "-o", tmp_path, "--keep", 4, "--no-timing"),
        *("--max-new-tokens", 1, "--limit", 1),
        code=1,
    )
    assert {path.name for path in tmp_path.iterdir()} >= {"results.json", "results.csv"}


def test_lines_are_not_broken_in_files(model: Path, samples: Path, tmp_path: Path) -> None:
    out = tmp_path / ("long" * 40) / "p.json"
    found = run("calibrate", "-m", model, "-s", samples, "-o", out, "--limit", 2)
    assert f"Wrote {out}," in found.stdout
