"""Settings from the command line: in their own types, or refused with how else to give them."""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import pore
from helpers.checkpoint import save_checkpoint, save_samples
from helpers.models import batch, prompt, tiny_llava
from pore.cli.app import app
from pore.data import loading
from pore.data.sources import load_samples
from pore.errors import InputError, PoreError
from pore.evaluation.files import read_records
from pore.families.registry import shape_of
from pore.methods.making import make
from pore.methods.registry import methods
from pore.methods.settings import how_else, read_settings

FIELDS = [
    (name, field.name) for name, kind in methods().items() for field in dataclasses.fields(kind)
]
HOW = {
    ("SGL", "guide"): "`pore evaluate` and `pore serve` take --guide MODEL",
    ("Scored", "scorer"): "pore.Scored(..., scorer=...)",
    ("CDPruner", "relevance"): "pore.CDPruner(..., relevance=...)",
    ("VisionTrim", "clip"): "pore.VisionTrim(..., clip=...)",
}
"""What no text gives, beside `reweight`, and what the refusal says."""
INSTEAD = {("ToMe", "r"), ("IVC-Prune", "foreground"), ("PACT", "cutoff")}
"""What is given instead of `keep`."""
TEXTS = ("1", "0.5", "none", "[1, 2]", "[x]")
UNSET = {"ratio": "0.5", "weights": "[1, 1, 1, 1]", "between": "[1, 2]"}
"""What stands for the usual value of a setting that is usually None, where 1 cannot."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_samples(tmp_path_factory.mktemp("data"), 3)


@pytest.fixture(scope="module", autouse=True)
def loaded_once(model: Path) -> Any:
    """Commands that prune a hundred ways need not load a hundred times."""
    found: dict[str, Any] = {}
    real = loading.load_model

    def load(name: str, **given: Any) -> Any:
        if name not in found:
            found[name] = real(name, **given)
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pore.data.loading.load_model", load)
        yield


def ask(samples: Path, model: Path, *more: object, code: int = 0) -> Any:
    common = ("evaluate", "-m", model, "-s", samples, "--limit", 1, "--max-new-tokens", 1)
    found = CliRunner().invoke(app, [str(one) for one in (*common, "--no-timing", *more)])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def texts_for(method: str, name: str, usual: Any) -> tuple[str, ...]:
    """What is tried, and last the setting's usual value."""
    value = getattr(methods()[method] if usual is None else usual, name, None)
    return (*TEXTS, json.dumps(value) if value is not None else UNSET.get(name, "1"))


def check_refusal(method: str, name: str, text: str, message: str) -> None:
    """A message of one line that says what to do."""
    assert re.fullmatch(".*[.]", message), message
    if name == "reweight" and text != "none":
        assert "--reweight" in message
    if (method, name) in HOW and text != "none":
        assert HOW[method, name] in message


def settable(method: str, name: str) -> bool:
    """Whether the usual value can be set: not if the method is for Python only, needs P, or is for
    videos alone or for images of any size."""
    if methods()[method].videos_only or methods()[method].resizes:
        return False
    return (
        method not in ("Scored", "D2Pruner", "VisionTrim")
        and name != "reweight"
        and (method, name) not in HOW
    )


@pytest.mark.parametrize(("method", "name"), [one for one in FIELDS if one[0] != "SGL"])
@pytest.mark.at_once(30)
def test_every_setting_is_made_or_refused_with_what_to_do(method: str, name: str) -> None:
    """As from the command line, of which the next test goes the whole way."""
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
    shape = shape_of(model.config)
    more = ["keep=none"] if (method, name) in INSTEAD else []
    for text in texts_for(method, name, methods()[method].usual(0.5, shape)):
        done = False
        try:
            made = make(method, model, 0.5, texts=[*more, f"{name}={text}"])
            with torch.no_grad(), made(model):
                model(**inputs)
            done = True
        except PoreError as error:
            check_refusal(method, name, text, str(error))
        if (method, name) in HOW or (name == "reweight" and text != "none"):
            assert not done or text == "none"
    assert done == settable(method, name)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(*one, marks=() if one[0] == "SGL" else pytest.mark.slow)  # guided by itself
        for one in FIELDS
    ],
)
@pytest.mark.in_ci(60)
def test_every_setting_is_taken_or_refused_with_what_to_do(
    samples: Path, model: Path, method: str, name: str
) -> None:
    kind = methods()[method]
    usual = kind.usual(0.5, shape_of(loading.load_config(str(model))))
    given = ["--method", method, *(() if name == "keep" else ("--keep", "0.5"))]
    if (method, name) in INSTEAD:
        given[2:] = ["--set", "keep=none"]
    for text in texts_for(method, name, usual):
        common = ("evaluate", "-m", model, "-s", samples, "--limit", 1, "--max-new-tokens", 1)
        more = ("--no-timing", *given, "--set", f"{name}={text}")
        found = CliRunner().invoke(app, [str(one) for one in (*common, *more)])
        if found.exit_code:  # a message, no traceback
            assert (found.exit_code, type(found.exception)) == (1, SystemExit), found.exception
            message = found.stderr.strip()  # of a bar of progress a line end may be left
            assert message.startswith("Error: ")
            check_refusal(method, name, text, message)
        elif (method, name) in HOW or name == "reweight":
            assert text == "none"
    assert (found.exit_code == 0) == settable(method, name), found.stderr


@pytest.mark.parametrize(("method", "name"), FIELDS)
def test_what_a_text_gives_is_of_the_type_of_the_setting(method: str, name: str) -> None:
    kind = methods()[method]
    field = next(field for field in dataclasses.fields(kind) if field.name == name)
    default = field.default
    if default is dataclasses.MISSING or isinstance(default, pore.PositionBias):
        return
    text = json.dumps(default)
    (value,) = read_settings(kind, [f"{name}={text}"]).values()
    assert value == default
    assert type(value) is type(default)


@pytest.mark.parametrize(
    ("method", "text", "value"),
    [
        ("FastV", "layer=3", 3),
        ("FastV", "faithful=True", True),
        ("FastV", "suppress_padding=1", 1.0),
        ("FastV", "suppress_padding=25%", 0.25),
        ("FastV", "suppress_padding=None", None),
        ("FastV", "normalize=visual", "visual"),
        ("FastV", 'normalize="visual"', "visual"),
        ("FastV", "keep=25%", 0.25),
        ("FastV", "keep=1", 1),
        ("FastV", "keep=1.0", 1.0),
        ("PyramidDrop", "layers=[1, 3]", (1, 3)),
        ("PyramidDrop", "keep=[8, 0.25]", (8, 0.25)),
        ("SparseVLM", 'keep={"scale": 1}', pore.RankBudget(1.0)),
        ("ToMe", "r=8", 8),
        ("ToMe", "r=[8, 4]", [8, 4]),
        ("ToMe", "r=[8, -1.0]", (8, -1.0)),
        ("ToMe", "r=[8, 4, 2]", [8, 4, 2]),
        ("SGL", "reweight=null", None),
    ],
)
def test_values(method: str, text: str, value: object) -> None:
    (found,) = read_settings(methods()[method], [text]).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("method", "texts", "message"),
    [
        ("Random", ["sede=1"], "Random has no setting 'sede'; it has keep, layer, seed."),
        ("Random", ["seed"], "not of the form NAME=VALUE"),
        ("Random", ["seed=1", "seed=2"], "given twice"),
        ("Random", ["seed=1.5"], "'seed' is a whole number"),
        ("Random", ["seed=true"], "'seed' is a whole number"),
        ("FastV", ["faithful=1"], "'faithful' is true or false"),
        ("FastV", ["normalize=image"], "'normalize' is one of prompt, visual"),
        ("FastV", ["suppress_padding=nan"], "'suppress_padding' is a number or none"),
        ("PyramidDrop", ["layers=3"], "a list such as [2, 4], each of them a whole number"),
        ("PyramidDrop", ["layers=[1.5]"], "a list such as [2, 4], each of them a whole number"),
        ("SparseVLM", ['keep={"scale": "x"}'], '{"scale": a number}'),
        ("ToMe", ["r=[" + "[" * 9000], "'r' is a whole number"),
    ],
)
def test_refusals(method: str, texts: list[str], message: str) -> None:
    with pytest.raises(InputError) as found:
        read_settings(methods()[method], texts)
    assert message in str(found.value)
    assert len(str(found.value)) < 400


@given(st.sampled_from(FIELDS), st.text() | st.floats().map(str) | st.integers().map(str))
def test_any_text_is_read_or_refused(which: tuple[str, str], text: str) -> None:
    method, name = which
    with suppress(InputError):
        assert list(read_settings(methods()[method], [f"{name}={text}"])) == [name]


def test_methods_of_others_with_types_that_cannot_be_told_take_json() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pore.Pruner, "registry", {})

        @dataclasses.dataclass(frozen=True)
        class Foreign(pore.FastV):
            weight: Unknown = None  # type: ignore[name-defined]  # noqa: F821
            name = "Foreign"

    assert read_settings(Foreign, ["weight=[1]", "layer=x"]) == {"weight": [1], "layer": "x"}
    assert how_else(Foreign, "weight") is None


# -- given twice, and in another way --------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--keep", 4, "--set", "keep=5"), "name the same setting"),
        (("--layer", 2, "--set", "layer=3"), "layer is given twice"),
        (("--average", "--set", "keep=5"), "--average finds the budget itself"),
        (("--method", "random", "--set", f"seed={10**20}"), "does not fit into 64 bits"),
        (("--method", "DivPrune", "--layer", 2), "DivPrune has no setting 'layer'"),
        (("--guide", "x"), "--guide is for --all and for --method SGL, not for FastV"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    samples: Path, model: Path, given: tuple[object, ...], message: str
) -> None:
    assert message in ask(samples, model, *given, code=1).stderr


@pytest.mark.parametrize("seed", ["-1", str(2**63), "x"])
@pytest.mark.parametrize("command", ["evaluate", "demo"])
def test_seeds_are_seen_before_the_work(command: str, seed: str) -> None:
    found = CliRunner().invoke(app, [command, "--seed", seed])
    assert found.exit_code == 2


@pytest.mark.parametrize("command", [("calibrate", "-m", "./none"), ("plot", "none.json")])
@pytest.mark.parametrize("kind", ["[red]", "rope", ""])
def test_forms_of_p_are_seen_before_the_work(command: tuple[str, ...], kind: str) -> None:
    found = CliRunner().invoke(app, [*command, "--kind", kind])
    assert found.exit_code == 1
    assert f"P cannot be fitted in the form {kind!r}; choose from " in found.stderr


@pytest.mark.parametrize(
    ("method", "setting", "keep"),
    [
        ("PyramidDrop", "keep=[0.5, 4, 0.25]", "keep 50 %, 4, 25 %"),
        ("SparseVLM", 'keep={"scale": 0.5}', "keep RankBudget(scale=0.5)"),
        ("PruMerge", "keep=none", None),
    ],
)
def test_budgets_that_are_no_number_reach_the_table(
    samples: Path, model: Path, tmp_path: Path, method: str, setting: str, keep: str | None
) -> None:
    layers = ("--set", "layers=[1, 2, 3]") if method == "PyramidDrop" else ()
    found = ask(samples, model, "--method", method, "--set", setting, *layers, "-o", tmp_path)
    assert [record["keep"] for record in read_records(tmp_path / "results.json")] == [1.0, keep]
    assert (keep or "method's own budget") in found.stdout


# -- SGL ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_sgl_is_guided_by_the_model_itself_or_by_another(
    samples: Path, model: Path, tmp_path: Path
) -> None:
    guide = save_checkpoint(tmp_path / "small")
    found = {}
    for by, name in (
        ((), "itself"),
        (("--guide", model), "itself"),
        (("--guide", guide), "small"),
    ):
        out = tmp_path / f"out{len(found)}"
        shown = ask(samples, model, "--method", "sgl", *by, "--keep", 4, "-o", out)
        records = read_records(out / "results.json")
        assert [(r["method"], r["guide"], r["tokens_after"]) for r in records] == [
            ("unpruned", None, 16),
            ("SGL", name, 4),
        ]
        assert "SGL §" in shown.stdout
        assert f"§ Guided by {'the model itself' if name == 'itself' else name}" in shown.stdout
        found[by] = records[1]
    assert found[()] == found[("--guide", model)]


def test_sgl_with_a_layer_an_average_and_p(samples: Path, model: Path, tmp_path: Path) -> None:
    common = ("--method", "SGL", "-o", tmp_path)
    ask(samples, model, *common, "--keep", 10, "--average", "--layer", 1)
    (_, one) = read_records(tmp_path / "results.json")
    assert (one["mean_tokens"], one["layer"]) == (pytest.approx(10, abs=0.5), 1)
    loaded, processor = loading.load_model(str(model))
    measured = pore.calibrate_guide(loaded, processor, load_samples(str(samples)), max_new_tokens=1)
    profile = measured.fit("empirical").save(tmp_path / "p.json")
    found = ask(samples, model, *common, "--keep", 4, "--reweight", profile)
    assert "SGL + PoRe − SGL" in found.stdout


@pytest.mark.parametrize(
    "command", [("chat", "0.png"), ("calibrate",), ("bench", "--repeats", "1")]
)
@pytest.mark.slow
def test_commands_without_a_guide_say_where_there_is_one(
    samples: Path, model: Path, command: tuple[str, ...]
) -> None:
    given = [str(samples.parent / part) if part.endswith("png") else part for part in command]
    found = CliRunner().invoke(app, [*given, "-m", str(model), "--method", "SGL"])
    assert found.exit_code == 1
    assert HOW["SGL", "guide"] in found.stderr
