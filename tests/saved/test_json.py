"""JSON of any origin: refused in words, or read and written again; and what reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import pore
from pore._saved.parsing import MAX_DEPTH, parse_json, read_json
from pore.bias.position_bias import PositionBias
from pore.bias.provenance import Provenance
from pore.bias.stages import load_biases, save_biases
from pore.calibration.host import HostCalibration
from pore.calibration.sums import Calibration
from pore.cli.app import app
from pore.data.files import from_jsonl
from pore.errors import CalibrationError, InputError, PoreError, ProfileError
from pore.evaluation.files import Results, read_records, write_results
from pore.evaluation.outcome import Answer, Outcome, questions_of, records_of
from pore.evaluation.records import FIELDS

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner), st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
)


@given(DOCUMENTS)
def test_what_json_writes_is_read(document: Any) -> None:
    text = json.dumps(document)
    assert parse_json(text) == parse_json(text.encode()) == document


@given(st.one_of(st.text(), st.binary()))
def test_anything_is_read_or_refused(text: str | bytes) -> None:
    try:
        found = parse_json(text)
    except ValueError:
        return
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


def nested(depth: int, inner: str = "1", kind: str = "[]") -> str:
    start = kind[0] if kind == "[]" else '{"a": '
    return start * depth + inner + kind[1] * depth


HOSTILE: dict[str, tuple[str, str]] = {
    "lists": (nested(MAX_DEPTH + 1), "too deeply"),
    "objects": (nested(MAX_DEPTH + 1, kind="{}"), "too deeply"),
    "empty": (nested(MAX_DEPTH, "[]"), "too deeply"),
    "900": (nested(900), "too deeply"),
    "never closed": ("[" * 100_000, "too deeply"),
    "values": ("[" + "[]," * (1 << 21) + "1]", "more than 4194304 values"),
    "keys": ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
    "inner keys": ('[{"b": {"é": 1, "\\u00e9": 1}}]', "twice"),
    "surrogate": ('["\\ud800"]', "half of a surrogate pair"),
    "surrogate key": ('{"\\udc00x": 1}', "half of a surrogate pair"),
    "NaN": ("[NaN]", "NaN"),
    "infinity": ('{"a": -Infinity}', "-Infinity"),
    "too large": ("[1e999]", "too large"),
    "cut off": ('{"a": ', "Expecting value"),
    "digits": ("[" + "1" * 10_000 + "]", "digits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused(name: str) -> None:
    text, why = HOSTILE[name]
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_what_is_allowed() -> None:
    assert parse_json(nested(MAX_DEPTH)) is not None
    assert parse_json(nested(MAX_DEPTH - 1, "[]")) is not None
    assert parse_json('["\\ud83d\\ude00"]') == ["😀"]
    assert parse_json("[Infinity, -Infinity]", finite=False) == [float("inf"), -float("inf")]
    with pytest.raises(ValueError, match="UTF-8"):
        parse_json(b'"\xed\xa0\x80"')


def test_size_is_looked_at_before_anything_is_built(tmp_path: Path) -> None:
    """12 MB of empty lists take a quarter of a GB when they are built."""
    path = tmp_path / "f.json"
    path.write_bytes(b"[" + b"[]," * (16 << 20 >> 2) + b"1]")
    code = (
        "import sys, resource\nfrom pore._saved.parsing import read_json\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read_json(sys.argv[1], 256 << 20)\nexcept ValueError as error:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    grown, text = done.stdout.split(maxsplit=1)
    assert int(grown) < 150 << 10  # KB
    assert "values" in text
    with pytest.raises(OSError, match="larger than any"):
        read_json(path, 1 << 20)


# -- everything that reads JSON -----------------------------------------------------------------


def results(path: Path) -> Path:
    answers = (Answer("a", "q", "x", "x", True, None, None, ((0,),), 1),)
    outcomes = [Outcome(None, answers)]
    content = Results({"seed": 0}, questions_of(outcomes), records_of(outcomes))
    return write_results(path.parent, content)[0]


def profile(path: Path) -> Path:
    return PositionBias.exponential(0.1, 4).save(path)


def sums(path: Path) -> Path:
    one = Calibration(Provenance(model="m"), "float32", ("a",), 1, 1, (), None, (1,), (1,))
    return one.save(path)


def plot(path: Path) -> None:
    found = CliRunner().invoke(app, ["plot", str(path), "--out", str(path.parent / "figures")])
    if found.exit_code:
        assert found.exit_code == 1
        assert isinstance(found.exception, SystemExit)  # a message, and no traceback
        raise InputError(found.output)


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any], type[PoreError]]] = {
    "PositionBias.load": (profile, PositionBias.load, ProfileError),
    "from_pretrained": (profile, PositionBias.from_pretrained, ProfileError),
    "load_biases": (profile, load_biases, ProfileError),
    "Calibration.load": (sums, Calibration.load, CalibrationError),
    "HostCalibration.load": (sums, HostCalibration.load, CalibrationError),
    "read_records": (results, read_records, InputError),
    "plot results": (results, plot, InputError),
    "plot sums": (sums, plot, InputError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_every_reader_refuses_it(tmp_path: Path, reader: str, name: str) -> None:
    """As the whole of the file, and within a whole one."""
    make, read, error = READERS[reader]
    path = make(tmp_path / "results.json")
    whole = path.read_text()
    text, _ = HOSTILE[name]
    within = whole.replace("null", text, 1) if "null" in whole else whole[:-3] + f', "x": {text}}}'
    for content in (text, within):
        assert content != whole
        path.write_text(content)
        with pytest.raises(error):
            read(path)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_what_is_no_file(tmp_path: Path, reader: str) -> None:
    _, read, error = READERS[reader]
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    # `read_records` says that it lets errors of the system through.
    with pytest.raises((error, OSError), match="not a file"):
        read(pipe)


@pytest.mark.parametrize("load", [PositionBias.from_pretrained, load_biases, PositionBias.load])
@pytest.mark.parametrize("name", ["a\0b.json", "x" * 300 + ".json", "\ud800.json"])
def test_names_that_no_profile_has(load: Any, name: str) -> None:
    with pytest.raises(ProfileError) as caught:
        load(name)
    assert str(caught.value).encode()


@pytest.mark.parametrize("r2", [7, 1.0000001, -2, 1e300])
def test_r2_is_a_share(tmp_path: Path, r2: float) -> None:
    path = profile(tmp_path / "p.json")
    path.write_text(path.read_text().replace('"r2": null', f'"r2": {r2}'))
    with pytest.raises(ProfileError, match="r2 is the share"):
        PositionBias.load(path)
    with pytest.raises(ProfileError, match="r2 is the share"):
        PositionBias(torch.ones(3), "empirical", r2=r2)


def deep(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels - 1):
        found = {"a": found}
    return found


@given(st.integers(1, 3 * MAX_DEPTH))
@settings(deadline=None)
def test_what_a_profile_holds_can_be_saved_and_loaded(tmp_path_factory: Any, levels: int) -> None:
    try:
        provenance = Provenance(processor=deep(levels))
    except ProfileError:
        assert levels > 8
        return
    path = tmp_path_factory.mktemp("saved") / "p.json"
    bias = PositionBias.exponential(0.1, 3, provenance=provenance)
    assert PositionBias.load(bias.save(path)) == bias
    assert load_biases(save_biases(path, [bias, bias])) == (bias, bias)
    one = Calibration(provenance, "float32", ("a",), 1, 1, (), None, (1,), (1,))
    assert Calibration.load(one.save(path)) == one
    both = HostCalibration((one, one))
    assert HostCalibration.load(both.save(path)) == both


@pytest.mark.parametrize("field", ["model", "template", "host", "source"])
def test_provenance_is_text(field: str) -> None:
    with pytest.raises(ProfileError, match="must be text"):
        Provenance(**{field: "\ud800"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("accuracy", 1.5),
        ("accuracy", "high"),
        ("accuracy", True),
        ("ci", [0.5]),
        ("ci", [0.9, 0.1]),
        ("ci", None),
        ("accuracy_by_kind", {"a": 2}),
        ("accuracy_by_third", []),
        ("n", 0),
        ("n", 1.5),
        ("n", 10**400),
        ("skipped", [["a", "b"]]),
        ("tokens_after", -1),
        ("flops", 10**400),
        ("flops", "many"),
        ("method", None),
        ("keep", {"a": 1}),
        ("looks_at", [1.5]),
        ("guide", 3),
    ],
)
def test_results_that_cannot_be(tmp_path: Path, field: str, value: Any) -> None:
    path = results(tmp_path / "results.json")
    document = json.loads(path.read_text())
    records = document["results"]
    assert read_records(path) == [{name: r[name] for name in FIELDS} for r in records]
    records[0][field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"for {field}, which cannot be"):
        read_records(path)


@pytest.mark.parametrize("name", [n for n in HOSTILE if n not in ("NaN", "infinity", "too large")])
def test_lines_of_samples(tmp_path: Path, name: str) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(f'{{"image": "a", "question": "q", "other": {HOSTILE[name][0]}}}')
    with pytest.raises(InputError, match=r"s\.jsonl, line 1"):
        from_jsonl(file)


def test_load_samples_of_what_is_no_file(tmp_path: Path) -> None:
    for name in ("s.jsonl", "pipe"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="not a file"):
            pore.load_samples(tmp_path / name)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"questions in .*not a file"):
        pore.load_samples(tmp_path / "images", questions=tmp_path / "pipe")
    for name in ("/a\0b", "./" + "x" * 300):
        with pytest.raises(InputError, match="no file or folder"):
            pore.load_samples(name)


@pytest.mark.parametrize("name", ["never closed", "keys", "NaN", "too large"])
def test_settings_of_the_command_line(name: str) -> None:
    text = HOSTILE[name][0]
    found = CliRunner().invoke(app, ["evaluate", "--limit", "1", "--set", f"seed={text}"])
    assert found.exit_code == 1  # FastV has no seed; said in words
    assert "no setting 'seed'" in " ".join(found.output.split())
