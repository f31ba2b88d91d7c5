"""Commands given text that somebody may have written: in questions, kinds, ids and names."""

from __future__ import annotations

import csv
import io
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
from pore.bias.position_bias import PositionBias
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


# -- what cannot be drawn -------------------------------------------------------------------------

RESULT = {
    "method": "FastV",
    "reweight": None,
    "keep": 0.5,
    "layer": 2,
    "accuracy": 0.5,
    "ci": [0.4, 0.6],
    "accuracy_by_kind": {},
    "accuracy_by_third": {},
    "n": 10,
    "tokens_after": 4.0,
    "mean_tokens": 4.0,
    "acts_in": "decoder",
    "looks_at": [1],
    "guide": None,
    "flops": 1e9,
    "prefill_ms": None,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("accuracy", None),
        ("accuracy", "0.5"),
        ("accuracy", 1e30),
        ("accuracy", True),
        ("ci", [0.1]),
        ("ci", None),
        ("ci", [0.1, "x"]),
        ("ci", {"low": 0}),
        ("flops", "many"),
        ("flops", -1),
        ("flops", [1]),
        ("flops", 10**400),
        ("method", None),
        ("method", ["FastV"]),
        ("reweight", 3),
        ("keep", [1]),
        ("acts_in", 3),
        ("looks_at", None),
        ("looks_at", ["x"]),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([RESULT, RESULT | {field: value}]))
    found = run("plot", path, "-o", tmp_path / "figures", code=1)
    assert field in found.stderr
    assert not (tmp_path / "figures").exists()
    with pytest.raises(InputError, match=f"Result 2 .* its '{field}'"):
        plotting.accuracy_over_flops([RESULT, RESULT | {field: value}])


@pytest.mark.parametrize("field", ["accuracy", "flops"])
def test_results_that_are_nan_are_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"its '{field}' is nan"):
        plotting.accuracy_over_flops([RESULT | {field: float("nan")}])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[1]", "[[]]", "[{}]", "{}", "null", "[", "\x00", "3", '"x"'],
    ids=lambda content: repr(content[:10]),
)
def test_what_are_no_results_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results[red].json"
    path.write_text(content)
    found = run("plot", path, "-o", tmp_path / "figures", code=1)
    assert "results[red].json" in found.stderr
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
def test_one_result_and_results_of_equal_cost_are_drawn() -> None:
    unpruned = RESULT | {"method": "unpruned"}
    many = [RESULT | {"method": f"M{i}"} for i in range(9)]
    for records in ([unpruned], [RESULT], [unpruned, RESULT], many, [unpruned, *many]):
        assert len(plotting.to_png(plotting.accuracy_over_flops(records), dpi=30)) > 1000
    reweighted = [one | {"reweight": "spline"} for one in many]
    with pytest.raises(InputError, match="All results are with P"):
        plotting.accuracy_over_flops(reweighted)


N = 6
FLAT = np.full(N, 0.1)


@pytest.mark.parametrize("draw", [plotting.figure1, plotting.figure2])
@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (np.full(N, np.nan), "NaN"),
        (np.r_[np.nan, FLAT[1:]], "NaN"),
        (np.r_[np.inf, FLAT[1:]], "finite"),
        (-FLAT, "not negative"),
        (0 * FLAT, "zero everywhere"),
        (FLAT[:0], "Expected 6 numbers"),
        (FLAT[None], "Expected 6 numbers"),
    ],
)
def test_means_that_are_none_of_attention_are_refused(draw: Any, mean: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(mean, _bias(N))


def _bias(n: int) -> PositionBias:
    return PositionBias.fit(np.exp(0.1 * np.arange(n)), "empirical", grid=(1, n))


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
def test_one_token_and_tokens_without_attention_are_drawn() -> None:
    one = _bias(1)
    some = np.r_[0.0, FLAT[1:]]
    for figure in (
        plotting.figure1([0.3], one),
        plotting.figure2([0.3], one, [0.1]),
        plotting.figure2(some, _bias(N), 0 * some),
        plotting.figure2(FLAT, _bias(N), np.r_[np.nan, FLAT[1:]]),
    ):
        plotting.to_png(figure, dpi=30)
    with pytest.raises(InputError, match="finite"):
        plotting.figure2(FLAT, _bias(N), np.full(N, np.inf))
    with pytest.raises(InputError, match="A grid of 6"):
        plotting.figure1(FLAT, _bias(N), (-2, -3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1), (32, 48)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_pictures_of_any_shape_and_mode_are_drawn(shape: tuple[int, int], mode: str) -> None:
    picture = PIL.Image.new("RGB", shape, (200, 0, 0)).convert(mode)
    figure = plotting.kept_tokens(picture, [plotting.Panel("a", None, (0,))], (1, 1))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(shown, np.asarray(picture.convert("RGB")))
    with PIL.Image.open(io.BytesIO(plotting.to_png(figure, dpi=30))) as image:
        assert max(image.size) < 1000


def test_pictures_that_are_none_are_refused() -> None:
    panels = [plotting.Panel("a", cells=(4, 4))]
    with pytest.raises(InputError, match="uint8"):
        plotting.kept_tokens(np.zeros((4, 4)), panels, (1, 1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="uint8"):
        plotting.kept_tokens(np.zeros((0, 4, 3), dtype=np.uint8), panels, (1, 1))
    with pytest.raises(InputError, match="no averages on a grid of 4×4"):
        plotting.kept_tokens(np.zeros((3, 3, 3), dtype=np.uint8), panels, (1, 1))
    with pytest.raises(InputError, match="grid of 0×3"):
        plotting.kept_tokens(np.zeros((3, 3, 3), dtype=np.uint8), panels, (0, 3))
    with pytest.raises(InputError, match="no coverage"):
        plotting.layout(PIL.Image.new("RGB", (3, 3)), [])
